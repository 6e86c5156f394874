"""Serves a Bento in a child process; defines the environment variables of deployed services."""

import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from deploy.bento import BentoError, bentoml_command, bentoml_environment, log_tail
from deploy.verify import is_ready, request_answer, verify_answers
from gpt2core.types import Sample

START_TIMEOUT = 480  # seconds; a service of gpt2-medium took 170 s to start in a pod
STOP_TIMEOUT = 20  # seconds for a graceful shutdown
# The supervisor ends the server when this process ends.
SUPERVISED = (sys.executable, "-I", str(Path(__file__).with_name("supervisor.py")))
PATH_VARIABLES = ("GPT2_ADAPTERS_DIR", "GPT2_REQUEST_LOG")  # settings of the service that name files


def verify_bento(tag: str, samples: Sequence[Sample], max_new_tokens: int, device: str) -> list[str]:
    """Serve the Bento in fp32 and compare its answers with the evaluated model's answers; return the Bento's answers.

    Args:
        device: type of the device that `evaluate` generated on. Answers must be equal if both ran on a CPU.

    Raises:
        VerificationError: the answers differ.
        BentoError: the server does not start.
    """
    from gpt2core.model import best_device  # imports torch, which other users of this module do not need

    exact = device == best_device().type == "cpu"
    with serve(tag) as url:
        return verify_answers(tag, partial(request_answer, url, max_new_tokens=max_new_tokens), samples, exact)


@contextmanager
def serve(tag: str, weights: str = "fp32") -> Iterator[str]:
    """Context manager: serve a Bento on a free port of this machine. Yields its URL when it is ready.

    Args:
        weights: format of the served weights. GPT2_WEIGHTS in the environment has no effect, because `evaluate` used
            fp32.

    Raises:
        BentoError: the server ended or was not ready in time. The message has the last lines of its log.
    """
    with TemporaryDirectory() as folder:
        port = _free_port()
        log = Path(folder, "log")
        environment = bentoml_environment() | {
            "BENTOML_CONTAINERIZED": "true",  # a worker that fails ends the server instead of being restarted forever
            "GPT2_WEIGHTS": weights,
        }
        with log.open("wb") as stream:
            server = subprocess.Popen(  # noqa: S603 (no shell)
                [*SUPERVISED, *bentoml_command("serve"), tag, "--host", "127.0.0.1", "--port", str(port)],
                cwd=folder,
                env=environment,
                stdin=subprocess.PIPE,
                stdout=stream,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            url = f"http://127.0.0.1:{port}"
            _wait_until_ready(url, server, log)
            yield url
        finally:
            _stop(server)


def service_environment(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Return the variables that a deployed service gets: its settings (bentos/settings.py), with absolute paths.

    Misspelled variables are included, so that the service refuses to start.
    """
    return {
        name: str(Path(value).absolute()) if name in PATH_VARIABLES else value
        for name, value in environment.items()
        if value and re.fullmatch(r"GPT2_(?!INSTRUCT_).*|OTEL_SDK_DISABLED", name)
    }


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _wait_until_ready(url: str, server: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT
    while time.monotonic() < deadline:
        if server.poll() is not None:
            raise BentoError(f"the server ended with exit code {server.returncode}:\n{log_tail(_text(log))}")
        if is_ready(url):
            return
        time.sleep(0.1)
    raise BentoError(f"the server was not ready after {START_TIMEOUT} seconds:\n{log_tail(_text(log))}")


def _text(log: Path) -> str:
    return log.read_text(encoding="utf-8", errors="replace")


def _stop(server: subprocess.Popen[bytes]) -> None:
    """Stop the server and its workers gracefully; after `STOP_TIMEOUT`, kill them by closing the supervisor's pipe."""
    server.terminate()
    with suppress(subprocess.TimeoutExpired):
        server.wait(STOP_TIMEOUT)
    assert server.stdin is not None
    server.stdin.close()
    server.wait()
