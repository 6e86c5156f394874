"""Monitoring a real service of a real run: traffic like its evaluation is distinguished from other traffic."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated

import pytest
import requests
import yaml
from click.testing import CliRunner
from zenml import pipeline, step
from zenml.client import Client
from zenml.enums import StackComponentType

from gpt2core.prompt import format_prompt
from gpt2core.records import to_jsonl
from gpt2core.types import LoggedFeedback
from pipelines.errors import ConfigError
from pipelines.monitor_pipeline import monitor_pipeline
from pipelines.start import start
from run import main
from steps.config import MonitorConfig
from steps.metadata import attach_metadata
from steps.monitor import _served_run
from steps.traffic import Traffic
from tests.adapters.test_drift import completion
from tests.adapters.test_webhook import receiver
from tests.bentos.client import served
from tests.bentos.test_feedback import feedback_lines, send
from tests.copies import ROOT
from tests.helpers import wait_until
from tests.pipelines import file_alerter
from tests.runs import DEV, MAX_NEW_TOKENS, newest_run

pytestmark = pytest.mark.timeout(900)  # a whole run, and a service
OTHERS = [
    "Summarize the quarterly financial statement for our shareholders, then propose three follow-up questions.",
    "Translate into Swahili: the spacecraft re-entered Jupiter's magnetosphere at unprecedented velocity.",
    "Write a Python function which computes eigenvalues of sparse Hermitian matrices using Lanczos iterations.",
]


@pytest.fixture(scope="module")
def traffic(dev_run, tmp_path_factory):
    """A log of the run's test questions, and the same log with other questions and bad ratings after them."""
    log = tmp_path_factory.mktemp("traffic") / "requests.jsonl"
    environment = {"GPT2_REQUEST_LOG": log, "GPT2_REQUEST_LOG_TEXT": "keep", "GPT2_WEIGHTS": "fp32"}
    asked = [{key: sample[key] for key in ("instruction", "input")} for sample in dev_run.samples]
    others = [{"instruction": f"{text} Draft {i}."} for i in range(20) for text in OTHERS]
    with served(dev_run.lineage.bento, **environment) as url, requests.Session() as session:

        def ask(question: dict) -> str:
            body = question | {"max_new_tokens": MAX_NEW_TOKENS}
            return session.post(f"{url}/predict", json=body, timeout=60).headers["X-Request-Id"]

        for question in asked:
            ask(question)
        wait_until(lambda: log.read_bytes().count(b"\n") == len(asked), 20, "the lines of all requests")
        same = log.with_name("same.jsonl")
        same.write_bytes(log.read_bytes())
        ids = [ask(question) for question in others]
        for request_id in ids[:10]:
            assert send(url, request_id=request_id, rating="bad").ok
        wait_until(lambda: len(feedback_lines(log)) == 10, 20, "the lines of all ratings")
    return SimpleNamespace(same=same, other=log, asked=len(asked), others=len(others))


@pytest.fixture
def monitor(outputs, monkeypatch):
    """Run `run.py monitor`; returns its result and the directory of its report."""
    monkeypatch.setenv("GPT2_INSTRUCT_OUTPUTS", str(outputs))

    def run(log, *values):
        arguments = [part for value in (f"monitor.log={log}", *values) for part in ("--set", value)]
        result = CliRunner().invoke(main, ["monitor", *arguments], catch_exceptions=False)
        return result, outputs / "monitoring" / newest_run().name

    return run


def signals_of(directory) -> dict[str, dict]:
    return {signal["name"]: signal for signal in json.loads((directory / "drift.json").read_text())["signals"]}


def test_traffic_like_the_evaluation_is_no_drift_and_alerts_nobody(monitor, traffic, dev_run):
    with receiver() as (webhook, received):
        result, directory = monitor(traffic.same, f"monitor.webhook={webhook}")
    assert result.exit_code == 0, result.output
    assert f"No drift: {traffic.asked} completions of {dev_run.record.name}" in result.output
    assert received == []
    signals = signals_of(directory)
    assert not any(signal["drifted"] for signal in signals.values())
    # the service answers as the evaluated model did
    for name in ("prompt length", "unknown words", "similarity", "unfinished answers"):
        assert signals[name]["change"] == pytest.approx(0, abs=1e-9)
    page = (directory / "drift.html").read_text()
    assert str(directory / "drift.html") in result.output
    assert page == newest_run().steps["detect_drift"].outputs["drift_report"][0].load()
    assert "iframe" in page
    assert dev_run.samples[0]["instruction"] not in page  # no text of users


def test_other_traffic_is_drift_and_the_webhook_is_told(monitor, traffic, dev_run, monkeypatch):
    with receiver() as (webhook, received):
        monkeypatch.setenv("ALERTS", webhook)
        result, directory = monitor(traffic.other, f"monitor.max_requests={traffic.others}", "monitor.webhook=$ALERTS")
    assert result.exit_code == 0, result.output
    assert f"Drift of {dev_run.record.name} in {traffic.others} completions: " in result.output
    signals = signals_of(directory)
    drifted = {name for name, signal in signals.items() if signal["drifted"]}
    assert {"prompt length", "unknown words", "similarity", "ratings"} <= drifted
    assert signals["ratings"]["live"] == 1.0
    [message] = received
    assert message["drift"] == json.loads((directory / "drift.json").read_text())
    assert message["text"].startswith("Drift of ")
    assert newest_run().steps["alert"].outputs["alerted"][0].load() == ["webhook"]


