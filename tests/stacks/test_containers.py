"""Steps in containers of a real engine, with the stacks and configurations of the project, at dev size."""

import json
import logging
import os
import signal
import subprocess
from contextlib import suppress
from pathlib import Path
from uuid import uuid4

import pytest
import yaml

from deploy.containers import images, steps
from deploy.containers.client import EngineError, connect
from deploy.containers.steps import StepContainer
from deploy.server import serve
from deploy.verify import request_answer
from tests.copies import copy_project, fresh_environment
from tests.helpers import wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

IMAGE = "gpt2-instruct-steps:latest"
LONG = ("train.epochs=40", "lora.rank=3")  # 200 training steps, with a checkpoint after every fifth
TIMEOUT = 1500  # seconds; a run takes about 90 on an idle machine


@pytest.fixture(scope="module", autouse=True)
def steps_image():
    try:
        with connect():
            pass
    except EngineError as error:
        pytest.skip(str(error))
    images.build_steps()


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    copy = copy_project(tmp_path_factory.mktemp("project"))
    identity = ["-c", "user.name=tests", "-c", "user.email=tests@example.com"]
    for words in (["init", "--quiet"], ["add", "--all"], [*identity, "commit", "--quiet", "--message", "a copy"]):
        subprocess.run(["git", *words], cwd=copy, check=True)
    (copy / "bentos" / ".env").write_text("A=1\n")  # ignored by git, so it is not in the code of the containers
    parameters = yaml.safe_load((copy / "configs" / "dev.yaml").read_text())["parameters"]
    for name in ("docker", "docker_gpu_step"):
        config = yaml.safe_load((copy / "configs" / f"{name}.yaml").read_text())
        (copy / f"{name}.yaml").write_text(yaml.safe_dump(config | {"parameters": parameters}))
    return copy


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def start(project, home):
    """Start a command in the project; it is interrupted if it still runs after the tests."""
    started: list[subprocess.Popen[str]] = []

    def start(*words: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            words,
            cwd=project,
            env=fresh_environment(project, home),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            # a background job of a shell ignores SIGINT, and its child processes inherit that
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
            process.communicate(timeout=TIMEOUT)


@pytest.fixture(scope="module")
def run(start):
    """Run a command; return its exit code and output."""

    def run(*words: str) -> tuple[int, str]:
        process = start(*words)
        output, _ = process.communicate(timeout=TIMEOUT)
        return process.returncode, output

    return run


@pytest.fixture
def stack(run):
    def activate(name: str) -> None:
        code, output = run("make", "-o", ".venv/.installed", f"stack-{name}")
        assert code == 0, output
        assert output.endswith(f"the stack {name} is registered and active\n")

    return activate


def finetune(config: str, *values: str) -> list[str]:
    return ["python", "run.py", "finetune", "--config", config, *(part for v in values for part in ("--set", v))]


def containers(home: Path) -> list:
    """The containers that mount this test's home directory, running or not."""
    with connect() as client:
        every = client.containers.list(all=True, ignore_removed=True)
    return [c for c in every if any(mount["Source"].startswith(str(home)) for mount in c.attrs["Mounts"])]


def running(home: Path) -> list:
    return [container for container in containers(home) if container.status == "running"]


def wait_while_running(process: subprocess.Popen[str], condition, what: str) -> None:
    """Wait for the condition; fail with the output of the process if it ends before."""

    def holds() -> bool:
        found = condition()
        assert found or process.poll() is None, process.communicate()[0][-3000:]
        return bool(found)

    wait_until(holds, TIMEOUT, what)


def newest_run(run) -> dict:
    _, output = run("zenml", "pipeline", "runs", "list", "--output=json", "--sort_by=desc:created", "--size=1")
    return json.loads(output[output.index("{") :])["items"][0]


def lineage(project: Path) -> dict:
    return json.loads((project / "outputs" / "latest" / "lineage.json").read_text())


def test_a_run_with_every_step_in_a_container_has_the_results_of_a_run_without(project, home, run, stack, monkeypatch):
    stack("docker")
    code, output = run("zenml", "pipeline", "run", "finetune_pipeline", "-c", "docker.yaml")
    assert code == 0, output[-3000:]
    assert output.count(" in a container:") == 11
    assert containers(home) == []

    folder = project / "outputs" / "latest"
    assert {"report.html", "metrics.json", "adapter", "base", "bento.txt"} <= {path.name for path in folder.iterdir()}
    assert {path.stat().st_uid for path in folder.rglob("*")} == {os.getuid()}
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=project, capture_output=True, text=True).stdout.strip()
    assert lineage(project)["commit"]["sha"] == head  # containers have no git
    row = json.loads((folder / "samples.jsonl").read_text().splitlines()[-1])
    monkeypatch.setenv("BENTOML_HOME", str(home / "bentoml"))
    with serve((folder / "bento.txt").read_text().strip()) as url:
        assert request_answer(url, row["instruction"], row["input"], 12) == row["tuned"]


def test_a_killed_container_fails_the_run_with_its_last_lines_and_the_next_run_resumes(
    project, home, run, start, stack
):
    stack("local")
    stores = home / ".config" / "zenml" / "local_stores"
    process = start(*finetune("docker_gpu_step.yaml", *LONG))
    wait_while_running(process, lambda: running(home), "a container")
    wait_while_running(process, lambda: list(stores.rglob("checkpoint.safetensors")), "a checkpoint")
    [container] = running(home)
    assert container.labels[f"{steps.NAME}.step"] == "finetune"
    container.kill()
    output, _ = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 1
    error = output[output.index("Error: the run failed") :]
    assert "exit code 137. Its last lines:" in error
    assert "Code download finished." in error
    assert "Traceback" not in output
    assert containers(home) == []
    assert newest_run(run)["status"] == "failed"

    code, output = run(*finetune("docker_gpu_step.yaml", *LONG))
    assert code == 0, output[-3000:]
    assert "resuming from step" in output
    adapter = lineage(project)["adapter"]["sha256"]
    code, output = run(*finetune("configs/dev.yaml", *LONG), "--no-cache")  # not in a container, and not interrupted
    assert code == 0, output[-3000:]
    assert lineage(project)["adapter"]["sha256"] == adapter


