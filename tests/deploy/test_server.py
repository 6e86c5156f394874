"""Serving a Bento in a child process. What the service responds is tests/bentos'."""

import os
import re
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import requests

from deploy import bento
from deploy.bento import BentoError
from deploy.server import SUPERVISED, serve, service_environment, verify_bento
from deploy.verify import VerificationError, request_answer
from tests.deploy.test_bento import in_store
from tests.helpers import build_bento, free_port, make_sample, wait_until

SAMPLE = make_sample("Hello.", tuned="something else")


@pytest.fixture(scope="module")
def tag(base_dir, adapter_dir):
    return build_bento(base_dir, adapter_dir)


@pytest.fixture(scope="module")
def metrics_of_another_server(tag):
    """A metrics file, as a server that already runs has it in the store."""
    file = Path(os.environ["BENTOML_HOME"]) / "prometheus_multiproc_dir" / "counter_1.db"
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(b"running")
    return file


@pytest.fixture(scope="module")
def url(tag, metrics_of_another_server):
    with serve(tag) as url:
        yield url


def descendants() -> set[psutil.Process]:
    return set(psutil.Process().children(recursive=True))


def all_ended(processes: set[psutil.Process]) -> bool:
    return not [each for each in processes if each.is_running() and each.status() != psutil.STATUS_ZOMBIE]


def test_verification_returns_equal_answers(tag, url):
    answer = request_answer(url, "Hello.", "", 5)
    assert verify_bento(tag, [make_sample("Hello.", tuned=answer)], 5, "cpu") == [answer]


def test_other_answers_are_refused(tag):
    with pytest.raises(VerificationError, match=r"(?s)but 100% must.*'Hello\.'.*expected 'something else'"):
        verify_bento(tag, [SAMPLE], 5, "cpu")


def test_an_error_leaves_no_process(tag):
    others = descendants()
    started = set()

    def fail() -> None:
        started.update(descendants() - others)
        raise VerificationError

    with pytest.raises(VerificationError), serve(tag):
        fail()
    assert started
    assert all_ended(started)


def test_a_server_and_its_workers_end_with_a_killed_parent(tag):
    code = f"from deploy.server import serve\nwith serve({tag!r}) as url:\n    print(url, flush=True)\n    input()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as parent:
        assert parent.stdout.readline().startswith(b"http")
        started = set(psutil.Process(parent.pid).children(recursive=True))
        parent.kill()
    assert len(started) >= 2
    wait_until(lambda: all_ended(started), 30, "the end of the server")


def test_answers_of_another_device_need_the_agreed_share_only(tag, url):
    answer = request_answer(url, "Hello.", "", 5)
    samples = [make_sample("Hello.", tuned=answer), SAMPLE]
    assert verify_bento(tag, samples, 5, "cuda") == [answer, answer]
    with pytest.raises(VerificationError, match="but 100% must"):
        verify_bento(tag, samples, 5, "cpu")


def test_a_bento_is_served_in_fp32_whatever_the_environment_says(tag, monkeypatch):
    monkeypatch.setenv("GPT2_WEIGHTS", "int4")  # a server that obeyed would not start
    with serve(tag) as url:
        assert request_answer(url, "Hello.", "", 1) is not None


def test_a_server_keeps_the_metrics_of_another(url, metrics_of_another_server):
    assert metrics_of_another_server.read_bytes() == b"running"


def refusal(tag: str, *options: str, **environment: str) -> str:
    """The last line of a server that BentoML would restart if a worker, and not its parent, refused to start."""
    command = [*bento.bentoml_command("serve"), tag, *(options or ("--port", str(free_port())))]
    environment = bento.bentoml_environment() | environment
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    return done.stderr.splitlines()[-1]


def test_a_port_that_is_taken_is_reported_in_one_line(tag):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        expected = f"Error: cannot listen on 127.0.0.1, port {port}: Address already in use"
        assert refusal(tag, "--host", "127.0.0.1", "--port", str(port)) == expected


