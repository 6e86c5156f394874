"""Bentos: built in a process of their own from exact model tags, served, asked.

Built in-process, BentoML 1.4 mixes up the models of two Bentos. Bento and models are named by their content, so what
is the same is stored once.
"""

import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from shutil import copytree, ignore_patterns
from tempfile import TemporaryDirectory
from typing import Any

import requests
import yaml

from gpt2core.checkpoint import ADAPTER_CONFIG, directory_sha256
from gpt2core.types import AdapterRef, Lineage

ROOT = Path(__file__).parent.parent
NAME = "gpt2-instruct"
START_TIMEOUT = 180  # seconds; a base of 1.5 GB is read in that time
ANSWER_TIMEOUT = 120  # seconds
# Of a deployment's answers, those that must be evaluate's to the letter: it may compute in int8 or bf16, where a word
# in doubt falls otherwise, but another model or adapter agrees in hardly any.
DEPLOYED_AGREEMENT = 0.5
# What the environment of a deployment says to its service: what it asks of users, and how it computes.
SETTINGS = ("GPT2_API_TOKEN", "GPT2_ADMIN_TOKEN", "GPT2_WEIGHTS")


class BentoError(RuntimeError):
    """A Bento that could not be built, served or asked, or that answers otherwise than its model did."""


def describe_adapter(directory: Path) -> AdapterRef:
    """The adapter's sha256 (over its files) and LoRA config."""
    lora = json.loads((directory / ADAPTER_CONFIG).read_text())["lora"]
    return AdapterRef.from_json({"sha256": directory_sha256(directory), **lora})


def build(base_dir: Path, adapter_dir: Path, lineage: Lineage) -> str:
    """The tag of a Bento with base, adapter, this project's serving code and the lineage (to which the tag is added).

    Raises:
        BentoError: with the last lines of BentoML's log.
    """
    models = {
        "base": _store_model(f"{NAME}-base", base_dir),
        "adapter": _store_model(f"{NAME}-adapter", adapter_dir),
    }
    with TemporaryDirectory() as temporary:
        context = Path(temporary)
        copytree(ROOT / "bentos", context / "bentos", ignore=ignore_patterns("__pycache__"))
        copytree(ROOT / "gpt2core", context / "gpt2core", ignore=ignore_patterns("__pycache__", "demo"))
        content = json.dumps([directory_sha256(context), models, lineage.to_json()], sort_keys=True)
        tag = f"{NAME}:{hashlib.sha256(content.encode()).hexdigest()[:16]}"
        if exists(tag):
            return tag
        (context / "lineage.json").write_text(json.dumps(replace(lineage, bento=tag).to_json(), indent=2))
        arguments = [part for name, model in models.items() for part in ("--arg", f"{name}={model}")]
        command = [
            *_bentoml("build"),
            "--version",
            tag.partition(":")[2],
            *arguments,
            "-f",
            "bentos/bentofile.yaml",
            ".",
        ]
        done = subprocess.run(command, cwd=context, env=_environment(), capture_output=True, text=True)
        if done.returncode != 0:
            raise BentoError(f"bentoml build failed:\n{_tail(done.stdout + done.stderr)}")
    return tag


def exists(tag: str) -> bool:
    """Whether the store holds the Bento and the models it needs. Looks at files only."""
    bento = _in_store("bentos", tag) / "bento.yaml"
    if not bento.is_file():
        return False
    models = [model for service in yaml.safe_load(bento.read_text())["services"] for model in service["models"]]
    return all((_in_store("models", model["tag"]) / "model.yaml").is_file() for model in models)


def lineage(tag: str) -> Lineage:
    """The lineage that a Bento of the store was built with.

    Raises:
        BentoError: the store has no such Bento.
    """
    if not exists(tag):
        raise BentoError(f"the Bento {tag} is not in the store; run the pipeline again with --no-cache")
    return Lineage.from_json(json.loads((_in_store("bentos", tag) / "src" / "lineage.json").read_text()))


def export(tag: str, file: Path) -> None:
    """Write a Bento and its models as a tar, whose name has to end so.

    Raises:
        BentoError: with the last lines of BentoML's log.
    """
    command = [*_bentoml("export"), tag, str(file.absolute())]
    done = subprocess.run(command, env=_environment(), capture_output=True, text=True)
    if done.returncode != 0:
        raise BentoError(f"bentoml export failed:\n{_tail(done.stdout + done.stderr)}")


