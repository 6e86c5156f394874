import copy
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from inspect import signature
from math import inf, nan
from pathlib import Path
from typing import get_type_hints

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from zenml.pipelines.pipeline_definition import Pipeline

from gpt2core.config import AttentionConfig, GenerationConfig, LoraConfig, TrainConfig
from pipelines.config import check_config, read_config, set_values
from pipelines.errors import ConfigError
from pipelines.finetune_pipeline import finetune_pipeline
from pipelines.monitor_pipeline import monitor_pipeline
from pipelines.pretrain_pipeline import pretrain_pipeline
from pipelines.sweep_pipeline import sweep_pipeline
from pipelines.variants import variants_of
from steps.config import BaseConfig, DataConfig, SweepConfig

ROOT = Path(__file__).parent.parent.parent
CONFIGS = sorted({*(ROOT / "configs").glob("*.yaml")} - {ROOT / "configs" / "pretrain.yaml"})
FREE = {"node_selectors", "limits", "requests"}  # Kubernetes maps with arbitrary keys


def pipeline_of(file: Path) -> Pipeline:
    return monitor_pipeline if file.name == "monitor.yaml" else finetune_pipeline


def paths_of(value: object, path: tuple = ()) -> list[tuple]:
    """The path of each key, through mappings and lists."""
    if isinstance(value, list):
        return [inner for i, item in enumerate(value) for inner in paths_of(item, (*path, i))]
    if not isinstance(value, dict) or (path[-1:] and path[-1] in FREE):
        return []
    return [inner for key in value for inner in ((*path, key), *paths_of(value[key], (*path, key)))]


EVERY_KEY = [(file, path) for file in CONFIGS for path in paths_of(yaml.safe_load(file.read_text()))]


def write_config(tmp_path: Path, text: str) -> Path:
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    return file


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.name)
def test_each_config_of_the_project_is_valid(file):
    read_config(file, pipeline_of(file))


@settings(derandomize=True, deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(EVERY_KEY))
def test_a_misspelled_key_at_any_level_is_refused_with_the_correct_one(key):
    file, path = key
    config = yaml.safe_load(file.read_text())
    mapping = config
    for part in path[:-1]:
        mapping = mapping[part]
    mapping[f"{path[-1]}x"] = mapping.pop(path[-1])

    with pytest.raises(ConfigError) as error:
        check_config(config, file.name, pipeline_of(file))

    for part in (file.name, f"{path[-1]}x", f"did you mean {path[-1]!r}"):
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        (
            f"parameters: {{base: {{source: hub, name: x, revision: {'6' * 40}}}}}",
            ["base.revision", "put it in quotes"],
        ),
        ("parameters: {base: {pretrain: {max_step: 1}}}", ["parameters.base.pretrain.max_step", "max_steps"]),
        ("parameter: {seed: 1}", ["parameter", "parameters"]),
        ("train: {epochs: 3}", ["'train'", "did you mean 'parameters.train'?"]),
        ("seed: 3", ["'seed'", "did you mean 'parameters.seed'?"]),
        ("lorra: {rank: 3}", ["'lorra'", "did you mean 'parameters.lora'?"]),
        ("steps: {finetun: {enable_cache: false}}", ["steps.finetun", "finetune"]),
        ("steps: {finetune: {enable_cach: false}}", ["steps.finetune.enable_cach", "enable_cache"]),
        ("steps: {finetune: {settings: {resources: {gpu_cout: 1}}}}", ["settings.resources.gpu_cout", "gpu_count"]),
        ("settings: {step_operator: {memory: 6g}}", ["settings.step_operator", "step_operator.container"]),
        (
            "settings: {step_operator.kubernetes: {pod_settings: {tolerations: [{kee: gpu}]}}}",
            ["pod_settings.tolerations.0.kee", "key"],
        ),
        ("parameters: {lora: {rank: 0}}", ["parameters.lora", "rank", "0", "at least 1"]),
        ("parameters: {lora: {rank: eight}}", ["parameters.lora.rank", "eight"]),
        ("parameters: {lora: {targets: [q, w]}}", ["targets", "w"]),
        ("parameters: {lora: {targets: q}}", ["mine.yaml: parameters.lora.targets: Input should be a list (got 'q')"]),
        ("parameters: {data: {columns: x}}", ["data.columns", "should be a mapping (got 'x')"]),
        ("parameters: {seed: true}", ["parameters.seed", "True"]),
        ("parameters: {train: 3}", ["parameters.train", "3", "mapping"]),
        ("parameters: {train: {seed: 3}}", ["parameters.train.seed", "parameters.seed"]),
        ("parameters: {data: {source: web}}", ["parameters.data.source", "web", "bundled"]),
        ("parameters: {train: {learning_rate: .nan}}", ["learning_rate", "nan"]),
        ("- a\n- list", ["mapping"]),
        ("parameters: {lora: {rank: 4}, lora: {rank: 8}}", ["mine.yaml", "'lora' is repeated", "line 1"]),
        ("parameters: {seed: 99999999999999999999}", ["parameters.seed", "9223372036854775808"]),
        ("parameters: {lora: {rank: 99999999999999999999}}", ["rank", "64 bits"]),
        ("parameters: {promote: {margin: .nan}}", ["margin", "finite"]),
        ("parameters: {train: {betas: [2, 3]}}", ["betas"]),
        ("parameters: {data: {path: mine.json}}", ["path", "mine.json", "source is file"]),
        ("a: [1,", ["mine.yaml", "YAML", " in line 1"]),
        ("enable_cache: maybe", ["enable_cache", "maybe"]),
        ("settings: {orchestrator.container: {memory: 6 gigs}}", ["settings.orchestrator.container.memory", "6 gigs"]),
        ("settings: {step_operator.kubernetes: {pod_settings: 3}}", ["step_operator.kubernetes.pod_settings", "3"]),
        ("settings: {docker: {skip_build: true}}", ["settings.docker", "parent_image"]),
    ],
)
def test_an_error_names_the_path_the_value_and_what_is_allowed(text, named, tmp_path):
    with pytest.raises(ConfigError) as error:
        read_config(write_config(tmp_path, text), finetune_pipeline)
    for word in named:
        assert word in str(error.value)


