"""The service, as a real Bento over HTTP."""

import asyncio
import http.client
import json
import re
import socket
import subprocess
from concurrent.futures import ThreadPoolExecutor
from time import monotonic, sleep
from urllib.parse import urlsplit

import pytest
import requests
from starlette.requests import Request

from bentos import routes
from bentos.answering import Answerer, Reply, Wanted, usage
from bentos.errors import RequestError
from bentos.request_log import RequestLog
from bentos.schemas import DEFAULTS, TUNED, PredictRequest
from deploy import bento
from deploy.server import serve
from gpt2core.checkpoint import load_adapter, load_pretrained
from gpt2core.config import GenerationConfig
from gpt2core.evaluate import answer_text
from gpt2core.generate import generate
from gpt2core.prompt import format_prompt
from gpt2core.tokenizer import load_tokenizer

LINEAGE = {"run": {"id": "1", "name": "run-1"}, "data": {"train": "äöü"}, "base": {"sha256": "b" * 64}}


@pytest.fixture(scope="module")
def tag(base_dir, adapter_dir):
    return bento.build(base_dir, adapter_dir, LINEAGE)


@pytest.fixture(scope="module")
def url(tag):
    with serve(tag) as url:
        yield url


@pytest.fixture(scope="module")
def tokenizer(base_dir):
    return load_tokenizer(base_dir)


@pytest.fixture(scope="module")
def model(base_dir, adapter_dir):
    return load_adapter(load_pretrained(base_dir), adapter_dir)


def expected(model, tokenizer, instruction: str, input: str = "", **values) -> list[int]:
    """The tokens that gpt2core replies with."""
    prompt = tokenizer.encode_ordinary(format_prompt(instruction, input))
    config = GenerationConfig(**{"max_new_tokens": 8, "eos_id": tokenizer.eot_token} | values)
    return generate(model, [prompt], config)[0]


def predict(url: str, query: str = "", **body) -> requests.Response:
    return requests.post(f"{url}/predict{query}", json={"max_new_tokens": 8} | body, timeout=60)


def post(url: str, body: bytes, content_type: str | None = "application/json") -> requests.Response:
    headers = {} if content_type is None else {"Content-Type": content_type}
    return requests.post(f"{url}/predict", data=body, headers=headers, timeout=60)


def error_of(response: requests.Response) -> dict:
    content = response.json()
    assert content.keys() == {"error"}
    assert content["error"].keys() == {"type", "message", "param"}
    return content["error"]


@pytest.mark.parametrize(
    ("instruction", "input"), [("Name the capital.", "France"), ("Say something.", ""), ("é ü 東", "🙂")]
)
def test_the_answer_is_what_the_model_replies(url, model, tokenizer, instruction, input):
    reply = expected(model, tokenizer, instruction, input)
    assert predict(url, instruction=instruction, input=input).json()["answer"] == answer_text(reply, tokenizer)


def test_an_answer_says_why_it_ended_how_many_tokens_it_took_and_from_which_bento_it_is(url, model, tokenizer, tag):
    answer = predict(url, instruction="Hello.", input="x").json()
    n_prompt = len(tokenizer.encode_ordinary(format_prompt("Hello.", "x")))
    n_reply = len(expected(model, tokenizer, "Hello.", "x"))
    assert answer["finish_reason"] == "length"
    assert answer["usage"] == {
        "prompt_tokens": n_prompt,
        "completion_tokens": n_reply,
        "total_tokens": n_prompt + n_reply,
    }
    assert answer["model"] == tag


@pytest.mark.parametrize("content_type", [None, "application/json", "text/plain", "application/x-www-form-urlencoded"])
def test_json_is_understood_whatever_the_header_calls_it(url, content_type):
    answer = post(url, b'{"instruction": "Hello.", "max_new_tokens": 8}', content_type)
    assert answer.json() == predict(url, instruction="Hello.").json()