@contextmanager
def serve(tag: str) -> Iterator[str]:
    """Serve a Bento on a free port of this machine, in fp32 as it was evaluated; its address, once it is ready.

    Raises:
        BentoError: the server ended or was not ready in time; with the last lines of its log.
    """
    # Two servers must not share a home: each empties the metrics of the other when it starts.
    with TemporaryDirectory() as home, TemporaryDirectory() as folder:
        for name in ("bentos", "models"):
            Path(home, name).symlink_to(_home() / name, target_is_directory=True)
        port = _free_port()
        command = [*_bentoml("serve"), tag, "--host", "127.0.0.1", "--port", str(port)]
        log = Path(folder, "log")
        with log.open("wb") as stream:
            server = subprocess.Popen(
                command,
                cwd=folder,
                # "containerized": a worker that fails ends the server; elsewhere BentoML starts it again and again
                env={"GPT2_WEIGHTS": "fp32"} | _environment() | {"BENTOML_HOME": home, "BENTOML_CONTAINERIZED": "true"},
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


def settings() -> dict[str, str]:
    """Those of `SETTINGS` that the environment has."""
    return {name: os.environ[name] for name in SETTINGS if os.environ.get(name)}


def key_header() -> dict[str, str]:
    """What a service with the environment's token wants to see. Not Authorization: some proxies keep that."""
    token = os.environ.get("GPT2_API_TOKEN")
    return {"X-Api-Key": token} if token else {}


def ask(url: str, instruction: str, input: str, max_new_tokens: int) -> str:
    """The greedy answer of a running service.

    Raises:
        BentoError: it answers with an error, or not at all.
    """
    body = {"instruction": instruction, "input": input, "max_new_tokens": max_new_tokens}
    try:
        response = requests.post(f"{url}/predict", json=body, headers=key_header(), timeout=ANSWER_TIMEOUT)
        response.raise_for_status()
        return str(response.json()["answer"])
    except requests.HTTPError as error:
        raise BentoError(f"{url}/predict answered {error.response.status_code}: {error.response.text}") from None
    except (requests.RequestException, ValueError, KeyError) as error:
        raise BentoError(f"{url}/predict gave no answer: {error}") from None


def smoke(tag: str, expected: Sequence[Mapping[str, Any]], max_new_tokens: int) -> list[str]:
    """Serve the Bento and `check` it."""
    with serve(tag) as url:
        return check(tag, lambda text, input: ask(url, text, input, max_new_tokens), expected)


def check(
    tag: str, ask: Callable[[str, str], str], expected: Sequence[Mapping[str, Any]], agreement: float = 1.0
) -> list[str]:
    """Ask for each row's `instruction` and `input`; the answers.

    Args:
        agreement: the least share of them that must be the rows' `tuned`, to the letter.

    Raises:
        BentoError: fewer are.
    """
    answers = [ask(row["instruction"], row["input"]) for row in expected]
    others = [(row, answer) for row, answer in zip(expected, answers, strict=True) if answer != row["tuned"]]
    if len(others) > (1 - agreement) * len(expected):
        row, answer = others[0]
        raise BentoError(
            f"{tag} answers {answer!r} to {row['instruction']!r} with input {row['input']!r}, "
            f"but the model it was built from answered {row['tuned']!r} "
            f"({len(others)} of {len(expected)} answers differ)"
        )
    return answers


def _store_model(name: str, directory: Path) -> str:
    """Put a directory into BentoML's model store, unless it is there; its tag, which its content gives."""
    import bentoml  # here: cached runs need none of it

    tag = f"{name}:{directory_sha256(directory)[:16]}"
    stored = _in_store("models", tag)
    if not (stored / "model.yaml").is_file():
        with bentoml.models.create(tag) as model:
            copytree(directory, model.path, dirs_exist_ok=True)
        stored.chmod(0o755)  # BentoML's 0700 would keep the user of a container out
    return tag


def _in_store(kind: str, tag: str) -> Path:
    name, _, version = tag.partition(":")
    return _home() / kind / name / version


def _home() -> Path:
    return Path(os.environ.get("BENTOML_HOME") or Path.home() / "bentoml")


def _bentoml(verb: str) -> list[str]:
    return [sys.executable, "-m", "bentoml", verb]


def _environment() -> dict[str, str]:
    """Ours, but for what would put this checkout's code before the Bento's, or move its port."""
    ours = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PORT", "BENTOML_PORT")}
    return ours | {"BENTOML_DO_NOT_TRACK": "true"}


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _wait_until_ready(url: str, server: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + START_TIMEOUT
    while time.monotonic() < end:
        if server.poll() is not None:
            raise BentoError(f"the server ended with exit code {server.returncode}:\n{_tail(log.read_text())}")
        try:
            if requests.get(f"{url}/readyz", timeout=5).ok:
                return
        except requests.RequestException:
            pass
        time.sleep(0.1)
    raise BentoError(f"the server was not ready after {START_TIMEOUT} seconds:\n{_tail(log.read_text())}")


def _stop(server: subprocess.Popen[bytes]) -> None:
    """End the server and its workers, which share a process group."""
    for number, patience in ((signal.SIGTERM, 20), (signal.SIGKILL, None)):
        if server.poll() is None:
            os.killpg(server.pid, number)
            try:
                server.wait(patience)
            except subprocess.TimeoutExpired:
                continue


def _tail(log: str) -> str:
    return "\n".join(log.splitlines()[-60:])
