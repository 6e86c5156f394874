"""The whole way at dev size, in a ZenML store, a Bento store and an outputs folder of its own."""

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from shutil import rmtree
from types import SimpleNamespace

import pytest
import requests
from click.testing import CliRunner
from zenml.cli.cli import cli
from zenml.client import Client
from zenml.enums import ExecutionStatus

from deploy import bento
from deploy.kubernetes import progress
from deploy.kubernetes.render import annotations
from deploy.server import serve
from deploy.verify import request_answer
from gpt2core.checkpoint import directory_sha256, load_adapter, load_pretrained
from gpt2core.config import GenerationConfig
from gpt2core.data import records_sha256, split_records
from gpt2core.demo.records import write_records
from gpt2core.demo.world import make_world
from gpt2core.evaluate import answer_text
from gpt2core.generate import generate
from gpt2core.metrics import exact_match
from gpt2core.prompt import format_prompt
from gpt2core.tokenizer import load_tokenizer
from gpt2core.types import Lineage
from run import main
from tests.deploy.kube_api import TOKEN, KubeApi

DEV = "configs/dev.yaml"
MAX_NEW_TOKENS, N_FACTS = 12, 120  # dev.yaml's
UNCACHED = {"promote", "deploy", "export_outputs"}
FILES = {"report.html", "report.json", "curves.html", "metrics.json", "samples.jsonl", "split.json", "lineage.json"}


@contextmanager
def outputs_in(directory: Path) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GPT2_INSTRUCT_OUTPUTS", str(directory))
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("project") / "outputs"


def run_py(folder: Path, *values: str):
    arguments = ["finetune", "--config", DEV, *(part for value in values for part in ("--set", value))]
    with outputs_in(folder):
        return CliRunner().invoke(main, arguments, catch_exceptions=False)


def finetune(folder: Path, *values: str) -> SimpleNamespace:
    """Run the pipeline as run.py does; the run as ZenML has it, and its folder."""
    result = run_py(folder, *values)
    assert result.exit_code == 0, result.output
    run = Client().get_pipeline_run(json.loads((folder / "latest" / "lineage.json").read_text())["run"]["id"])
    newest = Client().list_pipeline_runs(sort_by="desc:created", size=1).items[0]
    return SimpleNamespace(run=newest, made_by=run, folder=(folder / "latest").resolve(), output=result.output)


@pytest.fixture(scope="module")
def first(folder):
    return finetune(folder)


@pytest.fixture(scope="module")
def again(folder, first):
    return finetune(folder)


def cached(run) -> set[str]:
    return {name for name, step in run.run.steps.items() if step.status == ExecutionStatus.CACHED}


def read(done, name: str):
    return json.loads((done.folder / name).read_text())


def samples(done) -> list[dict]:
    return [json.loads(line) for line in (done.folder / "samples.jsonl").read_text().splitlines()]


def test_the_run_completes_every_step_and_says_where_its_results_are(first):
    assert first.run.status == ExecutionStatus.COMPLETED
    assert {step.status for step in first.run.steps.values()} == {ExecutionStatus.COMPLETED}
    assert f"{first.run.name}: completed" in first.output


def test_outputs_latest_points_at_the_files_of_the_run(first):
    assert first.folder.name == first.run.name
    assert {path.name for path in first.folder.iterdir()} == FILES | {"adapter", "base", "bento.txt"}


def test_the_split_names_the_digest_and_size_of_each_part(first):
    parts = split_records(write_records(make_world(0, N_FACTS), 0), 0)
    assert read(first, "split.json") == {
        name: {"sha256": records_sha256(part), "records": len(part)} for name, part in parts._asdict().items()
    }


def test_answers_of_base_and_tuned_model_can_be_generated_again_from_the_outputs(first):
    rows = samples(first)
    tokenizer, model = load_tokenizer(first.folder / "base"), load_pretrained(first.folder / "base")
    prompts = [tokenizer.encode_ordinary(format_prompt(row["instruction"], row["input"])) for row in rows]
    config = GenerationConfig(max_new_tokens=MAX_NEW_TOKENS, eos_id=tokenizer.eot_token)

    base = [answer_text(reply, tokenizer) for reply in generate(model, prompts, config)]
    load_adapter(model, first.folder / "adapter")
    tuned = [answer_text(reply, tokenizer) for reply in generate(model, prompts, config)]

    assert base == [row["base"] for row in rows]
    assert tuned == [row["tuned"] for row in rows]
    assert base != tuned


