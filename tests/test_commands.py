"""Run the README's commands in a fresh copy of the project, with an empty home folder."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from shutil import rmtree

import pytest
import requests

from tests.copies import copy_project, fresh_environment
from tests.helpers import free_port, is_ready, wait_until
from tests.s3 import keys, serve_s3

pytestmark = pytest.mark.timeout(1800)  # whole runs; a busy machine takes several times as long

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    return copy_project(tmp_path_factory.mktemp("project"))


@pytest.fixture(scope="module")
def environment(project, tmp_path_factory):
    return fresh_environment(project, tmp_path_factory.mktemp("home"))


@pytest.fixture(scope="module")
def shell(project, environment):
    """A function that runs a command of the README, with `extra` words behind it, and returns its output."""

    def run(command: str, extra: str = "", exit_code: int = 0) -> str:
        assert command in README
        # .venv is a link to this environment: make must not install into it
        words = shlex.split(f"{command} {extra}".replace("make ", "make -o .venv/.installed "))
        done = subprocess.run(words, cwd=project, env=environment, capture_output=True, text=True, timeout=1200)
        assert done.returncode == exit_code, done.stdout[-3000:] + done.stderr[-3000:]
        return re.sub(r"\x1b\[[0-9;]*m", "", done.stdout + done.stderr)  # without terminal colors

    return run


def latest(project: Path, name: str):
    return json.loads((project / "outputs" / "latest" / name).read_text())


def exact_match(project: Path) -> tuple[float, float]:
    metrics = latest(project, "metrics.json")
    return metrics["base"]["exact_match"], metrics["tuned"]["exact_match"]


@contextmanager
def process(arguments: list[str], project: Path, environment: dict[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    started = subprocess.Popen(
        arguments,
        cwd=project,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        yield started
    finally:
        if started.poll() is None:
            os.killpg(started.pid, signal.SIGTERM)
            started.wait(30)


@pytest.mark.slow
def test_the_dev_config_runs_with_the_zenml_command(shell, project):
    shell("zenml pipeline run finetune_pipeline -c configs/dev.yaml")
    assert latest(project, "metrics.json")["tuned"]


@pytest.mark.slow
def test_a_misspelled_key_stops_the_zenml_command_before_anything_runs(project, environment):
    bad = project / "mine.yaml"
    bad.write_text("parameters: {lora: {rnk: 4}}")
    command = ["zenml", "pipeline", "run", "finetune_pipeline", "-c", str(bad)]
    done = subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode != 0
    assert "mine.yaml" in done.stderr
    assert "did you mean 'rank'?" in done.stderr
    assert "Traceback" not in done.stdout + done.stderr


@pytest.mark.slow
def test_the_default_run_raises_exact_match_from_almost_nothing_to_most(shell, project):
    shell("make run")
    base, tuned = exact_match(project)
    assert base <= 0.05
    assert tuned >= 0.80


@pytest.mark.slow
def test_the_bare_zenml_command_is_the_same_run_and_uses_its_cache(shell, project):
    before = (project / "outputs" / "latest" / "lineage.json").read_bytes()
    output = shell("zenml pipeline run finetune_pipeline")
    assert len(set(re.findall(r"Using cached version of step `?(\w+)", output))) == 7
    assert (project / "outputs" / "latest" / "lineage.json").read_bytes() == before


@pytest.mark.slow
def test_the_server_gives_the_answers_of_samples_jsonl_and_accepts_the_readmes_curls(project, environment):
    port = free_port()
    curls = [block for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL) if "curl" in block]
    rows = [json.loads(line) for line in (project / "outputs" / "latest" / "samples.jsonl").read_text().splitlines()]
    url = f"http://127.0.0.1:{port}"
    serve = ["make", "-o", ".venv/.installed", "serve", f"PORT={port}"]
    with process(serve, project, environment):
        wait_until(lambda: is_ready(url), 120, "readiness of the server")
        for row in rows[:20]:
            body = {"instruction": row["instruction"], "input": row["input"]}
            assert requests.post(f"{url}/predict", json=body, timeout=60).json()["answer"] == row["tuned"]
        assert requests.get(f"{url}/metadata", timeout=10).json() == latest(project, "lineage.json")
        for block in curls:
            done = subprocess.run(
                ["bash", "-ec", block.replace("localhost:3000", f"127.0.0.1:{port}")], capture_output=True, text=True
            )
            assert done.returncode == 0, done.stderr
            assert '"error"' not in done.stdout


@pytest.mark.slow
def test_another_seed_gives_the_same_quality(shell, project):
    shell("python run.py finetune", "--set seed=1")
    base, tuned = exact_match(project)
    assert base <= 0.05
    assert tuned >= 0.80


@pytest.mark.slow
def test_lora_on_a_random_base_answers_almost_nothing(shell, project):
    shell("make run CONFIG=configs/random_base.yaml")
    _, tuned = exact_match(project)
    assert tuned <= 0.10


@pytest.mark.slow
def test_a_run_killed_during_training_resumes_from_the_artifact_store(project, environment, tmp_path):
    command = [sys.executable, "run.py", "finetune", "--config", "configs/dev.yaml"]
    command += ["--set", "train.epochs=40", "--set", "lora.rank=3"]
    with serve_s3("bucket") as url:
        register = f"from tests.s3 import register_stack; register_stack('s3', 's3://bucket/zenml', {url!r})"
        subprocess.run([sys.executable, "-c", register], cwd=project, env=environment, check=True)
        with process(command, project, environment | {"TMPDIR": str(tmp_path)}) as killed:

            def has_checkpoint() -> bool:
                assert killed.poll() is None, "the run ended before it could be killed"
                return any(name.endswith("checkpoint.safetensors") for name in keys(url, "bucket"))

            wait_until(has_checkpoint, 300, "a checkpoint")
            os.killpg(killed.pid, signal.SIGKILL)
            killed.wait()
        # nothing is left of the machine that ran it except ZenML's database
        rmtree(project / "outputs", ignore_errors=True)
        rmtree(tmp_path)
        done = subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr[-3000:]
        assert re.search(r"resuming from step \d+, ", done.stdout + done.stderr)
        assert not [name for name in keys(url, "bucket") if "checkpoints/" in name]
        resumed = latest(project, "lineage.json")["adapter"]["sha256"]

        command.append("--no-cache")
        subprocess.run(command, cwd=project, env=environment, capture_output=True, check=True, timeout=600)
        assert latest(project, "lineage.json")["adapter"]["sha256"] == resumed
        subprocess.run(["zenml", "stack", "set", "default"], cwd=project, env=environment, check=True)


def test_without_the_environment_the_command_says_how_to_get_it():
    done = subprocess.run([sys.executable, "-S", "run.py", "ask", "Hello?"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "make install" in done.stderr
