"""The routes beside /predict, as their users call them: with the official openai client, and as a stream."""

import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.parse import urlsplit

import openai
import pytest
import requests
import torch

from deploy import bento
from deploy.server import serve
from gpt2core.checkpoint import directory_sha256, load_adapter, load_pretrained
from gpt2core.config import GenerationConfig
from gpt2core.evaluate import answer_text
from gpt2core.generate import generate
from gpt2core.prompt import format_prompt
from gpt2core.tokenizer import load_tokenizer

LINEAGE = {"run": {"id": "run-17", "name": "run-17"}, "base": {"sha256": "b" * 64}}
N = {"max_tokens": 8}
DASHBOARD = Path(__file__).parent.parent.parent / "docs" / "grafana.json"


@pytest.fixture(scope="module")
def adapters(adapter_dir, tmp_path_factory):
    """A directory of adapters to load: one good, one broken; and one beside it that must not be reached."""
    root = tmp_path_factory.mktemp("root")
    shutil.copytree(adapter_dir, root / "adapters" / "good")
    shutil.copytree(adapter_dir, root / "outside")
    (root / "adapters" / "broken").mkdir()
    (root / "adapters" / "link").symlink_to(root / "outside")
    return root / "adapters"


@pytest.fixture(scope="module")
def tag(base_dir, adapter_dir):
    return bento.build(base_dir, adapter_dir, LINEAGE)


@contextmanager
def served(tag, **environment):
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, str(value))
        with serve(tag) as url:
            yield url


@pytest.fixture(scope="module")
def request_log(tmp_path_factory):
    return tmp_path_factory.mktemp("log") / "requests.jsonl"


@pytest.fixture(scope="module")
def url(tag, adapters, request_log):
    with served(tag, GPT2_ADMIN_TOKEN="admin", GPT2_ADAPTERS_DIR=adapters, GPT2_REQUEST_LOG=request_log) as url:
        yield url


@pytest.fixture(scope="module")
def client(url):
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def tokenizer(base_dir):
    return load_tokenizer(base_dir)


@pytest.fixture(scope="module")
def tuned(base_dir, adapter_dir):
    return load_adapter(load_pretrained(base_dir), adapter_dir)


@pytest.fixture(scope="module")
def base(base_dir):
    return load_pretrained(base_dir)


def tokens_of(model, tokenizer, prompt: str, **values) -> list[int]:
    config = GenerationConfig(**{"max_new_tokens": 8, "eos_id": tokenizer.eot_token} | values)
    return generate(model, [tokenizer.encode_ordinary(prompt)], config)[0]


def answer_of(model, tokenizer, instruction: str, input: str = "", **values) -> str:
    return answer_text(tokens_of(model, tokenizer, format_prompt(instruction, input), **values), tokenizer)


def events(response: requests.Response) -> list[dict]:
    lines = [line for line in response.iter_lines() if line]
    assert all(line.startswith(b"data: ") for line in lines)
    assert lines[-1] == b"data: [DONE]"
    return [json.loads(line[6:]) for line in lines[:-1]]


def metric(url: str, start: str) -> float:
    lines = requests.get(f"{url}/metrics", timeout=10).text.splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(start))


def until(holds) -> None:
    end = time.monotonic() + 10
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.05)


def pids(*options: str) -> list[int]:
    done = subprocess.run(["pgrep", *options], capture_output=True, text=True, check=True)
    return [int(pid) for pid in done.stdout.split()]


def server_pid(url: str) -> int:
    return pids("-f", "--", f"--port {urlsplit(url).port}")[0]


def user(text: str) -> list[dict]:
    return [{"role": "user", "content": text}]


def test_chat_answers_as_predict_does(client, tuned, tokenizer):
    answer = client.chat.completions.create(model="gpt2-instruct", messages=user("Say hello."), **N)
    assert answer.choices[0].message.content == answer_of(tuned, tokenizer, "Say hello.")
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 8
    assert answer.usage.prompt_tokens == len(tokenizer.encode_ordinary(format_prompt("Say hello.")))