def test_metrics_are_those_of_the_samples(first):
    rows, metrics = samples(first), read(first, "metrics.json")
    for side in ("base", "tuned"):
        assert metrics[side].keys() == {"exact_match", "token_f1", "rouge_l", "perplexity", "finished"}
        scores = [exact_match(row["output"], row[side]) for row in rows]
        assert metrics[side]["exact_match"] == pytest.approx(sum(scores) / len(scores))
    assert metrics["tuned"]["perplexity"] < metrics["base"]["perplexity"]
    assert metrics["train"].keys() == {"loss", "val_loss", "tokens_seen", "tokens_per_second"}


def test_lineage_names_run_code_data_base_adapter_and_bento(first):
    lineage = read(first, "lineage.json")
    assert lineage["run"] == {"id": str(first.run.id), "name": first.run.name}
    assert lineage["commit"].keys() == {"sha", "dirty"}
    assert lineage["data"] == {name: about["sha256"] for name, about in read(first, "split.json").items()}
    assert lineage["base"]["sha256"] == json.loads((first.folder / "base" / "base.json").read_text())["sha256"]
    assert lineage["adapter"]["sha256"] == directory_sha256(first.folder / "adapter")
    assert lineage["bento"] == (first.folder / "bento.txt").read_text().strip()
    assert lineage["metrics"]["tuned"] == read(first, "metrics.json")["tuned"]
    assert "torch" in lineage["versions"]
    assert bento.exists(lineage["bento"])


def test_the_served_bento_answers_as_samples_say_and_names_its_lineage(first):
    lineage, row = read(first, "lineage.json"), samples(first)[-1]
    with serve(lineage["bento"]) as url:
        assert request_answer(url, row["instruction"], row["input"], MAX_NEW_TOKENS) == row["tuned"]
        assert requests.get(f"{url}/metadata", timeout=10).json() == lineage


@pytest.mark.parametrize(
    ("step", "artifact", "keys"),
    [
        ("fetch_data", "records", {"source", "records", "duplicates", "sha256"}),
        ("split_data", "test_records", {"records", "sha256"}),
        ("prepare_base", "base", {"sha256", "parameters", "corpus_tokens", "cloze_accuracy", "train_loss"}),
        ("finetune", "adapter", {"sha256", "loss", "val_loss", "tokens_seen", "tokens_per_second"}),
        ("evaluate", "metrics", {"base", "tuned"}),
        ("package", "bento", {"tag", "smoke_prompts"}),
        ("promote", "promotion", {"promoted", "reason", "model_version"}),
    ],
)
def test_artifacts_carry_what_a_person_wants_to_see_in_the_dashboard(first, step, artifact, keys):
    [version] = first.run.steps[step].outputs[artifact]
    assert keys <= version.run_metadata.keys()


def test_the_report_is_an_artifact_that_the_dashboard_shows(first):
    [version] = first.run.steps["report"].outputs["report"]
    assert version.load() == (first.folder / "report.html").read_text()


def test_an_unchanged_rerun_takes_everything_from_the_cache_that_may_be_and_keeps_its_bento(first, again):
    assert again.run.steps.keys() - cached(again) == UNCACHED
    assert again.folder != first.folder
    for name in ("samples.jsonl", "metrics.json", "lineage.json", "bento.txt"):
        assert (again.folder / name).read_bytes() == (first.folder / name).read_bytes()


def test_another_rank_trains_again_on_the_base_there_is(folder, first):
    done = finetune(folder, "lora.rank=2")
    assert cached(done) == {"fetch_data", "split_data", "prepare_base"}
    assert read(done, "lineage.json")["adapter"]["sha256"] != read(first, "lineage.json")["adapter"]["sha256"]


def test_a_model_that_does_not_beat_its_base_by_the_margin_is_not_promoted(folder, first):
    done = finetune(folder, "promote.margin=1.0")
    promotion = done.run.steps["promote"].outputs["promotion"][0].load()
    assert promotion["promoted"] is False
    assert "is not above base" in promotion["reason"]
    assert done.run.model_version.stage is None


