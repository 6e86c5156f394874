"""POST /predict and related routes, over HTTP against a running Bento."""

import gzip
import http.client
import json
import re
import socket
import subprocess
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from urllib.parse import urlsplit

import pytest
import requests
from pydantic import ValidationError

from bentos.limits import MAX_BODY, MAX_ERRORS, MAX_TOTAL_BODY, SMALL_BODY
from bentos.openai.protocol import ChatRequest, CompletionRequest
from bentos.schemas import DEFAULTS, PredictRequest
from deploy import bento
from gpt2core.files import directory_sha256
from gpt2core.prompt import format_prompt
from tests.bentos.client import answer_of, error_of, events, metric, predict, tokens_of
from tests.helpers import wait_until


def post(url: str, body: bytes, content_type: str | None = "application/json") -> requests.Response:
    headers = {} if content_type is None else {"Content-Type": content_type}
    return requests.post(f"{url}/predict", data=body, headers=headers, timeout=60)


@pytest.mark.parametrize(
    ("instruction", "input"), [("Name the capital.", "France"), ("Say something.", ""), ("é ü 東", "🙂")]
)
def test_the_answer_is_the_models(url, tuned, tokenizer, instruction, input):
    answer = predict(url, instruction=instruction, input=input).json()["answer"]
    assert answer == answer_of(tuned, tokenizer, instruction, input)


def test_an_error_of_invalid_http_names_the_run_too(url):
    address = urlsplit(url)
    with socket.create_connection((address.hostname, address.port), 10) as connection:
        connection.sendall(b"no request\r\n\r\n")
        response = connection.makefile("rb").read()
    assert response.startswith(b"HTTP/1.1 400 ")
    assert b"\r\nX-Run-Id: run-17\r\n" in response


def test_a_response_has_the_finish_reason_token_counts_bento_and_adapter(url, tuned, tokenizer, bento_tag, adapter_dir):
    response = predict(url, instruction="Hello.", input="x")
    prompt = format_prompt("Hello.", "x")
    n_prompt = len(tokenizer.encode_ordinary(prompt))
    n_completion = len(tokens_of(tuned, tokenizer, prompt))
    assert response.headers["X-Run-Id"] == "run-17"
    assert response.json() == {
        "answer": answer_of(tuned, tokenizer, "Hello.", "x"),
        "finish_reason": "length",
        "usage": {
            "prompt_tokens": n_prompt,
            "completion_tokens": n_completion,
            "total_tokens": n_prompt + n_completion,
        },
        "model": bento_tag,
        "adapter": {"name": "gpt2-instruct", "sha256": directory_sha256(adapter_dir)},
    }


def test_the_adapter_of_the_request_answers(url, base, tuned, tokenizer):
    for adapter, model in (("base", base), ("gpt2-instruct", tuned)):
        response = predict(url, instruction="Say hello.", adapter=adapter).json()
        assert response["answer"] == answer_of(model, tokenizer, "Say hello.")
        assert (response["adapter"] is None) == (adapter == "base")
    response = predict(url, instruction="Say hello.", adapter="none")
    assert response.status_code == 404
    assert "gpt2-instruct, base" in error_of(response)["message"]


@pytest.mark.parametrize("content_type", [None, "application/json", "text/plain", "application/x-www-form-urlencoded"])
def test_the_body_is_json_whatever_its_header_says(url, content_type):
    response = post(url, b'{"instruction": "Hello.", "max_new_tokens": 8}', content_type)
    assert response.json() == predict(url, instruction="Hello.").json()