def test_a_system_message_is_the_instruction_and_the_users_is_its_input(client, tuned, tokenizer):
    messages = [{"role": "system", "content": "Name the capital."}, *user("France")]
    answer = client.chat.completions.create(model="gpt2-instruct", messages=messages, **N)
    assert answer.choices[0].message.content == answer_of(tuned, tokenizer, "Name the capital.", "France")


def test_a_completion_goes_on_from_the_text_as_it_is(client, base, tuned, tokenizer):
    for name, model in (("base", base), ("gpt2-instruct", tuned)):
        answer = client.completions.create(model=name, prompt="The capital", **N)
        assert answer.choices[0].text == tokenizer.decode(tokens_of(model, tokenizer, "The capital"))


def test_several_prompts_as_text_or_tokens_and_several_choices(client, tuned, tokenizer):
    texts = ["One", "Two"]
    expected = [tokenizer.decode(tokens_of(tuned, tokenizer, text)) for text in texts]
    tokens = [tokenizer.encode_ordinary(text) for text in texts]
    for prompt in (texts, tokens):
        answer = client.completions.create(model="gpt2-instruct", prompt=prompt, n=2, **N)
        assert [choice.text for choice in answer.choices] == [text for text in expected for _ in range(2)]
        assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
        assert answer.usage.prompt_tokens == sum(map(len, tokens))
        assert answer.usage.completion_tokens == 32


def test_choices_of_one_seed_differ_and_are_repeatable(client, tuned, tokenizer):
    sampling = {"temperature": 1.5, "seed": 5}
    answer = client.completions.create(model="gpt2-instruct", prompt="One", n=3, **sampling, **N)
    expected = [tokenizer.decode(tokens_of(tuned, tokenizer, "One", temperature=1.5, seed=5 + i)) for i in range(3)]
    assert [choice.text for choice in answer.choices] == expected
    assert len(set(expected)) == 3


@pytest.mark.parametrize("stop", [None, "e"])
@pytest.mark.parametrize("route", ["completions", "chat"])
def test_a_stream_is_the_answer_in_parts(client, route, stop):
    what = {"model": "gpt2-instruct", "max_tokens": 20, "stop": stop}
    if route == "chat":
        create, what = client.chat.completions.create, what | {"messages": user("Say hello.")}
    else:
        create, what = client.completions.create, what | {"prompt": "One"}
    whole = create(**what)
    chunks = list(create(**what, stream=True, stream_options={"include_usage": True}))
    choices = [chunk.choices[0] for chunk in chunks[:-1]]
    if route == "chat":
        assert "".join(choice.delta.content for choice in choices) == whole.choices[0].message.content
        assert [choice.delta.role for choice in choices[:2]] == ["assistant", None][: len(choices)]
    else:
        assert "".join(choice.text for choice in choices) == whole.choices[0].text
    assert [choice.finish_reason for choice in choices[:-1]] == [None] * (len(choices) - 1)
    assert choices[-1].finish_reason == whole.choices[0].finish_reason
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage


@pytest.mark.parametrize("route", ["completions", "chat"])
def test_a_stream_comes_while_the_answer_is_made(client, route):
    """Tokens that are there when a part is sent go together, so that a tiny model's answer may come as one part."""
    what = {"model": "gpt2-instruct", "max_tokens": 60, "stream": True}

    def parts():
        if route == "chat":
            return list(client.chat.completions.create(**what, messages=user("Say hello.")))
        return list(client.completions.create(**what, prompt="One"))

    assert any(len(parts()) > 1 for _ in range(20))