@pytest.mark.parametrize(
    ("name", "config", "number"),
    [
        ("docker", "docker.yaml", signal.SIGINT),
        ("docker", "docker.yaml", signal.SIGTERM),
        ("local", "docker_gpu_step.yaml", signal.SIGINT),
    ],
)
def test_an_interrupted_run_leaves_no_container(home, start, run, stack, name, config, number):
    stack(name)
    process = start(*finetune(config, "lora.rank=5", "train.epochs=400"))
    wait_while_running(process, lambda: running(home), "a container")
    process.send_signal(number)
    output, _ = process.communicate(timeout=TIMEOUT)
    assert process.returncode != 0
    assert containers(home) == [], output[-3000:]
    assert newest_run(run)["status"] in ("failed", "stopped")


def test_the_container_of_a_killed_run_is_removed_when_the_next_one_starts(home, start, run, stack):
    stack("docker")
    process = start(*finetune("docker.yaml", "lora.rank=6", "train.epochs=400"))
    wait_while_running(process, lambda: running(home), "a container")
    process.kill()
    process.communicate(timeout=TIMEOUT)
    assert running(home)
    code, output = run("python", "-c", NEXT_START)
    assert code == 0, output[-3000:]
    assert containers(home) == []
    assert newest_run(run)["status"] == "failed"


NEXT_START = "from pipelines.processes import fail_killed_runs; fail_killed_runs('finetune_pipeline')"


PROBE = """
import os, socket
status = dict(line.split(":\\t") for line in open("/proc/self/status").read().splitlines() if ":\\t" in line)
print("uid", os.getuid(), "capabilities", status["CapEff"], "new privileges", status["NoNewPrivs"])
for place in ("/", "/etc", "/opt/venv", "/tmp", "/app", os.environ["SEEN"], os.environ["KEPT"]):
    try:
        open(place + "/probe", "w").close()
        print("can write", place)
    except OSError as error:
        print("cannot write", place)
try:
    socket.create_connection(("192.0.2.1", 80), timeout=3)
except OSError as error:
    print("network", error.strerror)
"""


@pytest.fixture
def probe(tmp_path):
    """A container with one readable and one writable directory, and no network."""
    seen, kept = tmp_path / "seen", tmp_path / "kept"
    seen.mkdir()
    kept.mkdir()

    def make(code: str, image: str = IMAGE, memory: str = "1g") -> StepContainer:
        return StepContainer(
            image=image,
            command=["python", "-c", code],
            run_id=uuid4().hex,
            step="probe",
            environment={"SEEN": str(seen), "KEPT": str(kept)},
            readable=[seen],
            writable=[kept],
            memory=memory,
        )

    return make


def test_a_container_has_only_the_rights_that_a_step_needs(probe, tmp_path, caplog):
    caplog.set_level("INFO", logger=steps.__name__)
    steps.run(probe(PROBE))
    assert caplog.messages == [
        f"uid {os.getuid()} capabilities 0000000000000000 new privileges 1",
        "cannot write /",
        "cannot write /etc",
        "cannot write /opt/venv",
        "can write /tmp",
        "can write /app",
        f"cannot write {tmp_path}/seen",
        f"can write {tmp_path}/kept",
        "network Network is unreachable",
    ]


def test_a_container_in_the_background_is_found_followed_and_removed(probe, caplog):
    caplog.set_level("INFO", logger=steps.__name__)
    waiting = probe("import time; time.sleep(600)")
    steps.start(waiting)
    assert steps.is_running(waiting.run_id, waiting.step)
    steps.remove(waiting.run_id, waiting.step)
    assert not steps.is_running(waiting.run_id, waiting.step)

    printing = probe("print('done')")
    steps.start(printing)
    steps.follow(printing.run_id, printing.step)
    assert caplog.messages == ["done"]
    steps.follow(printing.run_id, printing.step)  # it was removed: nothing to follow


def test_an_interrupt_that_python_drops_ends_the_container_nevertheless(probe):
    waiting = probe("for i in range(600): print(i, flush=True); __import__('time').sleep(0.1)")

    class Dropping(logging.Handler):
        def emit(self, record):
            """Interrupt this process where no exception can be raised."""
            with suppress(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)

    dropping = Dropping()
    logger = logging.getLogger(steps.__name__)
    logger.addHandler(dropping)
    logger.setLevel("INFO")
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        with pytest.raises(KeyboardInterrupt):
            steps.run(waiting)
    finally:
        signal.signal(signal.SIGINT, before)
        logger.removeHandler(dropping)
        logger.setLevel(logging.NOTSET)
    assert not steps.is_running(waiting.run_id, waiting.step)


def test_a_container_that_exceeds_its_memory_limit_says_so(probe):
    with pytest.raises(EngineError, match=r"(?s)exceeded its memory limit.*before"):
        steps.run(probe("print('before'); bytearray(10**9)", memory="64m"))


def test_a_missing_image_is_named_with_the_command_that_builds_it(probe):
    with pytest.raises(EngineError, match="no image nobody/made-this:1: `make image-train` builds"):
        steps.start(probe("", image="nobody/made-this:1"))