def test_a_server_with_wrong_settings_or_lineage_ends_with_one_line(base_dir, adapter_dir):
    tag = build_bento(base_dir, adapter_dir, "broken")
    assert refusal(tag, GPT2_WEIGHTS="int4") == (
        "Error: GPT2_WEIGHTS is 'int4'; it must be one of auto, fp32, bf16, int8"
    )
    log = refusal(tag, GPT2_REQUEST_LOG="/dev/null/log")
    assert log.startswith("Error: GPT2_REQUEST_LOG is '/dev/null/log', which cannot be written: ")
    (in_store(tag) / "src" / "lineage.json").write_text("{")
    assert "lineage.json is not valid JSON" in refusal(tag)
    with pytest.raises(BentoError, match=r"(?s)exit code 1.*lineage\.json is not valid JSON"), serve(tag):
        pass


def test_a_missing_bento_is_an_error():
    with pytest.raises(BentoError, match="gpt2-instruct:none"), serve("gpt2-instruct:none"):
        pass


def test_a_bento_runs_its_own_code(base_dir, adapter_dir):
    tag = build_bento(base_dir, adapter_dir, "own code")
    file = in_store(tag) / "src" / "gpt2core" / "prompt.py"
    file.chmod(0o644)
    file.write_text('raise RuntimeError("the code of the Bento")\n')
    with pytest.raises(BentoError, match="RuntimeError: the code of the Bento"), serve(tag):
        pass


def test_the_service_environment_has_the_settings_that_are_not_empty():
    environment = {"PATH": "/bin", "GPT2_INSTRUCT_WEBHOOK": "https://a", "GPT2_ADMIN_TOKEN": ""}
    settings = {"GPT2_API_TOKEN": "s3cret", "GPT2_REQUEST_LOG": "logs/requests.jsonl", "OTEL_SDK_DISABLED": "true"}
    misspelled = {"GPT2_API_TOKN": "s3cret"}  # the service refuses it
    log = str(Path("logs/requests.jsonl").absolute())
    expected = settings | misspelled | {"GPT2_REQUEST_LOG": log}
    assert service_environment(environment | settings | misspelled) == expected


def test_an_error_response_of_the_service_is_reported(url):
    with pytest.raises(VerificationError, match=r"status 400.*max_new_tokens"):
        request_answer(url, "Hello.", "", 10_000)


def test_metadata_of_a_served_bento_is_its_lineage(tag, url):
    assert requests.get(f"{url}/metadata", timeout=10).json() == bento.lineage(tag).to_json()


def test_a_damaged_base_is_not_served_and_building_again_repairs_it(base_dir, adapter_dir):
    tag = build_bento(base_dir, adapter_dir, "damaged")
    version = bento.lineage(tag).base.sha256[:16]
    base = Path(os.environ["BENTOML_HOME"]) / "models" / "gpt2-instruct-base" / version / "model.safetensors"
    whole = base.read_bytes()
    base.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    try:
        assert re.search(rf"sha256 \w{{64}} of .*model\.safetensors, .*but {version} was recorded", refusal(tag))
        assert build_bento(base_dir, adapter_dir, "damaged") == tag
        assert base.read_bytes() == whole
    finally:
        base.write_bytes(whole)


def test_the_supervisor_kills_all_descendants_before_it_ends():
    script = "for i in $(seq 60); do sleep 600 & done; echo started; wait"
    command = [*SUPERVISED, "sh", "-c", script]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as supervisor:
        assert supervisor.stdout.readline() == b"started\n"
        started = psutil.Process(supervisor.pid).children(recursive=True)
        supervisor.stdin.close()
        supervisor.wait()
    try:
        assert len(started) >= 61
        wait_until(lambda: all_ended(started), 30, "the end of the descendants")
    finally:
        for process in started:
            with suppress(psutil.NoSuchProcess):
                process.kill()


def test_the_supervisor_kills_what_a_killed_command_leaves():
    command = [*SUPERVISED, "sh", "-c", "setsid sleep 600 & echo $!; kill -9 $$"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as supervisor:
        orphan = int(supervisor.stdout.readline())
        assert supervisor.wait(30) == 128 + signal.SIGKILL
    wait_until(lambda: not psutil.pid_exists(orphan), 30, "the end of the orphan")