def test_a_file_that_powershell_wrote_is_refused_by_its_encoding(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("parameters: {seed: 1}", encoding="utf-16")
    with pytest.raises(ConfigError, match=r"mine\.yaml is not UTF-8 text: .*; save it as UTF-8"):
        read_config(file, finetune_pipeline)


def test_a_file_that_does_not_exist_is_reported_with_those_that_do():
    with pytest.raises(ConfigError, match=r"loca\.yaml.*local\.yaml"):
        read_config(ROOT / "configs" / "loca.yaml", finetune_pipeline)
    with pytest.raises(ConfigError, match="configs is a directory"):
        read_config(ROOT / "configs", finetune_pipeline)


def test_an_empty_file_stands_for_the_defaults(tmp_path):
    assert read_config(write_config(tmp_path, "# nothing\n"), finetune_pipeline) == {}


def test_set_changes_a_nested_value():
    config = {"parameters": {"seed": 1}}
    set_values(config, ["base.pretrain.max_steps=7"], finetune_pipeline)
    assert config == {"parameters": {"seed": 1, "base": {"pretrain": {"max_steps": 7}}}}


def test_set_accepts_the_path_of_a_key_in_the_file():
    config: dict = {}
    set_values(config, ["parameters.train.epochs=2", "parameters.seed=1"], finetune_pipeline)
    assert config == {"parameters": {"train": {"epochs": 2}, "seed": 1}}


def test_set_reads_values_as_yaml():
    config: dict = {}
    set_values(config, ["lora.targets=[q, k]", "train.learning_rate=1e-3"], finetune_pipeline)
    assert config["parameters"]["lora"]["targets"] == ["q", "k"]
    check_config(copy.deepcopy(config), "config", finetune_pipeline)


@pytest.mark.parametrize("assignment", ["lora.rnk=1", "lora.rank", "seed.x=1", "lora.rank=[", "train.seed=1"])
def test_set_refuses_what_a_file_may_not_contain(assignment):
    with pytest.raises(ConfigError, match="--set"):
        set_values({"parameters": {"seed": 0}}, [assignment], finetune_pipeline)


@pytest.mark.parametrize("pattern", ["*.jsonl", "{a,b}.jsonl", "@a.jsonl"])
def test_a_text_that_is_not_yaml_is_refused_with_its_spelling_in_yaml(pattern):
    with pytest.raises(ConfigError, match="the value is not valid YAML") as error:
        set_values({}, ["data.source=file", f"data.path={pattern}"], finetune_pipeline)
    spelling = str(error.value).rpartition("put text in quotes, also for the shell: --set ")[2]
    assert spelling == f"'data.path=\"{pattern}\"'"
    config: dict = {}
    set_values(config, ["data.source=file", spelling.strip("'")], finetune_pipeline)
    assert config["parameters"]["data"]["path"] == pattern


def test_a_huge_value_is_shortened_in_the_message(tmp_path):
    bomb = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "\n".join(
        f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]" for before, name in zip("abcdef", "bcdefg", strict=True)
    )
    with pytest.raises(ConfigError) as error:
        read_config(write_config(tmp_path, f"{bomb}\nparameters: {{train: *g}}"), finetune_pipeline)
    assert len(str(error.value)) < 2000


def test_values_that_depend_on_each_other_are_checked_together():
    config: dict = {}
    set_values(config, ["data.source=file", "data.path=mine.json"], finetune_pipeline)
    assert config["parameters"]["data"] == {"source": "file", "path": "mine.json"}


OF_ZENML = ("parameters", "settings", "steps", "model", "retry", "schedule", "enable_cache", "settings.docker", "extra")
WRONG = ([], [[]], {"x": 1}, "x", "", True, None, nan, inf, -1, 0, 3.5, 2**70, 10**400, [None])