def test_a_bare_curl_works(url):
    curl = ["curl", "-sS", "-X", "POST", f"{url}/predict", "-d", '{"instruction": "Hello.", "max_new_tokens": 8}']
    done = subprocess.run(curl, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == predict(url, instruction="Hello.").json()


def test_sampling_with_a_seed_is_repeatable_and_is_gpt2cores(url, model, tokenizer):
    sampling = {"temperature": 1.5, "top_k": 50, "top_p": 0.9}
    one, same, other = (
        predict(url, instruction="Hello.", seed=seed, **sampling).json()["answer"] for seed in (1, 1, 2)
    )
    assert one == same == answer_text(expected(model, tokenizer, "Hello.", seed=1, **sampling), tokenizer)
    assert one != other


def test_the_defaults_are_those_of_gpt2core(url, model, tokenizer):
    reply = expected(model, tokenizer, "Hello.", max_new_tokens=DEFAULTS.max_new_tokens)
    answer = requests.post(f"{url}/predict", json={"instruction": "Hello."}, timeout=60).json()
    assert answer["answer"] == answer_text(reply, tokenizer)


def test_an_answer_ends_before_the_first_stop(url):
    whole = predict(url, instruction="Hello.", max_new_tokens=20).json()["answer"]
    stop = whole[len(whole) // 2 :][:3]
    for value in (stop, ["never there", stop]):
        answer = predict(url, instruction="Hello.", max_new_tokens=20, stop=value).json()
        assert answer["answer"] == whole[: whole.index(stop)].rstrip()
        assert answer["finish_reason"] == "stop"
        assert answer["usage"]["completion_tokens"] < 20


def test_an_answer_is_cut_to_the_room_that_the_context_leaves(url, model):
    n_positions = model.config.n_positions
    answer = predict(url, instruction="Hello.", max_new_tokens=n_positions).json()
    assert answer["usage"]["total_tokens"] == n_positions
    assert answer["finish_reason"] == "length"


@pytest.mark.parametrize("temperature", [1e-40, 5e-324, 1e300])
def test_extreme_temperatures_are_answered(url, temperature):
    assert predict(url, instruction="Hello.", temperature=temperature, seed=0).status_code == 200


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (b"", None),
        (b"{", None),
        (b"[1]", None),
        (b"null", None),
        (b"\xff\xfe", None),
        (b'{"instruction": "\\ud800"}', None),
        (b"[" * 100_000, None),
        (b"{}", "instruction"),
        (b'{"instruction": ""}', "instruction"),
        (b'{"instruction": " \\n"}', "instruction"),
        (b'{"instruction": 3}', "instruction"),
        (b'{"instruction": "a", "input": null}', "input"),
        (b'{"instruction": "a", "temperature": true}', "temperature"),
        (b'{"instruction": "a", "temperature": "0.5"}', "temperature"),
        (b'{"instruction": "a", "temperature": NaN}', "temperature"),
        (b'{"instruction": "a", "temperature": 1e999}', "temperature"),
        (b'{"instruction": "a", "temperature": -1}', "temperature"),
        (b'{"instruction": "a", "top_k": 0}', "top_k"),
        (b'{"instruction": "a", "top_k": 1.5}', "top_k"),
        (b'{"instruction": "a", "top_p": 0}', "top_p"),
        (b'{"instruction": "a", "top_p": 1.1}', "top_p"),
        (b'{"instruction": "a", "max_new_tokens": 0}', "max_new_tokens"),
        (b'{"instruction": "a", "max_new_tokens": 129}', "max_new_tokens"),
        (b'{"instruction": "a", "seed": -1}', "seed"),
        (b'{"instruction": "a", "seed": 99999999999999999999}', "seed"),
        (b'{"instruction": "a", "stop": ""}', "stop"),
        (b'{"instruction": "a", "stop": [1]}', "stop"),
        (b'{"instruction": "a", "temprature": 1}', "temprature"),
    ],
)
def test_a_wrong_request_is_a_400_that_names_the_field(url, body, param):
    response = post(url, body)
    assert response.status_code == 400
    assert error_of(response)["param"] == param


@pytest.mark.parametrize(
    ("field", "values"),
    [("instruction", {"instruction": "word " * 200}), ("input", {"instruction": "a", "input": "word " * 200})],
)
def test_a_prompt_beyond_the_context_is_a_400_that_says_how_long_it_is(url, tokenizer, field, values):
    response = predict(url, **values)
    n = len(tokenizer.encode_ordinary(format_prompt(values["instruction"], values.get("input", ""))))
    assert response.status_code == 400
    assert error_of(response)["type"] == "context_length_exceeded"
    assert error_of(response)["param"] == field
    assert f"{n} tokens" in error_of(response)["message"]


