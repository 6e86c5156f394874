"""The whole pipeline at dev size, in a ZenML store, a Bento store and an outputs directory of its own."""

import json
import logging
import os
import signal
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from shutil import copytree, rmtree

import pytest
import requests
from click.testing import CliRunner
from zenml.cli.cli import cli
from zenml.client import Client
from zenml.enums import ExecutionStatus

from deploy import bento
from deploy.kubernetes.render import annotations
from gpt2core.checkpoint import load_adapter, load_pretrained, save_pretrained
from gpt2core.config import GenerationConfig
from gpt2core.data import records_sha256, split_records
from gpt2core.demo.records import write_records
from gpt2core.demo.world import make_world
from gpt2core.evaluate import answer_text
from gpt2core.files import directory_sha256
from gpt2core.generate import generate
from gpt2core.metrics import METRICS, exact_match
from gpt2core.prompt import format_prompt
from gpt2core.tokenizer import load_tokenizer
from gpt2core.types import Lineage, TrainSummary
from run import main
from steps.outputs import RUN_ID
from tests.copies import ROOT
from tests.deploy import kube_api
from tests.deploy.kube_api import TOKEN
from tests.helpers import wait_until
from tests.runs import DEV, MAX_NEW_TOKENS, N_FACTS, finetune, invoke, newest_run

pytestmark = pytest.mark.timeout(900)  # whole runs; a busy machine takes several times as long
UNCACHED = {"compare", "promote", "deploy", "export_outputs"}
FILES = {"report.html", "report.json", "curves.html", "metrics.json", "samples.jsonl", "split.json", "lineage.json"}


@pytest.fixture(scope="module")
def other_rank(outputs, dev_run):
    """A run with another LoRA rank, tracked by wandb; its answers are as wrong as the base's."""
    return finetune(outputs, "lora.rank=2", "tracking.wandb=offline")


def test_every_step_completes_and_the_command_says_where_the_results_are(outputs, dev_run):
    assert dev_run.record.status == ExecutionStatus.COMPLETED
    assert {step.status for step in dev_run.record.steps.values()} == {ExecutionStatus.COMPLETED}
    assert f"{dev_run.record.name}: completed; results in {outputs / 'latest'}" in dev_run.output


def test_outputs_latest_links_to_the_files_of_the_run(dev_run):
    assert dev_run.directory.name == dev_run.record.name
    assert {path.name for path in dev_run.directory.iterdir()} == FILES | {"adapter", "base", "bento.txt", RUN_ID}


def test_a_second_run_of_the_same_name_is_one_line_and_the_first_keeps_its_directory(outputs, dev_run, tmp_path):
    config = tmp_path / "mine.yaml"
    config.write_text(f"run_name: {dev_run.record.name}\n{Path(DEV).read_text()}")
    result = invoke(outputs, config=str(config))
    [line] = [line for line in result.output.splitlines() if line]
    assert line.startswith(f"Error: {config}: run_name is {dev_run.record.name!r}, but a run in ZenML's store has")
    assert (dev_run.directory / "lineage.json").is_file()


def test_split_json_has_the_digest_and_size_of_each_part(dev_run):
    parts = split_records(write_records(make_world(0, N_FACTS), 0), 0)
    assert dev_run.read("split.json") == {
        name: {"sha256": records_sha256(part), "records": len(part), "in_train": None if name == "train" else 0}
        for name, part in parts._asdict().items()
    }


def test_the_answers_of_base_and_tuned_model_are_reproducible_from_the_outputs(dev_run):
    rows = dev_run.samples
    tokenizer, model = load_tokenizer(dev_run.directory / "base"), load_pretrained(dev_run.directory / "base")
    prompts = [tokenizer.encode_ordinary(format_prompt(row["instruction"], row["input"])) for row in rows]
    config = GenerationConfig(max_new_tokens=MAX_NEW_TOKENS, eos_id=tokenizer.eot_token)

    base = [answer_text(tokens, tokenizer) for tokens in generate(model, prompts, config)]
    load_adapter(model, dev_run.directory / "adapter")
    tuned = [answer_text(tokens, tokenizer) for tokens in generate(model, prompts, config)]

    assert base == [row["base"] for row in rows]
    assert tuned == [row["tuned"] for row in rows]
    assert base != tuned


def test_metrics_json_has_the_scores_of_the_samples(dev_run):
    rows, metrics = dev_run.samples, dev_run.read("metrics.json")
    for model in ("base", "tuned"):
        assert metrics[model].keys() == METRICS.keys()
        scores = [exact_match(row["output"], row[model]) for row in rows]
        assert metrics[model]["exact_match"] == pytest.approx(sum(scores) / len(scores))
    assert metrics["tuned"]["perplexity"] < metrics["base"]["perplexity"]
    assert metrics["train"].keys() == {field.name for field in fields(TrainSummary)}
    assert metrics["train"]["peak_memory_mib"] > 0


