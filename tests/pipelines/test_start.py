"""The start of a run: defaults that depend on the base, runs whose process was killed, and stopping."""

import errno
import os
import pwd
import signal
import socket
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import psutil
import pytest
import yaml
from click.testing import CliRunner
from zenml.client import Client

import run
from deploy.containers import steps as containers
from pipelines.errors import ConfigError
from pipelines.finetune_pipeline import finetune_pipeline
from pipelines.interrupts import SECONDS, interruptible
from pipelines.processes import Process, fail_killed_runs
from pipelines.start import RunError, start
from tests.copies import ROOT
from tests.helpers import wait_until
from tests.runs import newest_run

pytestmark = pytest.mark.timeout(600)


@pytest.fixture
def started(monkeypatch):
    """Start a run whose pipeline is replaced; returns the configuration that the pipeline gets."""
    seen = {}

    class Recording:
        name, entrypoint = finetune_pipeline.name, staticmethod(finetune_pipeline.entrypoint)

        def with_options(self, config_path, extra, **options):
            seen.update(yaml.safe_load(Path(config_path).read_text()), extra=extra)
            return lambda: None

    def run(tmp_path, text, *assignments):
        (tmp_path / "mine.yaml").write_text(text)
        start(Recording(), str(tmp_path / "mine.yaml"), assignments)
        return seen

    return run


@pytest.mark.parametrize(
    ("text", "rate"),
    [
        ("parameters: {seed: 1}", 6e-3),
        ("", 6e-3),
        ("parameters:", 6e-3),
        ("parameters: {base: {source: hub, name: a/b}, train: {epochs: 1}}", 3e-4),
        ("parameters: {base: {source: hub, name: a/b}, train: {learning_rate: 0.5}}", 0.5),
    ],
)
def test_the_default_learning_rate_depends_on_the_base(started, tmp_path, text, rate):
    assert started(tmp_path, text)["parameters"]["train"]["learning_rate"] == rate


def test_values_of_the_command_line_reach_an_empty_parameters_key(started, tmp_path):
    assert started(tmp_path, "parameters:", "tracking.wandb=off", "seed=3")["parameters"]["tracking"]["wandb"] == "off"


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("experiments", "outputs/ uses itself"),
        ("latest", "outputs/ uses itself"),
        ("/some/where", "must be a directory name"),
        ("exp/1", "must be a directory name"),
        ("../elsewhere", "must be a directory name"),
        ("run-{dat}", r"only \{date\}, \{time\} and `substitutions` are replaced"),
        ("run-{", "'{'"),
        ("mine", "outputs/mine exists; use another name"),
    ],
)
def test_a_name_that_no_run_can_have_is_refused_before_anything_runs(started, tmp_path, monkeypatch, name, reason):
    monkeypatch.setenv("GPT2_INSTRUCT_OUTPUTS", str(tmp_path / "outputs"))
    (tmp_path / "outputs" / "mine").mkdir(parents=True)
    with pytest.raises(ConfigError, match=rf"mine\.yaml: run_name is .*{reason}"):
        started(tmp_path, f"run_name: '{name}'")


@pytest.mark.parametrize("name", ["latest", "staging", "production"])
def test_a_directory_where_a_run_makes_a_link_is_reported_before_anything_runs(started, tmp_path, monkeypatch, name):
    """As after copying outputs/ without its links."""
    monkeypatch.setenv("GPT2_INSTRUCT_OUTPUTS", str(tmp_path / "outputs"))
    (tmp_path / "outputs" / name).mkdir(parents=True)
    with pytest.raises(ConfigError, match=rf"outputs/{name} is a directory, but a run makes a link"):
        started(tmp_path, "")