def test_a_bare_curl_works(url):
    curl = ["curl", "-sS", "-X", "POST", f"{url}/predict", "-d", '{"instruction": "Hello.", "max_new_tokens": 8}']
    done = subprocess.run(curl, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == predict(url, instruction="Hello.").json()


def test_sampling_with_a_seed_is_repeatable_and_equals_gpt2cores(url, tuned, tokenizer):
    sampling = {"temperature": 1.5, "top_k": 50, "top_p": 0.9}
    one, same, other = (
        predict(url, instruction="Hello.", seed=seed, **sampling).json()["answer"] for seed in (1, 1, 2)
    )
    assert one == same == answer_of(tuned, tokenizer, "Hello.", seed=1, **sampling)
    assert one != other


def test_the_defaults_are_gpt2cores(url, tuned, tokenizer):
    answer = requests.post(f"{url}/predict", json={"instruction": "Hello."}, timeout=60).json()["answer"]
    assert answer == answer_of(tuned, tokenizer, "Hello.", max_new_tokens=DEFAULTS.max_new_tokens)


def test_an_answer_ends_before_the_first_stop_text(url):
    whole = predict(url, instruction="Hello.", max_new_tokens=20).json()["answer"]
    stop = whole[len(whole) // 2 :][:3]
    for value in (stop, ["never there", stop]):
        response = predict(url, instruction="Hello.", max_new_tokens=20, stop=value).json()
        assert response["answer"] == whole[: whole.index(stop)].rstrip()
        assert response["finish_reason"] == "stop"
        assert response["usage"]["completion_tokens"] < 20


def test_an_answer_is_limited_by_the_context(url, tuned):
    n_positions = tuned.config.n_positions
    response = predict(url, instruction="Hello.", max_new_tokens=n_positions).json()
    assert response["usage"]["total_tokens"] == n_positions
    assert response["finish_reason"] == "length"


def test_null_is_the_default_of_every_optional_field(url):
    optional = dict.fromkeys(PredictRequest.model_fields.keys() - {"instruction"})
    response = predict(url, instruction="Hello.", **optional)
    assert response.status_code == 200
    default = predict(url, instruction="Hello.", max_new_tokens=DEFAULTS.max_new_tokens)
    assert response.json()["answer"] == default.json()["answer"]


@pytest.mark.parametrize("temperature", [1e-40, 5e-324, 1e39, 1e300])
@pytest.mark.parametrize("controls", [{}, {"min_tokens": 5}])
def test_extreme_temperatures_are_answered(url, temperature, controls):
    assert predict(url, instruction="Hello.", temperature=temperature, seed=0, **controls).status_code == 200


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (b"", None),
        (b"[1]", None),
        (b"\xff\xfe", None),
        (b'{"instruction": "\\ud800"}', None),
        (b"[" * 100_000, None),
        (b"{}", "instruction"),
        (b'{"instruction": " \\n"}', "instruction"),
        (b'{"instruction": 3}', "instruction"),
        (b'{"instruction": null}', "instruction"),
        (b'{"instruction": "a", "temperature": true}', "temperature"),
        (b'{"instruction": "a", "temperature": "0.5"}', "temperature"),
        (b'{"instruction": "a", "temperature": NaN}', "temperature"),
        (b'{"instruction": "a", "temperature": 1e999}', "temperature"),
        (b'{"instruction": "a", "temperature": -1}', "temperature"),
        (b'{"instruction": "a", "top_k": 0}', "top_k"),
        (b'{"instruction": "a", "top_k": 1.5}', "top_k"),
        (b'{"instruction": "a", "top_k": 1e30}', "top_k"),
        (b'{"instruction": "a", "top_p": 0}', "top_p"),
        (b'{"instruction": "a", "top_p": 1.1}', "top_p"),
        (b'{"instruction": "a", "max_new_tokens": 0}', "max_new_tokens"),
        (b'{"instruction": "a", "max_new_tokens": 129}', "max_new_tokens"),
        (b'{"instruction": "a", "seed": -1}', "seed"),
        (b'{"instruction": "a", "seed": 99999999999999999999}', "seed"),
        (b'{"instruction": "a", "stop": ""}', "stop"),
        (b'{"instruction": "a", "stop": [1]}', "stop"),
        (b'{"instruction": "a", "stop": "%s"}' % (b"b" * 401), "stop"),
        (b'{"instruction": "a", "stop": ["%s"]}' % (b"b" * 401), "stop"),
        (b'{"instruction": "a", "temprature": 1}', "temprature"),
    ],
)
def test_an_invalid_request_is_a_400_that_names_the_field(url, body, param):
    response = post(url, body)
    assert response.status_code == 400
    assert error_of(response)["param"] == param