@pytest.mark.parametrize("content_type", ["multipart/form-data", "multipart/form-data; boundary=x"])
def test_a_multipart_body_is_a_400(url, content_type):
    response = post(url, b"--x", content_type)
    assert response.status_code == 400
    assert "not multipart" in error_of(response)["message"]


def test_a_body_beyond_the_limit_is_a_413(url):
    response = post(url, json.dumps({"instruction": "a" * 1_000_001}).encode())
    assert response.status_code == 413
    error_of(response)


def test_a_body_in_chunks_is_read_no_further_than_the_limit(url):
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=30)
    connection.putrequest("POST", "/predict")
    connection.putheader("Transfer-Encoding", "chunked")
    connection.endheaders()
    sent = 0
    try:
        while sent < 50_000_000:
            connection.send(b"10000\r\n" + b"a" * 0x10000 + b"\r\n")
            sent += 0x10000
    except OSError:
        pass  # the server hung up, as it may
    else:
        connection.send(b"0\r\n\r\n")
    try:
        assert connection.getresponse().status == 413
    except OSError:
        assert sent < 50_000_000


@pytest.mark.parametrize(
    ("method", "path", "status"), [("GET", "/predict", 405), ("POST", "/nothing", 404), ("PUT", "/metadata", 405)]
)
def test_a_route_that_is_not_there_has_the_shape_of_every_error(url, method, path, status):
    response = requests.request(method, url + path, timeout=10)
    assert response.status_code == status
    error_of(response)


def test_the_lambda_envelope_holds_the_answer_and_its_status(url):
    response = predict(url, "?format=lambda", instruction="Hello.")
    envelope = response.json()
    assert response.status_code == envelope["statusCode"] == 200
    assert envelope["headers"] == {"Content-Type": "application/json"}
    assert json.loads(envelope["body"]) == predict(url, instruction="Hello.").json()


def test_the_lambda_envelope_of_an_error_has_its_true_status_in_both_places(url):
    response = predict(url, "?format=lambda", instruction="")
    assert response.status_code == response.json()["statusCode"] == 400
    assert json.loads(response.json()["body"])["error"]["param"] == "instruction"


def test_another_format_is_refused(url):
    response = predict(url, "?format=xml", instruction="Hello.")
    assert response.status_code == 400
    assert error_of(response)["param"] == "format"


def test_metadata_is_the_lineage_with_the_bentos_tag(url, tag):
    assert requests.get(f"{url}/metadata", timeout=10).json() == LINEAGE | {"bento": tag}


@pytest.mark.parametrize("path", ["/livez", "/readyz", "/metrics"])
def test_health_and_metrics_are_bentomls(url, path):
    assert requests.get(url + path, timeout=10).status_code == 200


def test_the_schema_describes_request_answer_and_errors(url):
    schema = requests.get(f"{url}/docs.json", timeout=10).json()
    predict = schema["paths"]["/predict"]["post"]
    fields = predict["requestBody"]["content"]["application/json"]["schema"]["properties"]
    assert fields.keys() == PredictRequest.model_fields.keys()
    assert {"200", "400", "413", "504"} <= predict["responses"].keys()
    assert "/metadata" in schema["paths"]


def test_requests_at_the_same_time_get_their_own_answers(url, model, tokenizer):
    instructions = [f"Say the number {i}." for i in range(8)]
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda text: predict(url, instruction=text).json()["answer"], instructions))
    assert answers == [answer_text(expected(model, tokenizer, text), tokenizer) for text in instructions]


def test_a_client_that_hangs_up_in_the_middle_of_its_body_does_no_harm(url):
    parts = urlsplit(url)
    with socket.create_connection((parts.hostname, parts.port), timeout=10) as connection:
        connection.sendall(b'POST /predict HTTP/1.1\r\nHost: a\r\nContent-Length: 100\r\n\r\n{"instr')
    assert predict(url, instruction="Hello.").status_code == 200


@pytest.fixture
def answerer(base_dir, adapter_dir):
    answerer = Answerer(base_dir, adapter_dir, "fp32", "", RequestLog(""))
    yield answerer
    answerer.close()