def keys_of(annotation: type, path: str, seen: set[type]) -> Iterator[tuple[str, type]]:
    """Each key and its type; a dataclass that several pipelines have is entered once."""
    yield path, annotation
    if is_dataclass(annotation) and annotation not in seen:
        seen.add(annotation)
        types = get_type_hints(annotation)
        for field in fields(annotation):
            yield from keys_of(types[field.name], f"{path}.{field.name}", seen)


def every_key() -> Iterator[tuple[Pipeline, str, type | None]]:
    seen: set[type] = set()
    for pipeline in (finetune_pipeline, monitor_pipeline, pretrain_pipeline, sweep_pipeline):
        types = get_type_hints(pipeline.entrypoint)
        for name in signature(pipeline.entrypoint).parameters:
            for path, annotation in keys_of(types[name], f"parameters.{name}", seen):
                yield pipeline, path, annotation
    yield from ((finetune_pipeline, path, None) for path in OF_ZENML)


def test_any_value_of_any_key_is_accepted_or_refused_in_one_line_that_names_the_key():
    tried = refused = 0
    for pipeline, path, annotation in every_key():
        *parents, last = path.split(".")
        for value in WRONG:
            config = copy.deepcopy({"parameters": {"sweep": {"grid": {"lora.rank": [2]}}}} if "sweep" in path else {})
            mapping = config
            for key in parents:
                mapping = mapping.setdefault(key, {})
            mapping[last] = value
            tried += 1
            try:
                check_config(config, "mine.yaml", pipeline)
            except ConfigError as error:
                message, refused = str(error), refused + 1
                assert last in message, (path, value)
                assert "\n" not in message
                assert len(message) < 1000
            else:
                numbers = isinstance(value, bool) and annotation in (int, float, int | None, float | None)
                assert not numbers, f"{path}: {value} was taken for a number"
    assert tried > 2000
    assert refused > tried / 2


def test_a_grid_whose_keys_contradict_each_other_or_that_is_too_large_is_refused():
    grid = {"attention.length": [1], "attention.length.x": [2]}
    with pytest.raises(ConfigError, match=r"attention\.length\.x is below another key"):
        variants_of(SweepConfig(kind="attention", grid=grid), {"attention": AttentionConfig()})
    with pytest.raises(ValueError, match="1000 combinations"):
        SweepConfig(grid={f"lora.{i}": [*range(100)] for i in range(50)})


def test_a_rank_above_the_width_of_the_base_is_refused_before_anything_runs():
    with pytest.raises(ValueError, match=r"lora\.rank is 129; it must be at most 128"):
        finetune_pipeline.entrypoint(lora=LoraConfig(rank=129))
    given = {"data": DataConfig(), "base": BaseConfig(), "lora": LoraConfig(), "train": TrainConfig()}
    given |= {"generation": GenerationConfig()}
    with pytest.raises(ConfigError, match=r"sweep\.variants\.lora\.rank 129: .* at most 128"):
        variants_of(SweepConfig(grid={"lora.rank": [8, 129]}), given)


def test_patience_without_validation_records_is_refused_before_anything_runs():
    without = DataConfig(val_fraction=0)
    with pytest.raises(ValueError, match=r"train\.patience is 3, but .*data\.val_fraction, which is 0"):
        finetune_pipeline.entrypoint(data=without, train=TrainConfig(patience=3))
    given = {"data": without, "base": BaseConfig(), "lora": LoraConfig(), "train": TrainConfig()}
    given |= {"generation": GenerationConfig()}
    with pytest.raises(ConfigError, match=r"sweep\.variants\.train\.patience 3: train\.patience is 3"):
        variants_of(SweepConfig(grid={"train.patience": [3]}), given)


@pytest.mark.parametrize(
    "data",
    [DataConfig(), DataConfig(source="file", path="parts/", val_fraction=0)],  # the directory may have a part
)
def test_patience_with_validation_records_is_allowed(data):
    data.check_patience_early(TrainConfig(patience=3))


def test_a_config_of_another_pipeline_is_reported_with_the_right_command():
    rank_sweep = ROOT / "configs" / "experiments" / "rank_sweep.yaml"
    with pytest.raises(ConfigError, match=r"rank_sweep\.yaml configures a sweep .* `python run\.py sweep --config"):
        read_config(rank_sweep, finetune_pipeline)
    with pytest.raises(ConfigError, match=r"local\.yaml has no parameters\.sweep; configs/experiments/ has"):
        read_config(ROOT / "configs" / "local.yaml", sweep_pipeline)


def test_the_rule_of_a_field_is_reported_with_its_key_in_the_file(tmp_path):
    with pytest.raises(ConfigError) as error:
        read_config(write_config(tmp_path, "parameters: {lora: {rank: 0}}"), finetune_pipeline)
    assert str(error.value).endswith("mine.yaml: parameters.lora.rank is 0; it must be at least 1")