def test_a_stream_of_several_choices_has_each_in_its_place(client):
    what = {"model": "gpt2-instruct", "prompt": ["One", "Two", "Three"], **N}
    whole = client.completions.create(**what)
    texts = ["", "", ""]
    for chunk in client.completions.create(**what, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == [choice.text for choice in whole.choices]


def test_logprobs_are_the_models(client, tuned, tokenizer):
    reply = tokens_of(tuned, tokenizer, "One")
    prompt = tokenizer.encode_ordinary("One")
    with torch.inference_mode():
        expected = tuned(torch.tensor([prompt + reply]))[0, len(prompt) - 1 : -1].log_softmax(-1)
    own = [float(row[token]) for row, token in zip(expected, reply, strict=True)]
    logprobs = client.completions.create(model="gpt2-instruct", prompt="One", logprobs=3, **N).choices[0].logprobs
    assert logprobs.token_logprobs == pytest.approx(own, abs=1e-4)
    assert "".join(logprobs.tokens) == tokenizer.decode(reply)
    assert logprobs.text_offset[1] == len(logprobs.tokens[0])
    assert all(len(top) == 3 for top in logprobs.top_logprobs)
    answer = client.chat.completions.create(
        model="gpt2-instruct", messages=user("Say hello."), logprobs=True, top_logprobs=2, **N
    )
    content = answer.choices[0].logprobs.content
    assert len(content) == 8
    for one in content:
        assert one.logprob == one.top_logprobs[0].logprob < 0
        assert math.isclose(one.top_logprobs[0].logprob, max(top.logprob for top in one.top_logprobs))


@pytest.mark.parametrize(
    ("values", "error", "param"),
    [
        ({"model": "gpt-9"}, openai.NotFoundError, "model"),
        ({"temperature": -1}, openai.BadRequestError, "temperature"),
        ({"max_tokens": 1000}, openai.BadRequestError, "max_tokens"),
        ({"messages": []}, openai.BadRequestError, "messages"),
        ({"messages": user("")}, openai.BadRequestError, "messages"),
        ({"messages": user("word " * 200)}, openai.BadRequestError, "messages"),
        ({"messages": user("a") * 2}, openai.BadRequestError, "messages"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, openai.BadRequestError, "messages"),
        ({"frequency_penalty": 0.5}, openai.BadRequestError, "frequency_penalty"),
        ({"top_logprobs": 2}, openai.BadRequestError, "top_logprobs"),
        ({"n": 17}, openai.BadRequestError, "n"),
        ({"tools": [{"type": "function", "function": {"name": "a"}}]}, openai.BadRequestError, "tools"),
        ({"stream_options": {"include_usage": True}}, openai.BadRequestError, "stream_options"),
        ({"extra_body": {"unknown": 1}}, openai.BadRequestError, "unknown"),
    ],
)
def test_an_error_is_the_clients_exception_and_names_the_field(client, values, error, param):
    with pytest.raises(error) as raised:
        client.chat.completions.create(**{"model": "gpt2-instruct", "messages": user("a")} | values)
    assert raised.value.param == param
    assert raised.value.type


def test_a_token_that_is_none_is_refused(client):
    with pytest.raises(openai.BadRequestError, match="token id outside of"):
        client.completions.create(model="gpt2-instruct", prompt=[10**6], **N)


def test_models_are_listed_and_found(client, adapter_dir):
    by_id = {model.id: model for model in client.models.list()}
    assert {"gpt2-instruct", "base"} <= by_id.keys()
    assert by_id["gpt2-instruct"].sha256 == directory_sha256(adapter_dir)
    assert by_id["base"].sha256 == "b" * 64
    assert client.models.retrieve("base").id == "base"
    with pytest.raises(openai.NotFoundError, match="there are gpt2-instruct, base"):
        client.models.retrieve("other")


def test_an_answer_says_what_it_is_from(url, tag, adapter_dir):
    sha256 = directory_sha256(adapter_dir)
    response = requests.post(f"{url}/predict", json={"instruction": "Hello."}, timeout=60)
    assert response.json()["adapter"] == {"name": "gpt2-instruct", "sha256": sha256}
    assert response.headers["X-Run-Id"] == "run-17"
    body = {"model": "gpt2-instruct", "prompt": "a"}
    assert requests.post(f"{url}/v1/completions", json=body, timeout=60).json()["system_fingerprint"] == (
        f"{tag}+{sha256[:16]}"
    )
    response = requests.post(f"{url}/predict", json={"instruction": "Hello.", "adapter": "base"}, timeout=60)
    assert response.json()["adapter"] is None


def test_predict_answers_with_the_adapter_that_is_asked_for(url, base, tuned, tokenizer):
    for adapter, model in (("base", base), ("gpt2-instruct", tuned)):
        body = {"instruction": "Say hello.", "max_new_tokens": 8, "adapter": adapter}
        answer = requests.post(f"{url}/predict", json=body, timeout=60).json()["answer"]
        assert answer == answer_of(model, tokenizer, "Say hello.")
    response = requests.post(f"{url}/predict", json=body | {"adapter": "none"}, timeout=60)
    assert response.status_code == 404
    assert "gpt2-instruct, base" in response.json()["error"]["message"]


def test_predict_streams_the_answer(url):
    body = {"instruction": "Say hello.", "max_new_tokens": 20}
    whole = requests.post(f"{url}/predict", json=body, timeout=60).json()
    with requests.post(f"{url}/predict", json=body | {"stream": True}, stream=True, timeout=60) as response:
        assert response.headers["Content-Type"].startswith("text/event-stream")
        parts = events(response)
    assert "".join(part["answer"] for part in parts) == whole["answer"]
    assert parts[-1] == whole | {"answer": parts[-1]["answer"]}
    assert len(parts) > 1


def test_what_is_wrong_before_a_stream_begins_has_a_status(url):
    response = requests.post(f"{url}/predict", json={"instruction": "", "stream": True}, timeout=60)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "instruction"


def test_a_client_that_leaves_a_stream_frees_its_place(url):
    body = json.dumps({"instruction": "Say hello.", "max_new_tokens": 80, "stream": True}).encode()
    parts = urlsplit(url)
    cancelled = metric(url, 'gpt2_requests_total{adapter="gpt2-instruct",finish_reason="cancelled"}')
    for _ in range(20):
        with socket.create_connection((parts.hostname, parts.port), timeout=10) as connection:
            head = f"POST /predict HTTP/1.1\r\nHost: a\r\nContent-Length: {len(body)}\r\n\r\n"
            connection.sendall(head.encode() + body)
            assert b"200" in connection.recv(100)
    until(lambda: metric(url, "gpt2_running_requests") == 0)
    assert metric(url, 'gpt2_requests_total{adapter="gpt2-instruct",finish_reason="cancelled"}') > cancelled


def admin(url: str, verb: str, token: str = "admin", **body) -> requests.Response:
    headers = {"Authorization": f"Bearer {token}"}
    return requests.post(f"{url}/v1/{verb}_lora_adapter", json=body, headers=headers, timeout=60)


def test_an_adapter_is_loaded_asked_and_unloaded_while_it_runs(url, adapters, tuned, tokenizer):
    loaded = admin(url, "load", lora_name="mine", lora_path="good")
    assert loaded.json() == {"name": "mine", "sha256": directory_sha256(adapters / "good")}
    body = {"instruction": "Say hello.", "max_new_tokens": 8, "adapter": "mine"}
    answer = requests.post(f"{url}/predict", json=body, timeout=60).json()
    assert answer["answer"] == answer_of(tuned, tokenizer, "Say hello.")
    assert answer["adapter"]["name"] == "mine"
    assert admin(url, "unload", lora_name="mine").status_code == 200
    assert requests.post(f"{url}/predict", json=body, timeout=60).status_code == 404
    assert admin(url, "unload", lora_name="mine").status_code == 404


@pytest.mark.parametrize(
    ("name", "path", "status"),
    [
        ("a", "../outside", 404),
        ("a", "link", 404),
        ("a", "/etc", 404),
        ("a", ".", 404),
        ("a", "nothing", 404),
        ("a", "x\0y", 404),
        ("a", "x" * 5000, 404),
        ("a", "broken", 400),
        ("a/b", "good", 400),
        ("", "good", 400),
        ("base", "good", 400),
        ("gpt2-instruct", "good", 400),
    ],
)
def test_what_is_no_adapter_of_the_directory_is_not_loaded(url, name, path, status):
    response = admin(url, "load", lora_name=name, lora_path=path)
    assert response.status_code == status
    assert response.json()["error"]["param"] in ("lora_name", "lora_path")


def test_adapters_want_the_admins_token(url):
    assert admin(url, "load", token="other", lora_name="a", lora_path="good").status_code == 401
    assert requests.post(f"{url}/v1/load_lora_adapter", json={}, timeout=10).status_code == 401


def test_unknown_paths_make_no_series(url):
    requests.get(f"{url}/first", timeout=10)
    before = len(requests.get(f"{url}/metrics", timeout=10).text.splitlines())
    for i in range(50):
        assert requests.get(f"{url}/nothing/{i}", timeout=10).status_code == 404
    assert len(requests.get(f"{url}/metrics", timeout=10).text.splitlines()) == before


def test_metrics_count_tokens_and_times(url):
    names = ("gpt2_prompt_tokens_total", "gpt2_completion_tokens_total", "gpt2_time_to_first_token_seconds_count")
    before = [metric(url, name) for name in (*names, "gpt2_inter_token_seconds_count")]
    answer = requests.post(f"{url}/predict", json={"instruction": "Hi.", "max_new_tokens": 5}, timeout=60).json()
    usage = answer["usage"]
    after = [metric(url, name) for name in (*names, "gpt2_inter_token_seconds_count")]
    assert [b - a for a, b in zip(before, after, strict=True)] == [
        usage["prompt_tokens"],
        usage["completion_tokens"],
        1,
        usage["completion_tokens"] - 1,
    ]


def test_the_dashboard_asks_for_metrics_and_labels_that_there_are(url):
    requests.post(f"{url}/predict", json={"instruction": "Hello.", "max_new_tokens": 3}, timeout=60)
    lines = requests.get(f"{url}/metrics", timeout=10).text.splitlines()
    labels = {}  # of each metric
    for line in lines:
        if not line.startswith("#"):
            name, _, rest = line.partition("{")
            labels.setdefault(name.split(" ")[0], set()).update(re.findall(r'(\w+)="', rest))
    dashboard = json.loads(DASHBOARD.read_text())
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    assert len(queries) > 10
    for query in queries:
        (metric_name,) = re.findall(r"\b(?:gpt2|bentoml)_\w+", query.partition("{")[0])
        assert metric_name in labels, query
        wanted = re.findall(r"by \(([^)]*)\)", query) + re.findall(r"(\w+)=", query)
        assert {name.strip() for names in wanted for name in names.split(",")} <= labels[metric_name], query


@pytest.mark.slow
def test_64_clients_are_all_answered_and_memory_stays_flat(tag):
    """Half of them streams; some clients hang up in the middle, which must leave nothing behind."""
    wrong: list[str] = []

    def client(number: int) -> int:
        answers = 0
        while time.monotonic() < end:
            body = {"instruction": f"Say {answers % 7}.", "max_new_tokens": 8 * (1 + number % 8), "temperature": 1.0}
            body["stream"] = bool(number % 2)
            with requests.post(f"{url}/predict", json=body, stream=True, timeout=60) as response:
                if number % 16 == 1:
                    next(response.iter_content(16))  # and no more
                elif response.status_code != 200 or not response.text.rstrip().endswith(("}", "data: [DONE]")):
                    wrong.append(f"{response.status_code} {response.text[-300:]}")
            answers += 1
        return answers

    with served(tag) as url, ThreadPoolExecutor(64) as pool:
        (worker,) = pids("-P", str(server_pid(url)))
        memory = []
        for seconds in (10, 10, 10):
            end = time.monotonic() + seconds
            answered = sum(pool.map(client, range(64)))
            assert answered > 64
            memory.append(int(Path(f"/proc/{worker}/statm").read_text().split()[1]))  # resident pages
        until(lambda: metric(url, "gpt2_running_requests") == metric(url, "gpt2_queue_depth") == 0)
    assert wrong == []
    assert memory[2] < 1.02 * memory[1], memory


def test_a_request_keeps_the_id_it_comes_with(url):
    response = requests.get(f"{url}/metadata", headers={"X-Request-Id": "mine-1"}, timeout=10)
    assert response.headers["X-Request-Id"] == "mine-1"
    response = requests.get(f"{url}/metadata", headers={"X-Request-Id": "a b\t<"}, timeout=10)
    assert len(response.headers["X-Request-Id"]) == 32


def test_the_request_log_has_a_line_for_each_answer_and_no_text(url, request_log):
    headers = {"X-Request-Id": "logged-1"}
    body = {"instruction": "Whisper a secret.", "max_new_tokens": 4}
    requests.post(f"{url}/predict", json=body, headers=headers, timeout=60)
    until(lambda: "logged-1" in request_log.read_text())
    text = request_log.read_text()
    (line,) = [json.loads(line) for line in text.splitlines() if "logged-1" in line]
    assert (line["completion_tokens"], line["finish_reason"], line["model"]) == (4, "length", "gpt2-instruct")
    assert len(line["prompt_sha256"]) == len(line["answer_sha256"]) == 64
    assert "secret" not in text


def test_a_token_is_asked_for(tag):
    with served(tag, GPT2_API_TOKEN="s3cret-token", GPT2_ADMIN_TOKEN="") as url:
        for path in ("/livez", "/readyz", "/metrics"):
            assert requests.get(url + path, timeout=10).status_code == 200
        for path in ("/", "/metadata", "/v1/models", "/docs.json", "/nothing"):
            response = requests.get(url + path, timeout=10)
            assert response.status_code == 401
            assert response.json()["error"]["type"] == "unauthorized"
        assert requests.get(url, timeout=10).headers["WWW-Authenticate"].startswith("Basic")
        for wrong in ("other", "", "s3cret-toke", "é"):
            headers = {"Authorization": f"Bearer {wrong}".encode()}
            assert requests.get(f"{url}/metadata", headers=headers, timeout=10).status_code == 401
        headers = {"Authorization": "Bearer s3cret-token"}
        assert requests.get(f"{url}/metadata", headers=headers, timeout=10).status_code == 200
        assert requests.get(f"{url}/metadata", auth=("anyone", "s3cret-token"), timeout=10).status_code == 200
        headers = {"X-Api-Key": "s3cret-token", "Authorization": "Bearer of-a-proxy"}
        assert requests.get(f"{url}/metadata", headers=headers, timeout=10).status_code == 200
        assert requests.get(f"{url}/metadata", headers={"X-Api-Key": "x"}, timeout=10).status_code == 401
        with openai.OpenAI(base_url=f"{url}/v1", api_key="wrong", max_retries=0) as client:
            with pytest.raises(openai.AuthenticationError):
                client.models.list()
            assert client.with_options(api_key="s3cret-token").models.list().data
        # without an admin's token, adapters stay as they are
        assert admin(url, "load", token="s3cret-token", lora_name="a", lora_path="b").status_code == 403


def test_readiness_falls_first_and_requests_in_flight_are_answered(tag):
    with served(tag) as url:
        server = server_pid(url)
        body = {"instruction": "Say hello.", "max_new_tokens": 60}
        requests.post(f"{url}/predict", json=body, timeout=60)
        with ThreadPoolExecutor(8) as pool:
            answers = [pool.submit(requests.post, f"{url}/predict", json=body, timeout=60) for _ in range(8)]
            os.kill(server, signal.SIGTERM)
            seen = []
            with suppress(requests.ConnectionError):
                while True:
                    seen.append(requests.get(f"{url}/readyz", timeout=5).status_code)
                    time.sleep(0.05)
            assert 503 in seen
            assert [answer.result().status_code for answer in answers] == [200] * 8