def test_lineage_json_identifies_run_code_data_base_adapter_and_bento(dev_run):
    lineage = dev_run.read("lineage.json")
    assert lineage["run"] == {"id": str(dev_run.record.id), "name": dev_run.record.name}
    assert lineage["commit"].keys() == {"sha", "dirty"}
    assert lineage["data"] == {name: part["sha256"] for name, part in dev_run.read("split.json").items()}
    assert lineage["base"]["sha256"] == dev_run.read("base/base.json")["sha256"]
    assert lineage["adapter"]["sha256"] == directory_sha256(dev_run.directory / "adapter")
    assert lineage["bento"] == (dev_run.directory / "bento.txt").read_text().strip()
    assert lineage["metrics"]["tuned"] == dev_run.read("metrics.json")["tuned"]
    assert "torch" in lineage["versions"]
    assert bento.exists(lineage["bento"])


def test_the_adapter_and_the_bento_have_a_model_card(dev_run):
    lineage, split = dev_run.read("lineage.json"), dev_run.read("split.json")
    adapter_card = (dev_run.directory / "adapter" / "README.md").read_text()
    assert f"train records | {split['train']['records']}, sha256 `{lineage['data']['train']}`" in adapter_card
    [card] = Path(os.environ["BENTOML_HOME"]).glob(f"bentos/{lineage['bento'].replace(':', '/')}/README.md")
    assert adapter_card.split("## Training")[1].strip() in card.read_text()
    assert f"On {split['test']['records']} test records" in card.read_text()


@pytest.mark.parametrize(
    ("step", "artifact", "keys"),
    [
        ("fetch_data", "records", {"source", "records", "duplicates", "sha256"}),
        ("split_data", "test_records", {"records", "sha256", "in_train"}),
        ("prepare_base", "base", {"sha256", "parameters", "corpus_tokens", "cloze_accuracy", "train_loss"}),
        ("finetune", "adapter", {"sha256", "loss", "val_loss", "tokens_seen", "tokens_per_second"}),
        ("evaluate", "metrics", {"base", "tuned"}),
        ("package", "bento", {"tag", "smoke_prompts"}),
        ("promote", "promotion", {"promoted", "reason", "model_version"}),
    ],
)
def test_artifacts_have_metadata_for_the_dashboard(dev_run, step, artifact, keys):
    [version] = dev_run.record.steps[step].outputs[artifact]
    assert keys <= version.run_metadata.keys()


def test_the_dashboard_shows_the_report_and_the_metrics(dev_run):
    [page] = dev_run.record.steps["report"].outputs["report"]
    assert page.load() == (dev_run.directory / "report.html").read_text()
    [metrics] = dev_run.record.steps["evaluate"].outputs["metrics"]
    assert [shown.type.value for shown in metrics.visualizations] == ["json"]


def test_an_unchanged_rerun_is_cached_and_keeps_its_bento(dev_run, cached_run):
    assert cached_run.record.steps.keys() - cached_run.cached == UNCACHED
    assert cached_run.directory != dev_run.directory
    for name in ("samples.jsonl", "lineage.json", "bento.txt"):
        assert (cached_run.directory / name).read_bytes() == (dev_run.directory / name).read_bytes()
    scores, again = dev_run.read("metrics.json"), cached_run.read("metrics.json")
    assert scores.pop("comparison")["tuned_vs_base"]["metric"] == "exact_match"
    assert again.pop("comparison")["tuned_vs_base"]["metric"] == "perplexity"
    assert scores == again


def test_another_rank_reuses_the_base_and_trains_another_adapter(dev_run, other_rank):
    assert other_rank.cached == {"fetch_data", "split_data", "prepare_base"}
    assert other_rank.lineage.adapter.sha256 != dev_run.lineage.adapter.sha256


def test_offline_tracking_writes_a_wandb_run(outputs, other_rank):
    assert list((outputs / "wandb").rglob("*.wandb"))


def test_a_model_that_is_not_better_than_its_base_is_not_promoted(other_rank):
    promotion = other_rank.record.steps["promote"].outputs["promotion"][0].load()
    assert promotion.promoted is False
    assert "not better than the base" in promotion.reason
    assert other_rank.record.model_version.stage is None