def test_a_model_that_beats_it_moves_to_staging(folder, first):
    done = finetune(folder, "promote.margin=-1.0")
    promotion = done.run.steps["promote"].outputs["promotion"][0].load()
    assert promotion["promoted"] is True
    assert Client().get_model_version("gpt2-instruct", "staging").id == done.run.model_version.id


def test_a_bento_that_is_gone_is_built_again(folder, first, again):
    name, version = read(again, "lineage.json")["bento"].split(":")
    rmtree(Path(os.environ["BENTOML_HOME"]) / "bentos" / name / version)
    done = finetune(folder)
    assert "package" not in cached(done)
    assert {"finetune", "evaluate"} <= cached(done)
    assert bento.exists(read(done, "lineage.json")["bento"])


def test_a_file_of_records_is_read_again_when_it_changed(folder, first, tmp_path):
    file = tmp_path / "mine.jsonl"
    records = write_records(make_world(1, N_FACTS), 1)
    values = ("data.source=file", f"data.path={file}", "train.limit_train_batches=1")
    file.write_text("\n".join(map(json.dumps, records)))
    one = finetune(folder, *values)
    file.write_text("\n".join(map(json.dumps, records[:-7])))
    other = finetune(folder, *values)
    sizes = [sum(part["records"] for part in read(done, "split.json").values()) for done in (one, other)]
    assert sizes == [len(records), len(records) - 7]
    assert "prepare_base" in cached(other)


def test_a_base_from_elsewhere_travels_as_a_reference(folder, first):
    done = finetune(folder, "base.source=hub", f"base.name={first.folder / 'base'}")
    assert not (done.folder / "base").exists()
    reference = read(done, "base.json")
    assert reference["name"] == str(first.folder / "base")
    assert [row["base"] for row in samples(done)] == [row["base"] for row in samples(first)]
    assert read(done, "lineage.json")["base"] == {key: reference[key] for key in ("name", "revision", "sha256")}


def test_tracking_offline_leaves_a_run_of_wandb(folder, first):
    finetune(folder, "tracking.wandb=offline")
    assert list((folder / "wandb").rglob("*.wandb"))


IMAGE = "registry.example/gpt2-instruct:1"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """A double of a cluster's API (tests/deploy/kube_api.py), and the values that deploy to it."""
    directory = tmp_path_factory.mktemp("cluster")
    api = KubeApi(directory)
    kubeconfig = directory / "kubeconfig"
    kubeconfig.write_text(json.dumps(api.kubeconfig()))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(progress, "POLL", 0.05)
        yield SimpleNamespace(api=api, values=("deploy.target=kubernetes", f"deploy.kubeconfig={kubeconfig}"))
    api.close()


@pytest.fixture(scope="module")
def deployed(folder, first, cluster):
    """A run whose Bento, served for real, is behind the cluster's service."""
    with serve(read(finetune(folder), "lineage.json")["bento"]) as url:
        cluster.api.responses[IMAGE] = url
        done = finetune(folder, *cluster.values, f"deploy.image={IMAGE}")
        done.url = url
        yield done


def lineage(name: str):
    return CliRunner().invoke(main, ["lineage", name], catch_exceptions=False)


def test_there_is_nothing_to_roll_back_before_anything_was_deployed(first):
    result = CliRunner().invoke(main, ["rollback"], catch_exceptions=False)
    assert result.exit_code == 1
    assert "no run has deployed anything yet" in result.output


def test_a_run_deploys_what_it_packaged_to_kubernetes(deployed, cluster):
    [deployment] = deployed.run.steps["deploy"].outputs["deployment"]
    outcome = deployment.load()
    assert (outcome["outcome"], outcome["image"], outcome["revision"]) == ("deployed", IMAGE, 1)
    assert outcome["bento"] == read(deployed, "lineage.json")["bento"]
    assert deployment.run_metadata["outcome"] == "deployed"
    assert cluster.api.running() == [IMAGE, IMAGE]


def test_the_annotations_of_a_pod_are_what_its_metadata_says(deployed, cluster):
    template = cluster.api.object("deployments")["spec"]["template"]["metadata"]
    metadata = requests.get(f"{deployed.url}/metadata", timeout=10).json()
    assert template["annotations"] == annotations(Lineage.from_json(metadata))
    assert metadata == read(deployed, "lineage.json")


