"""Helpers of the service's tests: expected completions, parsed responses, metrics, the server's processes."""

import json
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit

import pytest
import requests

from deploy.server import serve
from gpt2core.config import GenerationConfig
from gpt2core.evaluate import answer_text
from gpt2core.generate import generate
from gpt2core.prompt import format_prompt


@contextmanager
def served(tag: str, **environment: object) -> Iterator[str]:
    """The address of a service of its own, with these environment variables."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, str(value))
        with serve(tag) as url:
            yield url


def tokens_of(model, tokenizer, prompt: str, **values) -> list[int]:
    """The tokens with which gpt2core continues the prompt."""
    config = GenerationConfig(**{"max_new_tokens": 8, "eos_id": tokenizer.eot_token} | values)
    return generate(model, [tokenizer.encode_ordinary(prompt)], config)[0]


def answer_of(model, tokenizer, instruction: str, input: str = "", **values) -> str:
    """The answer of gpt2core to the instruction."""
    return answer_text(tokens_of(model, tokenizer, format_prompt(instruction, input), **values), tokenizer)


def predict(url: str, query: str = "", **body) -> requests.Response:
    return requests.post(f"{url}/predict{query}", json={"max_new_tokens": 8} | body, timeout=60)


def error_of(response: requests.Response) -> dict:
    content = response.json()
    assert content.keys() == {"error"}
    assert content["error"].keys() == {"type", "message", "param", "code"}
    return content["error"]


def events(response: requests.Response) -> list[dict]:
    """The server-sent events of a response before [DONE]."""
    lines = [line for line in response.iter_lines() if line]
    assert all(line.startswith(b"data: ") for line in lines)
    assert lines[-1] == b"data: [DONE]"
    return [json.loads(line[6:]) for line in lines[:-1]]


def metric(url: str, start: str) -> float:
    """The sum of all series whose line in /metrics starts so."""
    lines = requests.get(f"{url}/metrics", timeout=10).text.splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(start))


def admin(url: str, verb: str, token: str = "admin", **body) -> requests.Response:
    """POST /v1/load_lora_adapter or /v1/unload_lora_adapter."""
    headers = {"Authorization": f"Bearer {token}"}
    return requests.post(f"{url}/v1/{verb}_lora_adapter", json=body, headers=headers, timeout=60)


def start_canary(url: str, **body) -> requests.Response:
    return requests.post(f"{url}/v1/start_canary", json=body, headers={"Authorization": "Bearer admin"}, timeout=60)


def end_canary(url: str) -> requests.Response:
    return requests.post(f"{url}/v1/end_canary", headers={"Authorization": "Bearer admin"}, timeout=60)


def pids(*options: str) -> list[int]:
    done = subprocess.run(["pgrep", *options], capture_output=True, text=True, check=True)
    return [int(pid) for pid in done.stdout.split()]


def server_pid(url: str) -> int:
    """The supervisor (deploy/supervisor.py) of BentoML's parent process, to which it forwards SIGTERM."""
    return pids("-f", "--", f"--port {urlsplit(url).port}")[0]