def test_a_model_that_beats_its_base_moves_to_staging(cached_run):
    promotion = cached_run.record.steps["promote"].outputs["promotion"][0].load()
    assert promotion.promoted is True
    assert cached_run.record.model_version.stage == "staging"


def test_a_worse_model_does_not_replace_the_champion(outputs, cached_run, caplog):
    callbacks = "zenml.utils.callback_registry"
    caplog.set_level("WARNING", callbacks)
    logging.getLogger(callbacks).addHandler(caplog.handler)  # ZenML replaces the root logger's
    worse = finetune(outputs, "train.limit_train_batches=1", "promote.metric=perplexity")
    assert "Failed to run callback" not in caplog.text  # ZenML deletes the champion's directories
    promotion = worse.record.steps["promote"].outputs["promotion"][0].load()
    comparison = worse.read("metrics.json")["comparison"]
    assert promotion.promoted is False
    assert comparison["tuned_vs_base"]["p_value"] < 0.05  # it is better than its base
    assert comparison["tuned_vs_base"]["difference"] < 0
    against = comparison["tuned_vs_champion"]
    assert against["difference"] > 0  # but its perplexity is higher than the champion's
    assert against["n"] == len(worse.samples)
    version = f"gpt2-instruct/{cached_run.record.model_version.name}"
    assert f"not shown to be as good as the champion: perplexity differs from {version}" in promotion.reason
    assert [row["champion"] for row in worse.samples] == [row["tuned"] for row in cached_run.samples]
    assert (outputs / "staging").resolve() == cached_run.directory
    # side by side, from their names
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GPT2_INSTRUCT_OUTPUTS", str(outputs))
        shown = CliRunner().invoke(main, ["compare", "staging", worse.record.name], catch_exceptions=False)
        unknown = CliRunner().invoke(main, ["compare", "staging", "no-run"], catch_exceptions=False)
    assert shown.exit_code == 0, shown.output
    limit = next(line.split() for line in shown.output.splitlines() if line.startswith("train.limit_train_batches"))
    assert limit[1:] == ["5", "1"]
    assert f"{worse.read('metrics.json')['tuned']['perplexity']:.4g} (" in shown.output
    assert f"{len(worse.samples)} test records in common" in shown.output
    assert worse.record.name in (outputs / "compare.html").read_text()
    assert "there is no run 'no-run'" in unknown.output
    # the champion itself again, from the cache: nothing changes
    again = finetune(outputs, "promote.metric=perplexity")
    assert again.record.steps.keys() - again.cached == UNCACHED
    assert (again.directory / "report.html").read_bytes() == (cached_run.directory / "report.html").read_bytes()
    assert "nothing changes" in again.record.steps["promote"].outputs["promotion"][0].load().reason
    assert (outputs / "staging").resolve() == cached_run.directory


def test_a_missing_bento_is_built_again(outputs, other_rank):
    name, version = other_rank.lineage.bento.split(":")
    rmtree(Path(os.environ["BENTOML_HOME"]) / "bentos" / name / version)
    run = finetune(outputs, "lora.rank=2", "tracking.wandb=offline")
    assert "package" not in run.cached
    assert {"finetune", "evaluate"} <= run.cached
    assert bento.exists(run.lineage.bento)


def test_the_promoted_run_is_found_at_outputs_staging(outputs, dev_run, cached_run, other_rank):
    assert (outputs / "staging").resolve() == cached_run.directory
    instruction = cached_run.samples[0]["instruction"]
    assert ask(outputs, instruction, "--run", "staging").exit_code == 0


def test_a_missing_stage_link_is_repaired_by_a_run_of_the_same_model(outputs, cached_run):
    link = outputs / "staging"
    link.unlink()
    again = finetune(outputs, "promote.metric=perplexity")
    repaired = link.resolve()
    point_to(link, cached_run)
    assert repaired == again.directory


def test_a_stage_changed_in_zenml_rejects_the_old_link_until_its_run_is_repeated(outputs, cached_run, other_rank):
    link = outputs / "staging"
    before, after = (
        Client().get_model_version("gpt2-instruct", run.record.model_version.name) for run in (cached_run, other_rank)
    )
    after.set_stage("staging", force=True)
    try:
        done = ask(outputs, "Hello?", "--run", "staging")
        again = finetune(outputs, "lora.rank=2", "tracking.wandb=offline")
        repaired = link.resolve()
    finally:
        after.set_stage("none")
        before.set_stage("staging", force=True)
        point_to(link, cached_run)
    assert done.exit_code == 1
    assert f"is the run {cached_run.record.name}" in done.output
    adapter = other_rank.lineage.adapter.sha256[:12]
    assert f"gpt2-instruct/{after.name} in stage staging has the adapter {adapter}" in done.output
    assert repaired == again.directory