@pytest.mark.parametrize(
    ("field", "values"),
    [("instruction", {"instruction": "word " * 200}), ("input", {"instruction": "a", "input": "word " * 200})],
)
def test_a_prompt_beyond_the_context_is_a_400_that_names_its_length(url, tokenizer, field, values):
    response = predict(url, **values)
    n = len(tokenizer.encode_ordinary(format_prompt(values["instruction"], values.get("input", ""))))
    assert response.status_code == 400
    assert error_of(response)["type"] == "context_length_exceeded"
    assert error_of(response)["param"] == field
    limit = "this model's maximum context length is 128 tokens"  # LiteLLM looks for these words
    assert error_of(response)["message"] == f"{limit}, but the prompt has {n}; shorten it"


@pytest.mark.parametrize(
    ("body", "encoding", "status", "reason"),
    [
        (b'\xef\xbb\xbf{"instruction": "a", "max_new_tokens": 1}', "identity", 200, ""),  # a byte order mark
        ('{"instruction": "é"}'.encode("latin-1"), "identity", 400, "JSON in UTF-8, which its byte 17 (0xe9) is not"),
        (gzip.compress(b'{"instruction": "a"}'), "gzip", 415, "Content-Encoding is gzip; send the body uncompressed"),
    ],
)
def test_the_body_is_uncompressed_json_in_utf8(url, body, encoding, status, reason):
    response = requests.post(f"{url}/predict", data=body, headers={"Content-Encoding": encoding}, timeout=60)
    assert response.status_code == status
    assert reason in response.text


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"prompt": ["a"] * 65}, "prompt: List should have at most 64 items after validation, not 65"),
        ({"prompt": ["a"] * 22, "n": 3}, "22 prompts with n=3; one request may have at most 64 completions"),
        ({"prompt": ["a", [1]]}, "prompt.1: Input should be a valid string"),
        ({"prompt": [[1], [1, "a"]]}, "prompt.1.1: Input should be a valid integer"),
        ({"prompt": []}, "prompt: List should have at least 1 item after validation, not 0"),
        ({"prompt": 5}, "prompt: Input should be a valid string"),
        ({"stop": ["a"] * 17}, "stop: List should have at most 16 items after validation, not 17"),
    ],
)
def test_the_error_of_a_field_with_several_types_is_about_the_one_that_was_sent(url, body, message):
    response = requests.post(f"{url}/v1/completions", json=body, timeout=60)
    assert (response.status_code, error_of(response)["message"]) == (400, message)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"instruction": " "}, "instruction: must not be empty or blank"),
        ({"instruction": "a", "temprature": 1}, "temprature: unknown field; did you mean temperature?"),
        ({"instruction": "a", "colour": 1}, "colour: unknown field"),
    ],
)
def test_the_error_of_a_field_says_what_to_change(url, body, message):
    assert error_of(predict(url, **body))["message"] == message


def test_a_list_of_wrong_items_has_one_error_not_one_per_item():
    for model, body in ((ChatRequest, {"messages": [{}] * 99}), (CompletionRequest, {"prompt": [1.5] * 99})):
        with pytest.raises(ValidationError) as caught:
            model.model_validate_json(json.dumps(body))
        assert caught.value.error_count() <= 4  # of the types of a prompt


@pytest.mark.parametrize("field", [{}, {"logit_bias": {}}])
def test_errors_beyond_a_limit_are_counted_instead_of_listed(url, field):
    unknown = {f"field{i}": 1 for i in range(MAX_ERRORS + 1)}
    body = dict.fromkeys(field, unknown) or unknown
    response = requests.post(f"{url}/v1/completions", json=body, timeout=60)
    assert response.status_code == 400
    assert re.fullmatch(r"the body has \d{4} unknown or invalid values", error_of(response)["message"])


@pytest.mark.parametrize("content_type", ["multipart/form-data", "multipart/form-data; boundary=x"])
def test_a_multipart_body_is_a_400(url, content_type):
    response = post(url, b"--x", content_type)
    assert response.status_code == 400
    assert "not multipart" in error_of(response)["message"]


def test_a_body_beyond_the_limit_is_a_413(url):
    response = post(url, json.dumps({"instruction": "a" * MAX_BODY}).encode())
    assert response.status_code == 413
    error_of(response)


