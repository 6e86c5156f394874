import copy
from pathlib import Path

import pytest
import yaml

from pipelines.config import ConfigError, check_config, read_config, set_values
from pipelines.finetune_pipeline import finetune_pipeline

ROOT = Path(__file__).parent.parent.parent
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))


FREE = {"node_selectors", "limits", "requests"}  # maps of Kubernetes, whose keys are anybody's


def keys_of(value: object, path: tuple = ()) -> list[tuple]:
    """The way to each key, through maps and lists."""
    if isinstance(value, list):
        return [inner for i, item in enumerate(value) for inner in keys_of(item, (*path, i))]
    if not isinstance(value, dict) or (path[-1:] and path[-1] in FREE):
        return []
    return [inner for key in value for inner in ((*path, key), *keys_of(value[key], (*path, key)))]


EVERY_KEY = [(file, path) for file in CONFIGS for path in keys_of(yaml.safe_load(file.read_text()))]


def with_config(tmp_path: Path, text: str) -> Path:
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    return file


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.name)
def test_each_config_of_the_project_is_valid(file):
    read_config(file, finetune_pipeline)


@pytest.mark.parametrize(
    ("file", "path"), EVERY_KEY, ids=lambda value: getattr(value, "name", None) or ".".join(map(str, value))
)
def test_each_key_of_each_config_is_refused_when_misspelt(file, path, tmp_path):
    config = yaml.safe_load(file.read_text())
    place = config
    for key in path[:-1]:
        place = place[key]
    misspelt = path[-1] + "x"
    place[misspelt] = place.pop(path[-1])
    copied = with_config(tmp_path, yaml.safe_dump(config))

    with pytest.raises(ConfigError) as error:
        read_config(copied, finetune_pipeline)

    assert str(copied) in str(error.value)
    assert misspelt in str(error.value)
    assert f"did you mean {path[-1]!r}" in str(error.value)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("parameters: {train: {learning_rat: 0.1}}", ["parameters.train.learning_rat", "learning_rate"]),
        ("parameters: {base: {pretrain: {max_step: 1}}}", ["parameters.base.pretrain.max_step", "max_steps"]),
        ("parameter: {seed: 1}", ["parameter", "parameters"]),
        ("steps: {finetun: {enable_cache: false}}", ["steps.finetun", "finetune"]),
        ("steps: {finetune: {enable_cach: false}}", ["steps.finetune.enable_cach", "enable_cache"]),
        ("steps: {finetune: {step_operater: gpu}}", ["steps.finetune.step_operater", "step_operator"]),
        ("settings: {docker: {requirement: []}}", ["settings.docker.requirement", "requirements"]),
        ("steps: {finetune: {settings: {resources: {gpu_cout: 1}}}}", ["settings.resources.gpu_cout", "gpu_count"]),
        ("model: {nam: x}", ["model.nam", "name"]),
        ("settings: {step_operator: {memory: 6g}}", ["settings.step_operator", "step_operator.container"]),
        (
            "settings: {step_operator.kubernetes: {pod_settings: {tolerations: [{kee: gpu}]}}}",
            ["pod_settings.tolerations.0.kee", "key"],
        ),
    ],
)
def test_a_misspelt_key_is_named_with_the_nearest_right_one(text, named, tmp_path):
    with pytest.raises(ConfigError) as error:
        read_config(with_config(tmp_path, text), finetune_pipeline)
    for word in named:
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("parameters: {lora: {rank: 0}}", ["parameters.lora", "rank", "0", "at least 1"]),
        ("parameters: {lora: {rank: eight}}", ["parameters.lora.rank", "eight"]),
        ("parameters: {lora: {targets: [q, w]}}", ["targets", "w"]),
        ("parameters: {seed: one}", ["parameters.seed", "one"]),
        ("parameters: {seed: true}", ["parameters.seed", "True"]),
        ("parameters: {train: 3}", ["parameters.train", "3", "mapping"]),
        ("parameters: {train: {seed: 3}}", ["parameters.train.seed", "parameters.seed"]),
        ("parameters: {data: {source: web}}", ["parameters.data.source", "web", "bundled"]),
        ("parameters: {train: {learning_rate: .nan}}", ["learning_rate", "nan"]),
        ("- a\n- list", ["mapping"]),
        ("a: [1,", ["YAML"]),
        ("enable_cache: maybe", ["enable_cache", "maybe"]),
        ("settings: {orchestrator.container: {memory: 6 gigs}}", ["settings.orchestrator.container.memory", "6 gigs"]),
        ("settings: {step_operator.kubernetes: {pod_settings: 3}}", ["step_operator.kubernetes.pod_settings", "3"]),
        ("settings: {docker: {skip_build: true}}", ["settings.docker", "parent_image"]),
    ],
)
def test_a_wrong_value_is_named_with_what_is_allowed(text, named, tmp_path):
    with pytest.raises(ConfigError) as error:
        read_config(with_config(tmp_path, text), finetune_pipeline)
    for word in named:
        assert word in str(error.value)


def test_a_file_that_is_not_there_is_named_with_those_that_are():
    with pytest.raises(ConfigError, match=r"loca\.yaml.*local\.yaml"):
        read_config(ROOT / "configs" / "loca.yaml", finetune_pipeline)


def test_an_empty_file_is_the_defaults(tmp_path):
    assert read_config(with_config(tmp_path, "# nothing\n"), finetune_pipeline) == {}


def test_set_reaches_a_nested_value():
    config = {"parameters": {"seed": 1}}
    set_values(config, ["base.pretrain.max_steps=7"], finetune_pipeline)
    assert config == {"parameters": {"seed": 1, "base": {"pretrain": {"max_steps": 7}}}}


def test_set_reads_lists_and_numbers_as_yaml_does():
    config: dict = {}
    set_values(config, ["lora.targets=[q, k]", "train.learning_rate=1e-3"], finetune_pipeline)
    assert config["parameters"]["lora"]["targets"] == ["q", "k"]
    check_config(copy.deepcopy(config), "config", finetune_pipeline)


@pytest.mark.parametrize("assignment", ["lora.rnk=1", "lora.rank", "seed.x=1", "lora.rank=[", "train.seed=1"])
def test_set_refuses_what_a_file_could_not_say(assignment):
    with pytest.raises(ConfigError, match="--set"):
        set_values({"parameters": {"seed": 0}}, [assignment], finetune_pipeline)


def test_values_that_belong_together_may_be_set_one_after_the_other():
    config: dict = {}
    set_values(config, ["data.source=file", "data.path=mine.json"], finetune_pipeline)
    assert config["parameters"]["data"] == {"source": "file", "path": "mine.json"}