def test_a_failing_webhook_fails_the_run_in_one_line_and_loses_no_report(monitor, traffic):
    with receiver(status=400) as (webhook, _):
        secret = f"monitor.webhook={webhook}/T0KEN"
        result, directory = monitor(traffic.other, f"monitor.max_requests={traffic.others}", secret)
    assert result.exit_code == 1
    last = result.output.splitlines()[-1]
    assert "http://127.0.0.1 answered 400" in last
    assert str(directory / "drift.html") in last
    assert "T0KEN" not in last
    assert json.loads((directory / "drift.json").read_text())["drifted"] is True
    assert newest_run().steps["detect_drift"].outputs["drift"][0].load().drifted


def test_a_run_whose_files_are_missing_is_named_with_a_way_out(monitor, traffic, dev_run):
    records = Path(dev_run.record.steps["split_data"].outputs["train_records"][0].uri)
    moved = records.rename(records.with_name("moved"))
    try:
        result, _ = monitor(traffic.same)
    finally:
        moved.rename(records)
    assert result.exit_code == 1
    last = result.output.splitlines()[-1]
    assert f"the files of the run {dev_run.record.name} cannot be read" in last
    assert "set monitor.run to the new run" in last


@step
def finetune() -> Annotated[str, "adapter"]:
    attach_metadata("adapter", {"sha256": "e" * 64})
    return "weights"


@pipeline
def only_finetune() -> None:
    finetune()


def test_an_adapter_from_the_cache_is_found_after_the_run_that_trained_it_was_deleted():
    trained, cached = only_finetune(), only_finetune()
    assert cached.steps["finetune"].status == "cached"
    traffic = Traffic([completion(adapter_sha256="e" * 64)])
    assert _served_run(traffic, MonitorConfig(log="a")).id == trained.id
    Client().delete_pipeline_run(trained.id)
    assert _served_run(traffic, MonitorConfig(log="a")).id == cached.id


def test_the_alerter_of_the_stack_is_told(monitor, traffic, tmp_path):
    client, before = Client(), Client().active_stack_model
    client.create_flavor(f"{file_alerter.__name__}.FileAlerterFlavor", StackComponentType.ALERTER)
    configuration = {"file": str(tmp_path / "alerts")}
    alerter = client.create_stack_component("to-file", "file", StackComponentType.ALERTER, configuration)
    components = {kind: found[0].id for kind, found in before.components.items()}
    stack = client.create_stack("with-alerter", components | {StackComponentType.ALERTER: alerter.id})
    client.activate_stack(stack.id)
    try:
        result, _ = monitor(traffic.other, f"monitor.max_requests={traffic.others}")
    finally:
        client.activate_stack(before.id)
    assert result.exit_code == 0, result.output
    assert "Drift of " in (tmp_path / "alerts").read_text()


@pytest.mark.slow
def test_the_cron_job_retrains_on_drift_and_only_then(traffic, dev_run, outputs, tmp_path):
    [_, cron_job] = yaml.safe_load_all((ROOT / "k8s" / "optional" / "retrain.yaml").read_text())
    [container] = cron_job["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"]
    log, records = tmp_path / "log" / "pod.jsonl", tmp_path / "records.jsonl"
    records.write_bytes(to_jsonl(dev_run.record.steps["fetch_data"].outputs["records"][0].load()))
    n_records = records.read_bytes().count(b"\n")
    log.parent.mkdir()
    settings = {"LOGS": log.parent, "RECORDS": records, "CONFIG": DEV, "GPT2_INSTRUCT_OUTPUTS": outputs}
    settings |= {"TMPDIR": tmp_path, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    assert {each["name"] for each in container["env"]} > settings.keys() - {"TMPDIR", "PATH"}

    def run_script() -> tuple[str, int]:
        environment = os.environ | {name: str(value) for name, value in settings.items()}
        done = subprocess.run(container["command"], cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout, Client().list_pipeline_runs(pipeline="finetune_pipeline").total

    n_runs = Client().list_pipeline_runs(pipeline="finetune_pipeline").total
    log.write_bytes(traffic.same.read_bytes())
    output, total = run_script()
    assert "No drift" in output
    assert total == n_runs
    first = json.loads(traffic.other.read_bytes().splitlines()[0])["request_id"]
    correction = LoggedFeedback("2026-01-01T00:00:00+00:00", first, "bad", "Ottawa")
    too_long = LoggedFeedback("2026-01-01T00:00:00+00:00", "long", "bad", "word " * 2000)  # longer than the context
    prompt = {"request_id": "long", "prompt": format_prompt("Write a very long answer.")}
    asked = json.loads(traffic.other.read_bytes().splitlines()[0]) | prompt
    log.write_bytes(traffic.other.read_bytes() + to_jsonl([asked, correction.to_json(), too_long.to_json()]))
    output, total = run_script()
    assert "Drift of " in output
    assert total == n_runs + 1
    assert newest_run().status == "completed"
    assert len(newest_run().steps["fetch_data"].outputs["records"][0].load()) == n_records
    assert '"Ottawa"' in records.read_text()  # instead of the record of the same question


@pytest.mark.parametrize(
    ("values", "text"),
    [
        (["monitor.log=none.jsonl"], "there is no request log none.jsonl"),
        (["monitor.run=nobody"], "there is no run 'nobody'"),
        (["monitor.min_requests=1000"], "Not decided: "),
        (["monitor.webhook=ftp://x"], "an http or https URL"),
        (["monitor.max_bad_rating=0.5"], "did you mean 'max_bad_ratings'?"),
    ],
)
def test_a_mistake_is_one_line(monitor, traffic, values, text):
    result, _ = monitor(traffic.same, *values)
    assert text in result.output
    assert "Traceback" not in result.output


def test_a_stack_without_what_the_config_needs_is_refused_before_the_run(tmp_path):
    config = tmp_path / "monitor.yaml"
    config.write_text("settings: {step_operator.container: {memory: 1g}}\n")
    with pytest.raises(ConfigError, match="does not have"):
        start(monitor_pipeline, str(config))