async def reply_to(answerer: Answerer, seconds: float = 60, max_new_tokens: int = 8) -> tuple[str, Reply]:
    prompt = answerer.tokenizer.encode_ordinary(format_prompt("Hello."))
    config = answerer.config(max_new_tokens, "max_new_tokens")
    (reply,) = answerer.submit([Wanted(prompt, config, TUNED, monotonic() + seconds)], "instruction")
    return (await reply.whole()).text, reply


def ask(answerer: Answerer, **values) -> tuple[str, Reply]:
    return asyncio.run(reply_to(answerer, **values))


def test_a_body_that_does_not_come_is_waited_for_until_the_deadline(monkeypatch):
    monkeypatch.setattr(routes, "DEADLINE", 0.05)

    async def receive():
        await asyncio.sleep(60)

    request = Request({"type": "http", "headers": []}, receive)
    with pytest.raises(RequestError) as error:
        asyncio.run(routes._read(request, PredictRequest))
    assert error.value.status == 408


def test_decoding_ends_at_the_deadline(answerer, monkeypatch):
    step = answerer.engine._step
    monkeypatch.setattr(answerer.engine, "_step", lambda: (sleep(0.02), step()))
    with pytest.raises(RequestError) as error:
        ask(answerer, seconds=0.1, max_new_tokens=60)
    assert error.value.status == 504
    assert answerer.engine.stats()["running"] == 0
    assert ask(answerer, max_new_tokens=1)[1].finish_reason is not None


def test_a_cancelled_answer_leaves_the_engine(answerer, monkeypatch):
    step = answerer.engine._step
    monkeypatch.setattr(answerer.engine, "_step", lambda: (sleep(0.02), step()))

    async def give_up() -> None:
        await asyncio.wait_for(reply_to(answerer, max_new_tokens=60), 0.1)

    with pytest.raises(TimeoutError):
        asyncio.run(give_up())
    sleep(0.2)
    assert answerer.engine.stats()["running"] == 0


def test_more_than_the_queue_holds_is_a_429_that_says_when_to_come_back(answerer, monkeypatch):
    monkeypatch.setattr(answerer.engine, "max_queue", 0)
    with pytest.raises(RequestError) as error:
        ask(answerer)
    assert error.value.status == 429
    assert error.value.response().headers["Retry-After"] == "1"


def test_an_answer_that_the_engine_drops_is_a_503(answerer, monkeypatch):
    monkeypatch.setattr(answerer.engine, "_step", lambda: 1 / 0)
    with pytest.raises(RequestError) as error:
        ask(answerer)
    assert error.value.status == 503


def test_end_of_text_is_a_stop_and_no_part_of_the_answer(answerer, monkeypatch):
    tokens = iter([5, answerer.tokenizer.eot_token])
    monkeypatch.setattr(answerer.engine, "_sample", lambda hidden, requests: [next(tokens)])
    text, reply = ask(answerer)
    assert reply.finish_reason == "stop"
    assert text == answerer.tokenizer.decode([5]).strip()
    assert usage([reply]).completion_tokens == 2


def test_weights_of_a_format_that_there_is_not_are_refused(base_dir, adapter_dir):
    with pytest.raises(ValueError, match="GPT2_WEIGHTS is 'int4'; it must be one of auto, fp32, bf16, int8"):
        Answerer(base_dir, adapter_dir, "int4", "", RequestLog(""))


def test_the_answer_of_a_client_that_is_gone_is_given_up(tag):
    body = json.dumps({"instruction": "Hello.", "max_new_tokens": 80}).encode()
    head = f"POST /predict HTTP/1.1\r\nHost: a\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    with serve(tag) as url:
        parts = urlsplit(url)
        for i in range(60):
            with socket.create_connection((parts.hostname, parts.port), timeout=10) as connection:
                connection.sendall(head + body)
                sleep(i % 3 * 0.01)  # before it is read, when it is read, and in the middle of the answer
        assert predict(url, instruction="Hello.").status_code == 200
        metrics = requests.get(f"{url}/metrics", timeout=10).text
    codes = re.findall(r'request_total{endpoint="/predict",http_response_code="(\d+)".* (\d+)', metrics)
    counts = {code: float(count) for code, count in codes}
    assert counts["499"] > 25  # the others had their answer before they could hang up
    assert set(counts) == {"200", "499"}