def point_to(link, run):
    link.unlink(missing_ok=True)
    link.symlink_to(run.directory.name)


def ask(outputs, *arguments):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GPT2_INSTRUCT_OUTPUTS", str(outputs))
        limit = ("--max-new-tokens", str(MAX_NEW_TOKENS))
        return CliRunner().invoke(main, ["ask", *arguments, *limit], catch_exceptions=False)


def test_too_few_records_fail_before_pretraining(outputs, tmp_path):
    file = tmp_path / "one.json"
    file.write_text(json.dumps([{"instruction": "Say yes.", "output": "yes"}]))
    result = invoke(outputs, "data.source=file", f"data.path={file}", "seed=4")
    assert result.exit_code == 1
    assert "prepare_base" not in newest_run().steps


def test_patience_without_validation_records_in_the_file_fails_before_pretraining(outputs, tmp_path):
    file = tmp_path / "few.json"
    file.write_text(json.dumps([{"instruction": f"Say {i}.", "output": str(i)} for i in range(8)]))
    result = invoke(outputs, "data.source=file", f"data.path={file}", "train.patience=3", "seed=5")
    assert "train.patience is 3, but there are no validation records" in result.output
    assert "prepare_base" not in newest_run().steps


def test_a_file_of_records_is_read_in_every_run(outputs, dev_run, tmp_path):
    file = tmp_path / "mine.jsonl"
    values = ("data.source=file", f"data.path={file}", f"data.n_facts={N_FACTS}")
    file.write_text("\n".join(map(json.dumps, write_records(make_world(0, N_FACTS), 0))))
    run = finetune(outputs, *values)
    assert {"finetune", "evaluate"} <= run.cached  # the same records as the bundled ones
    file.write_text("no records")
    result = invoke(outputs, *values)
    assert result.exit_code == 1
    assert str(file) in result.output


def test_a_base_from_a_directory_travels_as_a_reference(outputs, dev_run):
    values = ("base.source=hub", f"base.name={dev_run.directory / 'base'}", f"base.revision={'a' * 40}")
    run = finetune(outputs, *values)
    assert run.lineage.base.revision == ""  # a directory has none
    assert (run.directory / "base").is_symlink()
    reference = run.read("base.json")
    assert reference["name"] == str(dev_run.directory / "base")
    assert [row["base"] for row in run.samples] == [row["base"] for row in dev_run.samples]
    assert run.read("lineage.json")["base"] == {key: reference[key] for key in ("name", "revision", "sha256")}
    # `ask` and the README's library example work as with any other base
    done = ask(outputs, run.samples[0]["instruction"], "--input", run.samples[0]["input"])
    assert done.output == run.samples[0]["tuned"] + "\n"
    load_adapter(load_pretrained(run.directory / "base"), run.directory / "adapter")