def test_a_chunked_body_is_not_read_beyond_the_limit(url):
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=30)
    connection.putrequest("POST", "/predict")
    connection.putheader("Transfer-Encoding", "chunked")
    connection.endheaders()
    sent, closed = 0, False
    try:
        while sent < 50 * MAX_BODY:
            connection.send(b"10000\r\n" + b"a" * 0x10000 + b"\r\n")
            sent += 0x10000
        connection.send(b"0\r\n\r\n")
    except OSError:  # the server closed the connection, as it may
        closed = True
    try:
        assert connection.getresponse().status == 413
    except OSError:
        assert closed


def test_clients_that_send_large_bodies_slowly_do_not_fill_the_memory(url):
    parts = urlsplit(url)
    head = f"POST /predict HTTP/1.1\r\nHost: a\r\nContent-Length: {MAX_BODY}\r\n\r\n".encode()
    large = json.dumps({"instruction": "Hello.", "input": " " * 2 * SMALL_BODY})
    with ExitStack() as clients:
        for _ in range(MAX_TOTAL_BODY // MAX_BODY + 2):
            client = clients.enter_context(socket.create_connection((parts.hostname, parts.port), timeout=30))
            client.sendall(head + b" " * (MAX_BODY - 1))
        wait_until(lambda: post(url, large.encode()).status_code == 429, 30, "a refused body")
        assert predict(url, instruction="Hello.").status_code == 200
    wait_until(lambda: post(url, large.encode()).status_code != 429, 30, "an accepted body")


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/predict", 405),
        ("POST", "/nothing", 404),
        ("PUT", "/metadata", 405),
        ("POST", "/predict/", 404),
        ("GET", "/v1/models/", 404),
    ],
)
def test_an_unknown_route_has_the_shape_of_every_error(url, method, path, status):
    response = requests.request(method, url + path, timeout=10, allow_redirects=False)
    assert response.status_code == status
    error_of(response)


@pytest.mark.parametrize(
    ("path", "hint"),
    [
        ("/chat/completions", "; did you mean /v1/chat/completions?"),
        ("/v1/chat/completions/", "; did you mean /v1/chat/completions?"),
        ("/v1/chat/completions/chat/completions", "; did you mean /v1/chat/completions?"),
        ("/v1/responses", "; this server has no Responses API: make the client use /v1/chat/completions"),
        ("/responses", "; this server has no Responses API: make the client use /v1/chat/completions"),
        ("/v1/embeddings", ""),
        ("/" + 50_000 * "a", ""),
    ],
)
def test_an_unknown_route_names_the_known_one_that_ends_like_it(url, path, hint):
    message = error_of(requests.post(url + path, timeout=10))["message"]
    assert message == f"POST {path}: Not Found{hint}"


def test_the_lambda_envelope_holds_the_response_and_its_status(url):
    response = predict(url, "?format=lambda", instruction="Hello.", stream=False)
    envelope = response.json()
    assert response.status_code == envelope["statusCode"] == 200
    assert envelope["headers"] == {"Content-Type": "application/json"}
    assert json.loads(envelope["body"]) == predict(url, instruction="Hello.").json()


def test_the_lambda_envelope_of_an_error_has_its_status_in_both_places(url):
    response = predict(url, "?format=lambda", instruction="")
    assert response.status_code == response.json()["statusCode"] == 400
    assert json.loads(response.json()["body"])["error"]["param"] == "instruction"


def test_a_stream_in_the_lambda_envelope_is_refused(url):
    response = predict(url, "?format=lambda", instruction="Hello.", stream=True)
    error = json.loads(response.json()["body"])["error"]
    assert response.status_code == response.json()["statusCode"] == 400
    assert (error["param"], error["message"]) == (
        "stream",
        "stream is true, but format=lambda is one whole response; leave out one of them",
    )


def test_another_format_is_refused(url):
    response = predict(url, "?format=xml", instruction="Hello.")
    assert response.status_code == 400
    assert error_of(response)["param"] == "format"