def test_outputs_that_cannot_be_written_are_reported_before_anything_runs(started, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("GPT2_INSTRUCT_OUTPUTS", str(tmp_path / "file" / "outputs"))
    with pytest.raises(ConfigError, match=r"the results cannot be written: .*file/outputs"):
        started(tmp_path, "")


def test_a_store_of_bentos_whose_path_bentoml_would_expand_is_reported_before_anything_runs(
    started, tmp_path, monkeypatch
):
    """BentoML expands until nothing changes: with HOME=/a/$HOME it never ends."""
    monkeypatch.setenv("BENTOML_HOME", str(tmp_path / "$HOME" / "bentoml"))
    with pytest.raises(ConfigError, match=r"\$HOME/bentoml contains a variable; set BENTOML_HOME to"):
        started(tmp_path, "")


def test_a_full_disk_is_reported_with_the_places_that_a_run_writes(monkeypatch, tmp_path):
    monkeypatch.setenv("BENTOML_HOME", str(tmp_path))
    monkeypatch.setattr(finetune_pipeline, "with_options", fail_with(OSError(errno.ENOSPC, "No space left on device")))
    (tmp_path / "c.yaml").write_text("{}")
    with pytest.raises(RunError, match=rf"No space left on device; bytes free: .* BentoML's store \({tmp_path}\)$"):
        start(finetune_pipeline, str(tmp_path / "c.yaml"))


def fail_with(error: Exception):
    def fail(*_, **__):
        raise error

    return fail


def test_the_first_use_of_a_store_that_cannot_be_written_names_it_and_the_way_out(tmp_path):
    (tmp_path / "file").write_text("")
    environment = os.environ | {"ZENML_CONFIG_PATH": str(tmp_path / "file" / "zenml")}
    command = [sys.executable, "run.py", "lineage", "latest"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    assert f"Error: ZenML's store in {tmp_path}/file/zenml cannot be written" in done.stderr
    assert "set ZENML_CONFIG_PATH" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_project_that_cannot_be_written_is_not_reported_as_the_store(tmp_path):
    (tmp_path / ".zen" / "config.yaml").mkdir(parents=True)
    environment = os.environ | {"ZENML_REPOSITORY_PATH": str(tmp_path), "ZENML_CONFIG_PATH": str(tmp_path / "zenml")}
    command = [sys.executable, "run.py", "lineage", "latest"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    assert "Error: ZenML cannot write to the project: " in done.stderr
    assert f"'{tmp_path}/.zen/config.yaml'; run a copy of the project" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_user_without_a_home_directory_is_told_to_set_home(monkeypatch):
    """Such as `docker run --user 12345`."""
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", fail_with(KeyError()))
    done = CliRunner().invoke(run.main, ["lineage", "latest"])
    assert done.exit_code == 1
    assert done.stderr == "Error: this user has no home directory; set the environment variable HOME to a directory\n"


def test_commands_run_without_a_standard_output(tmp_path):
    command = f"exec {sys.executable} run.py finetune --config {tmp_path}/missing/c.yaml >&-"
    done = subprocess.run(["sh", "-c", command], cwd=ROOT, stderr=subprocess.PIPE, text=True, timeout=300)
    assert f"c.yaml does not exist; there is no directory {tmp_path}/missing" in done.stderr
    assert "Traceback" not in done.stderr


def test_placeholders_of_a_run_name_are_allowed(started, tmp_path):
    name = "GPT-2 {who} {date} {time}"
    assert started(tmp_path, f"run_name: '{name}'\nsubstitutions: {{who: me}}")["run_name"] == name


def test_the_run_records_commit_and_process(started, tmp_path):
    extra = started(tmp_path, "")["extra"]
    assert extra["commit"].keys() == {"sha", "dirty"}
    assert Process.from_json(extra["process"]) == Process.current()


def test_a_process_has_ended_if_its_id_is_unknown_or_used_again():
    ours = Process.current()
    assert not ours.has_ended()
    assert Process(ours.host, ours.pid, f"{ours.started}1").has_ended()
    assert Process(ours.host, max(psutil.pids()) + 100_000, ours.started).has_ended()
    assert not Process("another machine", 1, "").has_ended()


def test_a_process_has_not_ended_because_the_system_clock_was_set(monkeypatch):
    ours = Process.current()
    monkeypatch.setattr(psutil.Process, "create_time", lambda _: 0.0)  # on Linux, it depends on the clock
    assert not ours.has_ended()
    assert Process.current() == ours


def test_a_run_whose_process_was_killed_is_marked_as_failed_and_loses_its_containers(tmp_path, monkeypatch):
    script = tmp_path / "killed_pipeline.py"
    script.write_text(
        "import os, signal\n"
        "from zenml import pipeline, step\n"
        "from pipelines.processes import Process\n"
        "@step\ndef die() -> None:\n    os.kill(os.getpid(), signal.SIGKILL)\n"
        "@pipeline(extra={'process': Process.current().to_json()})\ndef killed() -> None:\n    die()\n"
        "if __name__ == '__main__':\n    killed()\n"
    )
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{tmp_path}", "ZENML_CUSTOM_SOURCE_ROOT": str(tmp_path)}
    done = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == -signal.SIGKILL, done.stderr
    [run] = Client().list_pipeline_runs(pipeline="killed", hydrate=True).items
    assert run.status.value == "running"

    removed = []
    monkeypatch.setattr(containers, "remove_run", removed.append)
    fail_killed_runs("killed")

    assert removed == [str(run.id)]
    run = Client().get_pipeline_run(run.id)
    assert run.status.value == "failed"
    assert {step.status.value for step in run.steps.values()} == {"failed"}
    assert run.config.extra["process"]["host"].split()[0] == socket.gethostname()


class InterruptedDestructor:
    def __del__(self):
        signal.raise_signal(signal.SIGTERM)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_signal_that_is_lost_in_a_destructor_comes_again():
    def lose_a_signal():
        InterruptedDestructor()
        for _ in range(300):
            time.sleep(0.1)

    with pytest.raises(KeyboardInterrupt), interruptible():
        lose_a_signal()


@pytest.mark.parametrize("handler", [lambda *_: None, signal.SIG_IGN], ids=["plain", "nohup"])
def test_a_closed_terminal_interrupts_a_run_unless_it_was_started_with_nohup(handler):
    interrupted = nullcontext() if handler is signal.SIG_IGN else pytest.raises(KeyboardInterrupt)
    before = signal.signal(signal.SIGHUP, handler)
    try:
        with interrupted, interruptible():
            signal.raise_signal(signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_an_interruption_does_not_interrupt_what_cleans_up_after_it():
    def be_stopped():
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            time.sleep(SECONDS + 1)
            raise KeyError

    with pytest.raises(KeyError), interruptible():
        be_stopped()


@pytest.mark.parametrize(
    "number",
    [
        signal.SIGTERM,
        pytest.param(signal.SIGINT, marks=pytest.mark.slow),
        pytest.param(signal.SIGHUP, marks=pytest.mark.slow),
    ],
)
def test_a_stopped_run_ends_with_one_line_and_leaves_nothing_behind(tmp_path, number):
    command = [sys.executable, "run.py", "finetune", "--config", "configs/dev.yaml"]
    command += ["--set", "base.pretrain.max_steps=10000", "--set", f"seed={number + 100}"]
    (tmp_path / "tmp").mkdir()
    environment = os.environ | {"TMPDIR": str(tmp_path / "tmp"), "PYTHONPATH": str(ROOT)}
    environment.pop("ZENML_LOGGING_VERBOSITY")
    log = tmp_path / "log"

    def do_not_ignore() -> None:  # as under nohup, where a run ignores SIGHUP
        signal.signal(number, signal.SIG_DFL)

    with log.open("w") as stream:
        run = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=stream, stderr=subprocess.STDOUT, preexec_fn=do_not_ignore
        )
        try:
            wait_until(lambda: run.poll() is not None or list((tmp_path / "tmp").glob("base-*")), 280, "pretraining")
            run.send_signal(number)
            assert run.wait(120) == 1, log.read_text()
        finally:
            run.kill()
    output = log.read_text()
    assert output.splitlines()[-1] == (
        "Error: the run was stopped; the same command continues after the last finished step"
    )
    assert "Traceback" not in output
    assert "Failed to run step" not in output
    assert list((tmp_path / "tmp").glob("base-*")) == []
    assert newest_run().status.value == "failed"
