"""Steps in containers of a real engine, by the stacks and configs of the project, at dev size."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
import yaml

from deploy.containers import client as engine
from deploy.containers import images as image
from deploy.server import serve
from deploy.verify import request_answer
from tests.copies import copy_project, fresh_environment

pytestmark = pytest.mark.slow

IMAGE = "gpt2-instruct-steps:latest"
LONG = ("train.epochs=40", "lora.rank=3")  # 200 steps, with a checkpoint after each five


@pytest.fixture(scope="module", autouse=True)
def steps_image():
    try:
        engine.connect()
    except engine.EngineError as error:
        pytest.skip(str(error))
    image.build_steps()


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    copy = copy_project(tmp_path_factory.mktemp("project"))
    identity = ["-c", "user.name=tests", "-c", "user.email=tests@example.com"]
    for words in (["init", "--quiet"], ["add", "--all"], [*identity, "commit", "--quiet", "--message", "a copy"]):
        subprocess.run(["git", *words], cwd=copy, check=True)
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
    """Start a command in the project; it is interrupted if the tests are done before it is."""
    started: list[subprocess.Popen[str]] = []

    def start(*words: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            words,
            cwd=project,
            env=fresh_environment(project, home),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            # a shell's background job ignores SIGINT, and so would what it starts
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
            process.communicate(timeout=60)


@pytest.fixture(scope="module")
def run(start):
    """Run it to its end: exit code and output."""

    def run(*words: str) -> tuple[int, str]:
        process = start(*words)
        output, _ = process.communicate(timeout=600)
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
    """Those that see this test's home, running or not."""
    everyone = engine.connect().containers.list(all=True, ignore_removed=True)
    return [c for c in everyone if any(mount["Source"].startswith(str(home)) for mount in c.attrs["Mounts"])]


def wait_for(process: subprocess.Popen[str], condition):
    for _ in range(3000):
        if found := condition():
            return found
        assert process.poll() is None, process.communicate()[0][-3000:]
        time.sleep(0.1)
    raise TimeoutError


def newest_run(run) -> dict:
    _, output = run("zenml", "pipeline", "runs", "list", "--output=json", "--sort_by=desc:created", "--size=1")
    return json.loads(output[output.index("{") :])["items"][0]


def lineage(project: Path) -> dict:
    return json.loads((project / "outputs" / "latest" / "lineage.json").read_text())


def test_a_run_with_every_step_in_a_container_leaves_what_a_run_without_leaves(project, home, run, stack, monkeypatch):
    stack("docker")
    code, output = run("zenml", "pipeline", "run", "finetune_pipeline", "-c", "docker.yaml")
    assert code == 0, output[-3000:]
    assert output.count(" in Docker:") == 10
    assert containers(home) == []

    folder = project / "outputs" / "latest"
    assert {"report.html", "metrics.json", "adapter", "base", "bento.txt"} <= {path.name for path in folder.iterdir()}
    assert {path.stat().st_uid for path in folder.rglob("*")} == {os.getuid()}
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=project, capture_output=True, text=True).stdout.strip()
    assert lineage(project)["commit"]["sha"] == head  # which no container could see
    row = json.loads((folder / "samples.jsonl").read_text().splitlines()[-1])
    monkeypatch.setenv("BENTOML_HOME", str(home / "bentoml"))
    with serve((folder / "bento.txt").read_text().strip()) as url:
        assert request_answer(url, row["instruction"], row["input"], 12) == row["tuned"]


def test_a_killed_container_fails_the_run_with_its_last_words_and_its_successor_goes_on(
    project, home, run, start, stack
):
    stack("local")
    stores = home / ".config" / "zenml" / "local_stores"
    process = start(*finetune("docker_gpu_step.yaml", *LONG))
    [container] = wait_for(process, lambda: [c for c in containers(home) if c.status == "running"])
    assert container.labels[f"{engine.NAME}.step"] == "finetune"
    wait_for(process, lambda: list(stores.rglob("checkpoint.safetensors")))
    container.kill()
    output, _ = process.communicate(timeout=60)
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
    code, output = run(*finetune("configs/dev.yaml", *LONG), "--no-cache")  # here, and not stopped
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
    wait_for(process, lambda: [c for c in containers(home) if c.status == "running"])
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode != 0
    assert containers(home) == [], output[-3000:]
    assert newest_run(run)["status"] in ("failed", "stopped")


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


def arguments(tmp_path: Path, **changes) -> dict:
    seen, kept = tmp_path / "seen", tmp_path / "kept"
    seen.mkdir()
    kept.mkdir()
    values = {"network": "none", "memory": "1g", "readable": [seen], "writable": [kept], "environment": {}} | changes
    values["environment"] |= {"SEEN": str(seen), "KEPT": str(kept)}
    return engine.run_arguments(**values)


def test_a_container_may_do_what_a_step_needs_and_no_more(tmp_path, caplog):
    caplog.set_level("INFO", logger=engine.__name__)
    engine.follow(engine.start(IMAGE, ["python", "-c", PROBE], arguments(tmp_path), "a-run", "probe"))
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


def test_a_container_that_needs_more_memory_than_it_may_have_says_so(tmp_path):
    command = ["python", "-c", "print('before'); bytearray(10**9)"]
    with pytest.raises(engine.EngineError, match=r"(?s)needed more memory than it may have.*before"):
        engine.follow(engine.start(IMAGE, command, arguments(tmp_path, memory="64m"), "a-run", "large"))


def test_an_image_that_is_not_there_is_named_with_what_builds_it(tmp_path):
    with pytest.raises(engine.EngineError, match="no image nobody/made-this:1: `make image-train` builds"):
        engine.start("nobody/made-this:1", ["python"], arguments(tmp_path), "a-run", "none")