def test_a_base_directory_that_changed_is_used_and_an_unchanged_one_is_cached(outputs, dev_run, tmp_path, monkeypatch):
    copytree(dev_run.directory / "base", tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    values = ("base.source=hub", "base.name=base")
    config = str(ROOT / DEV)
    assert invoke(outputs, *values, config=config).exit_code == 0
    first = Lineage.from_json_file(outputs / "latest" / "lineage.json")
    assert first.base.name == str(tmp_path / "base")

    again = invoke(outputs, *values, config=config)
    assert again.exit_code == 0, again.output
    steps = newest_run().steps
    ran = {name for name, step in steps.items() if step.status != ExecutionStatus.CACHED}
    assert ran == UNCACHED

    model = load_pretrained(tmp_path / "base")
    model.wte.weight.data.mul_(1.01)
    save_pretrained(model, tmp_path / "base")
    changed = invoke(outputs, *values, config=config)
    assert changed.exit_code == 0, changed.output
    assert Lineage.from_json_file(outputs / "latest" / "lineage.json").base.sha256 != first.base.sha256


def test_rollback_without_a_deployment_is_an_error(dev_run):
    if Client().list_artifact_versions(artifact="deployment", size=1).total and _deployed_before():
        pytest.skip("another test deployed already")
    result = CliRunner().invoke(main, ["rollback"], catch_exceptions=False)
    assert result.exit_code == 1
    assert "no run has deployed anything yet" in result.output


def _deployed_before() -> bool:
    versions = Client().list_artifact_versions(artifact="deployment", size=1000).items
    return any(version.run_metadata.get("target") not in (None, "none") for version in versions)


def test_a_run_deploys_its_bento_to_kubernetes(deployed, cluster):
    [deployment] = deployed.run.record.steps["deploy"].outputs["deployment"]
    about = deployment.run_metadata
    assert (about["outcome"], about["image"], about["revision"]) == ("deployed", cluster.image, 1)
    assert about["bento"] == deployed.run.lineage.bento
    assert cluster.api.running() == [cluster.image, cluster.image]


def test_a_pods_annotations_match_its_metadata(deployed, cluster):
    template = cluster.api.object("deployments")["spec"]["template"]["metadata"]
    metadata = requests.get(f"{deployed.url}/metadata", timeout=10).json()
    assert template["annotations"] == annotations(Lineage.from_json(metadata))
    assert metadata == deployed.run.read("lineage.json")


def test_a_deployment_that_is_rolled_back_fails_the_run_in_one_line_and_is_recorded(outputs, deployed, cluster):
    cluster.api.pod_states["other:2"] = "ErrImagePull"
    result = invoke(outputs, *cluster.values, "deploy.image=other:2")
    assert result.exit_code == 1
    [line] = [line for line in result.output.splitlines() if line.startswith("Error: ")]
    for part in ("was not deployed", "image other:2: ErrImagePull", f"rolled back to {cluster.image}"):
        assert part in line
    newest = Client().list_artifact_versions(artifact="deployment", sort_by="desc:created", size=1).items[0]
    assert newest.run_metadata["outcome"] == "rolled_back"
    assert newest.run_metadata["run"] == str(newest_run().id)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_run_interrupted_during_its_rollout_is_rolled_back_and_recorded(
    outputs, deployed, cluster, tmp_path, monkeypatch, number
):
    monkeypatch.setattr(kube_api, "DEADLINE", 10_000)
    image = f"waiting:{number.value}"
    cluster.api.pod_states[image] = "unschedulable"
    values = [part for value in (*cluster.values, f"deploy.image={image}") for part in ("--set", value)]
    environment = os.environ | {"GPT2_INSTRUCT_OUTPUTS": str(outputs), "PYTHONPATH": str(ROOT)}
    environment.pop("ZENML_LOGGING_VERBOSITY")
    log = tmp_path / "log"
    with log.open("w") as stream:
        command = [sys.executable, "run.py", "finetune", "--config", DEV, *values]
        run = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=stream, stderr=subprocess.STDOUT)
        try:
            wait_until(lambda: run.poll() is not None or "Insufficient cpu" in log.read_text(), 280, "the rollout")
            run.send_signal(number)
            assert run.wait(120) == 1, log.read_text()
        finally:
            run.kill()
    output = log.read_text()
    assert output.splitlines()[-1].startswith("Error: the run was stopped")
    assert f"\nrolled back to {cluster.image}, now revision" in output
    assert "Traceback" not in output
    assert cluster.api.running() == [cluster.image] * 2
    newest = Client().list_artifact_versions(artifact="deployment", sort_by="desc:created", size=1).items[0]
    assert newest.run_metadata["outcome"] == "rolled_back"
    assert newest.run_metadata["run"] == str(newest_run().id)


def test_rollback_restores_the_version_before_and_is_recorded(outputs, deployed, cluster):
    image = cluster.image.replace(":1", ":3")
    cluster.api.responses[image] = deployed.url
    finetune(outputs, *cluster.values, f"deploy.image={image}")
    assert cluster.api.image() == image
    for expected in (cluster.image, image):
        result = CliRunner().invoke(main, ["rollback"], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        assert f"image: {expected}" in result.output
        assert cluster.api.running() == [expected, expected]
    lineage = CliRunner().invoke(main, ["lineage", deployed.run.lineage.bento], catch_exceptions=False)
    assert "manually: namespace gpt2-instruct" in lineage.output


def test_no_token_is_in_the_store_or_in_the_outputs(outputs, deployed):
    for directory in (Path(os.environ["ZENML_CONFIG_PATH"]), outputs):
        files = [path for path in directory.rglob("*") if path.is_file()]
        assert files
        assert [path for path in files if TOKEN.encode() in path.read_bytes()] == []


def test_a_required_stage_stops_the_deployment_until_the_model_is_promoted(outputs, deployed):
    values = ("deploy.require_stage=production",)
    refused = invoke(outputs, *values)
    assert refused.exit_code == 1
    built_by = deployed.run.lineage.model_version
    name, number = built_by.split("/")
    command = f"zenml model version update {name} {number} --stage production"
    for part in ("deploy.require_stage is production", f"{built_by} is in", "is in stage staging", command):
        assert part in refused.output
    CliRunner().invoke(cli, command.split()[1:], catch_exceptions=False)
    finetune(outputs, *values)