def test_a_deployment_that_is_rolled_back_fails_the_run_in_one_line_and_is_recorded(folder, deployed, cluster):
    cluster.api.pod_states["other:2"] = "ErrImagePull"
    result = run_py(folder, *cluster.values, "deploy.image=other:2")
    assert result.exit_code == 1
    [line] = [line for line in result.output.splitlines() if line.startswith("Error: ")]
    for part in ("was not deployed", "image other:2: ErrImagePull", f"rolled back to {IMAGE}"):
        assert part in line
    newest = Client().list_artifact_versions(artifact="deployment", sort_by="desc:created", size=1).items[0]
    assert newest.load()["outcome"] == newest.run_metadata["outcome"] == "rolled_back"
    failed = Client().list_pipeline_runs(sort_by="desc:created", size=1).items[0]
    assert re.search(rf"rolled_back on .* by run {failed.id}", lineage(newest.run_metadata["bento"]).output)


def test_rollback_goes_back_where_the_last_deployment_was_made_and_is_recorded(folder, deployed, cluster):
    again = IMAGE.replace(":1", ":3")
    cluster.api.responses[again] = deployed.url
    finetune(folder, *cluster.values, f"deploy.image={again}")
    assert cluster.api.image() == again
    for image in (IMAGE, again):
        result = CliRunner().invoke(main, ["rollback"], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        assert f"image: {image}" in result.output
        assert cluster.api.running() == [image, image]
    assert "by hand: namespace gpt2-instruct" in lineage(read(deployed, "lineage.json")["bento"]).output


def test_no_token_is_in_the_store_or_in_the_outputs(folder, deployed):
    for place in (Path(os.environ["ZENML_CONFIG_PATH"]), folder):
        files = [path for path in place.rglob("*") if path.is_file()]
        assert files
        assert [path for path in files if TOKEN.encode() in path.read_bytes()] == []


def test_a_model_that_is_not_promoted_is_not_deployed_until_it_is(folder, deployed):
    values = ("deploy.require_stage=production", "promote.margin=-1.0")
    refused = run_py(folder, *values)
    assert refused.exit_code == 1
    built_by = read(deployed, "lineage.json")["model_version"]
    name, number = built_by.split("/")
    command = f"zenml model version update {name} {number} --stage production"
    for part in ("deploy.require_stage is production", f"{built_by} is in", "is in stage staging", command):
        assert part in refused.output
    CliRunner().invoke(cli, command.split()[1:], catch_exceptions=False)
    finetune(folder, *values)


def names_of(done) -> dict[str, str]:
    """All that a run can be asked for by."""
    about = read(done, "lineage.json")
    return {
        "run": done.run.name,
        "run's id": str(done.run.id),
        "model version": f"gpt2-instruct/{done.run.model_version.name}",
        "Bento": about["bento"],
        "adapter": about["adapter"]["sha256"],
        **{split: digest[:12] for split, digest in about["data"].items()},
    }


@pytest.mark.parametrize("kind", ["run", "run's id", "model version", "Bento", "adapter", "train", "val", "test"])
def test_lineage_leads_from_each_name_to_all_the_others(kind, deployed):
    result, about = lineage(names_of(deployed)[kind]), read(deployed, "lineage.json")
    assert result.exit_code == 0, result.output
    for part in (*names_of(deployed).values(), about["base"]["sha256"], about["commit"]["sha"], IMAGE, "revision 1"):
        assert part in result.output


def test_lineage_of_a_run_is_of_that_run_alone(first, again):
    output = lineage(first.run.name).output
    assert str(first.run.id) in output
    assert str(again.run.id) not in output


def test_lineage_says_what_came_from_the_cache_and_from_where(first, again):
    assert f"cached, of run {first.run.id}" in lineage(again.run.name).output


def test_a_name_that_nothing_has_is_an_error_with_examples_of_those_there_are(first):
    result = lineage("moon")
    assert result.exit_code == 1
    assert "nothing is called 'moon'" in result.output
    assert "(train records)" in result.output


def test_a_name_that_begins_several_is_an_error_with_all_of_them(first, again):
    result = lineage("finetune_pipeline-")
    assert result.exit_code == 1
    assert "give more of the one you mean" in result.output
    assert first.run.name in result.output