def test_a_stream_is_the_answer_in_parts(url):
    whole = predict(url, instruction="Say hello.", max_new_tokens=20).json()
    body = {"instruction": "Say hello.", "max_new_tokens": 20, "stream": True}
    with requests.post(f"{url}/predict", json=body, stream=True, timeout=60) as response:
        assert response.headers["Content-Type"].startswith("text/event-stream")
        parts = events(response)
    assert "".join(part["answer"] for part in parts) == whole["answer"]
    assert parts[-1] == whole | {"answer": parts[-1]["answer"]}


def test_an_error_before_a_stream_begins_has_its_status(url):
    response = predict(url, instruction="", stream=True)
    assert response.status_code == 400
    assert error_of(response)["param"] == "instruction"


def test_metadata_is_the_lineage_with_the_bentos_tag(url, bento_tag):
    metadata = requests.get(f"{url}/metadata", timeout=10).json()
    assert metadata["bento"] == bento_tag
    assert metadata == bento.lineage(bento_tag).to_json()


@pytest.mark.parametrize("path", ["/livez", "/readyz", "/health", "/metrics"])
def test_health_and_metrics_are_bentomls(url, path):
    assert requests.get(url + path, timeout=10).status_code == 200


@pytest.mark.parametrize(
    "path", ["/", "/v1/models", "/v1/models/base", "/metadata", "/livez", "/readyz", "/health", "/metrics"]
)
def test_head_answers_where_get_does(url, path):
    get, head = requests.get(url + path, timeout=10), requests.head(url + path, timeout=10)
    assert head.status_code == get.status_code == 200
    assert head.headers["Content-Type"] == get.headers["Content-Type"]
    assert head.content == b""
    assert requests.head(f"{url}/predict", timeout=10).status_code == 405


def test_the_schema_describes_requests_responses_and_errors(url):
    schema = requests.get(f"{url}/docs.json", timeout=10).json()
    predict = schema["paths"]["/predict"]["post"]
    fields = predict["requestBody"]["content"]["application/json"]["schema"]["properties"]
    assert fields.keys() == PredictRequest.model_fields.keys()
    assert {"200", "400", "413", "504"} <= predict["responses"].keys()
    assert "/metadata" in schema["paths"]


def test_the_openapi_document_is_also_at_fastapis_path(url):
    documents = [requests.get(url + path, timeout=10) for path in ("/docs.json", "/openapi.json")]
    assert documents[1].status_code == 200
    assert documents[1].json() == documents[0].json()
    assert requests.head(f"{url}/openapi.json", timeout=10).status_code == 200


def test_concurrent_requests_get_their_own_answers(url, tuned, tokenizer):
    instructions = [f"Say the number {i}." for i in range(8)]
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda text: predict(url, instruction=text).json()["answer"], instructions))
    assert answers == [answer_of(tuned, tokenizer, text) for text in instructions]


def test_a_client_that_disconnects_while_sending_its_body_does_no_harm(url):
    parts = urlsplit(url)
    with socket.create_connection((parts.hostname, parts.port), timeout=10) as connection:
        connection.sendall(b'POST /predict HTTP/1.1\r\nHost: a\r\nContent-Length: 100\r\n\r\n{"instr')
    assert predict(url, instruction="Hello.").status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_disconnect_cancels_the_completion(url, stream):
    body = json.dumps({"instruction": "Hello.", "max_new_tokens": 80, "stream": stream}).encode()
    head = f"POST /predict HTTP/1.1\r\nHost: a\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    parts = urlsplit(url)
    cancelled = 'gpt2_requests_total{adapter="gpt2-instruct",finish_reason="cancelled"}'
    before = metric(url, cancelled)

    def disconnect() -> bool:
        with socket.create_connection((parts.hostname, parts.port), timeout=10) as connection:
            connection.sendall(head + body)
            if stream:
                assert b"200" in connection.recv(100)
            else:
                wait_until(lambda: metric(url, "gpt2_running_requests") == 1, 20, "decoding")
        return metric(url, cancelled) > before

    wait_until(disconnect, 60, "a cancelled completion")
    wait_until(lambda: metric(url, "gpt2_running_requests") == 0, 20, "an idle engine")
    if not stream:
        path = 'endpoint="/predict",http_response_code="499"'
        assert metric(url, f"bentoml_service_request_total{{{path}") >= 1
