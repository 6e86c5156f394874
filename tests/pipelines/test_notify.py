"""The webhook gets the outcome of a run, and cannot make the run fail."""

import json
import os
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Event, Thread

import pytest

from pipelines.notify import VARIABLE
from tests.copies import ROOT

pytestmark = pytest.mark.slow

SCRIPT = """
import sys
from zenml import pipeline, step
from zenml.enums import ExecutionMode
from pipelines.notify import notifying_webhook
from pipelines.processes import Process
@step(enable_cache=False)
def work(fails: bool) -> None:
    if fails:
        raise ValueError("no data")
@pipeline(execution_mode=ExecutionMode.FAIL_FAST, extra={"process": Process.current().to_json()})
def told(fails: bool) -> None:
    work(fails)
if __name__ == "__main__":
    with notifying_webhook("told"):
        told(len(sys.argv) > 1)
"""


@pytest.fixture
def webhook():
    """The address of a server, and the bodies that it received. Its own bodies never end."""
    received, closing = [], Event()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            received.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.end_headers()
            closing.wait()

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/secret", received
        closing.set()
        server.shutdown()


def run(tmp_path, url: str, *arguments: str) -> subprocess.CompletedProcess:
    (tmp_path / "told_pipeline.py").write_text(SCRIPT)
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{tmp_path}", "ZENML_CUSTOM_SOURCE_ROOT": str(tmp_path)}
    environment.pop("ZENML_LOGGING_VERBOSITY")
    command = [sys.executable, str(tmp_path / "told_pipeline.py"), *arguments]
    return subprocess.run(
        command, env=environment | {VARIABLE: url}, capture_output=True, text=True, timeout=280, check=False
    )


def test_a_webhook_is_told_of_success_and_failure(tmp_path, webhook):
    url, received = webhook
    assert run(tmp_path, url).returncode == 0
    assert run(tmp_path, url, "fails").returncode == 1
    success, failure = received
    assert (success["status"], success["step"], success["reason"]) == ("completed", None, None)
    assert success["text"] == f"{success['run']}: completed"
    assert (failure["pipeline"], failure["status"], failure["step"]) == ("told", "failed", "work")
    assert "no data" in failure["reason"]
    assert failure["run"] not in (None, success["run"])
    assert failure["text"] == f"{failure['run']}: failed in step work: {failure['reason']}"


def test_a_webhook_that_cannot_be_reached_is_a_warning_without_its_address(tmp_path):
    done = run(tmp_path, "http://127.0.0.1:9/secret")
    assert done.returncode == 0, done.stderr
    assert "the webhook in GPT2_INSTRUCT_WEBHOOK was not notified that the run completed" in done.stderr + done.stdout
    assert "secret" not in done.stderr + done.stdout
