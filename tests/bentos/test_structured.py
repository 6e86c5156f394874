"""Structured output, echo, and the routes that vLLM's clients use."""

import asyncio
import json
import re
from random import Random
from threading import Event, current_thread, main_thread
from types import SimpleNamespace

import pytest
import requests
import torch
from starlette.applications import Starlette
from starlette.requests import Request

from bentos import grammar
from bentos.dependencies import Served
from bentos.errors import ServiceError
from bentos.grammar import GrammarCompiler
from bentos.openai import tokenize
from bentos.schemas import Structure
from gpt2core.config import GenerationConfig
from gpt2core.engine import Engine
from tests.bentos.client import error_of, metric, predict
from tests.helpers import make_lineage


def random_schema(random: Random, depth: int = 0) -> dict:
    """A JSON schema all of whose instances are short."""
    kinds = ["integer", "boolean", "enum", "string", "null"] + (["object", "array"] if depth < 2 else [])
    kind = random.choice(kinds)
    if kind == "enum":
        return {"enum": random.sample(["a", "é€", 'quote "', 3, None, True, "### Response:"], 3)}
    if kind == "integer":
        return {"type": "integer", "minimum": -9, "maximum": random.randint(0, 99)}
    if kind == "string":
        return {"type": "string", "maxLength": random.randint(0, 4)}
    if kind == "array":
        return {"type": "array", "items": random_schema(random, depth + 1), "maxItems": 2}
    if kind == "object":
        properties = {name: random_schema(random, depth + 1) for name in random.sample(["a", "b c", "ü"], 2)}
        return {
            "type": "object",
            "properties": properties,
            "required": list(properties)[:1],
            "additionalProperties": False,
        }
    return {"type": kind}


def conforms(value, schema: dict) -> bool:
    if "enum" in schema:
        return any(value == one and type(value) is type(one) for one in schema["enum"])
    if schema["type"] == "object":
        known = schema["properties"]
        return (
            isinstance(value, dict)
            and set(schema["required"]) <= value.keys() <= known.keys()
            and all(conforms(each, known[name]) for name, each in value.items())
        )
    if schema["type"] == "array":
        return isinstance(value, list) and len(value) <= 2 and all(conforms(each, schema["items"]) for each in value)
    if schema["type"] == "integer":
        return type(value) is int and schema["minimum"] <= value <= schema["maximum"]
    if schema["type"] == "string":
        return isinstance(value, str) and len(value) <= schema["maxLength"]
    return type(value) is {"boolean": bool, "null": type(None)}[schema["type"]]


def test_completions_of_500_random_schemas_conform(tuned, tokenizer):
    """Drawn from random weights at a high temperature: whatever a mask lets through occurs."""
    random, compiler = Random(0), GrammarCompiler(tokenizer)
    schemas = [random_schema(random) for _ in range(500)]
    limit = tuned.config.n_positions - 1
    finished = 0
    with Engine(tuned, 16, "fp32") as engine:
        requests = []
        for seed, schema in enumerate(schemas):
            config = GenerationConfig(limit, temperature=3.0, seed=seed, eos_id=tokenizer.eot_token)
            [own] = compiler.compile(Structure("json", schema, "guided_json"), 1)
            requests.append(engine.submit([1], config, grammar=own))
        for schema, request in zip(schemas, requests, strict=True):
            tokens = [token for token in request.result(120) if token != tokenizer.eot_token]
            if request.finish_reason == "stop":
                finished += 1
                assert conforms(json.loads(tokenizer.decode(tokens)), schema)
    compiler.close()
    assert finished > 490


@pytest.mark.parametrize(
    ("fields", "accepts"),
    [
        ({"guided_choice": ["red", 'a "b"\n', "### Response: é"]}, ["red", 'a "b"\n', "### Response: é"].__contains__),
        ({"guided_regex": r"[ab]{3}-[0-9]"}, re.compile(r"[ab]{3}-[0-9]").fullmatch),
        ({"guided_json": {"type": "integer", "minimum": 0, "maximum": 30}}, lambda text: 0 <= json.loads(text) <= 30),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"enum": [[1], "a"]}}}},
            lambda text: json.loads(text) in ([1], "a"),
        ),
        ({"response_format": {"type": "json_object", "schema": {"const": 7}}}, "7".__eq__),  # llama.cpp's form
        ({"guided_choice": ["red"], "stop": []}, "red".__eq__),
        ({"structured_outputs": {"choice": ["red"], "json": None, "grammar": None}}, "red".__eq__),
        ({"structured_outputs": {"regex": "[ab]{3}", "disable_fallback": True}}, re.compile("[ab]{3}").fullmatch),
        ({"structured_outputs": {"json": '{"const": 7}'}}, "7".__eq__),
        ({"structured_outputs": {"json_object": True}}, lambda text: text.startswith("{")),
    ],
)
def test_every_route_returns_text_that_matches(url, fields, accepts):
    body = {"temperature": 2.0, "seed": 1, "max_tokens": 40} | fields
    texts = [predict(url, instruction="Go.", max_new_tokens=40, temperature=2.0, **fields).json()["answer"]]
    chat = requests.post(
        f"{url}/v1/chat/completions", json={"messages": [{"role": "user", "content": "Go."}]} | body, timeout=60
    )
    texts.append(chat.json()["choices"][0]["message"]["content"])
    plain = requests.post(f"{url}/v1/completions", json={"prompt": ["a", "b"], "n": 2} | body, timeout=60).json()
    texts += [choice["text"] for choice in plain["choices"]]
    assert len(texts) == 6
    assert all(accepts(text) for text in texts), texts


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"guided_regex": "a", "guided_choice": ["b"]}, "guided_choice"),
        ({"guided_regex": "a", "stop": "b"}, "stop"),
        ({"guided_regex": "a", "structured_outputs": {"regex": "a"}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "("}}, "structured_outputs"),
        ({"structured_outputs": {"grammar": 'root ::= "a"'}}, "structured_outputs"),
        ({"structured_outputs": {"disable_additional_properties": True}}, "structured_outputs"),
        ({"guided_json": "{"}, "guided_json"),
        ({"guided_json": "[" * 5_000}, "guided_json"),
        ({"guided_json": '{"type": "array", "items": ' * 500 + "{}" + "}" * 500}, "guided_json"),
        ({"guided_json": {"$ref": "#"}}, "guided_json"),
        ({"guided_json": '{"const": Infinity}'}, "guided_json"),
        ({"guided_json": '{"enum": [1e400]}'}, "guided_json"),
        ({"guided_json": {"x-guidance": {"lenient": True}, "not": {}}}, "guided_json"),
        ({"response_format": {"type": "json_object", "strict": True}}, "response_format"),
        ({"guided_regex": r"[^\s\S]"}, "guided_regex"),
        ({"guided_regex": r"(\p{L}{1,500}|\w{1,300}){1,100}", "max_new_tokens": 80}, "guided_regex"),
        ({"guided_regex": "a{100000}"}, "guided_regex"),
        ({"guided_regex": "(a{3000}){3000}"}, "guided_regex"),
    ],
)
def test_structures_that_cannot_be_followed_are_refused(url, fields, param):
    response = predict(url, instruction="Go.", **fields)
    assert response.status_code == 400
    assert error_of(response)["param"] == param
    assert "\n" not in error_of(response)["message"]


def test_the_error_of_an_invalid_regex_has_the_cause(url):
    response = predict(url, instruction="Go.", guided_regex="[")
    assert error_of(response)["message"] == "guided_regex: invalid regex: unclosed character class"


def patterns(n: int) -> dict:
    """A schema that combines n patterns."""
    return {"allOf": [{"type": "string", "pattern": f"(a|b)*a(a|b){{{i}}}"} for i in range(n)]}


@pytest.mark.parametrize(
    ("kind", "value", "message"),
    [
        ("regex", "a" * 16_001, "it has 16001 characters; it must have at most 16000"),
        ("choice", ["a" * 9_000, "b" * 9_000], "it has 18008 characters; it must have at most 16000"),
        ("json", {"const": "a" * 16_000}, "it has 16013 characters; it must have at most 16000"),
        ("json", '{"type": "string", "pattern": "%s"}' % ("a" * 16_000), "it has 16033 characters"),
        ("json", patterns(29), "it has 29 different patterns and formats; it must have at most 10"),
        ("json", {"patternProperties": {f"^{i}": {} for i in range(11)}}, "it has 11 different patterns and formats"),
        ("json", {"type": "integer", "multipleOf": 99_999_989}, "the least common multiple of its multipleOf"),
        ("json", {"type": "number", "multipleOf": 0.99999989}, "the least common multiple of its multipleOf"),
        ("json", {"allOf": [{"multipleOf": n} for n in (9_973, 0, 9_967)]}, "the least common multiple"),
        ("json", '{"multipleOf": 1e999}', "multipleOf is inf; it must be finite"),
    ],
)
def test_structures_that_would_compile_for_minutes_are_refused_before(tokenizer, monkeypatch, kind, value, message):
    compiler = GrammarCompiler(tokenizer)
    monkeypatch.setattr(grammar, "llguidance", None)
    with pytest.raises(ServiceError) as error:
        compiler.compile(Structure(kind, value, "field"), 1)
    compiler.close()
    assert error.value.message.startswith(f"field: {message}")


def test_ordinary_numbers_and_patterns_are_accepted(tokenizer):
    properties = {
        "price": {"type": "number", "multipleOf": 0.01},
        "share": {"type": "integer", "multipleOf": 25},
        "pattern": {"type": "string", "pattern": r"^\w{1,300}$"},  # also as a property's name
        **{name: {"type": "string", "format": name} for name in ("date-time", "email", "uuid", "ipv4")},
        **{f"text{i}": {"type": "string", "maxLength": 2_000} for i in range(100)},
    }
    compiler = GrammarCompiler(tokenizer)
    assert compiler.compile(Structure("json", {"type": "object", "properties": properties}, "guided_json"), 2)
    assert compiler.compile(Structure("regex", "a" * 2_000, "guided_regex"), 1)
    compiler.close()


@pytest.mark.parametrize("regex", ["[A-Za-z ]{30}", "([a-z]+ ){1,5}[.]", "[a-zA-Z ]{1,14}", '.*"', "[a-f ]+"])
def test_slices_change_no_mask(tokenizer, monkeypatch, regex):
    random, structure = Random(0), Structure("regex", regex, "guided_regex")
    compiler = GrammarCompiler(tokenizer)
    [sliced] = compiler.compile(structure, 1)
    monkeypatch.setattr(grammar, "SLICES", ())
    plain_compiler = GrammarCompiler(tokenizer)
    [plain] = plain_compiler.compile(structure, 1)
    for _ in range(20):
        if plain.complete:
            break
        assert sliced.allowed() == plain.allowed()
        token = random.choice([i for i in range(tokenizer.n_vocab) if plain.allowed()[i // 8] >> i % 8 & 1])
        sliced.accept(token)
        plain.accept(token)
    compiler.close()
    plain_compiler.close()


def test_a_mask_that_is_not_ready_in_time_is_an_error_of_its_completion(tokenizer, monkeypatch):
    monkeypatch.setattr(grammar, "MASK_TIMEOUT", 0.01)
    compiler, go_on = GrammarCompiler(tokenizer), Event()
    [late, other] = compiler.compile(Structure("regex", "[ab]{9}", "guided_regex"), 2)
    compiler._masks.submit(go_on.wait)
    late.accept(tokenizer.encode("a")[0])
    with pytest.raises(ServiceError) as error:
        late.allowed()
    took = "computing the allowed tokens took more than 0.01 seconds; simplify it"
    assert error.value.message == f"guided_regex: {took}"
    go_on.set()
    monkeypatch.setattr(grammar, "MASK_TIMEOUT", 60)
    other.accept(tokenizer.encode("a")[0])
    assert any(other.allowed())
    compiler.close()


@pytest.mark.parametrize("stream", [False, True])
def test_echo_gives_the_log_probabilities_of_the_prompt(client, tuned, tokenizer, stream):
    prompt = "The capital of the country is a town"
    ids = tokenizer.encode_ordinary(prompt)
    values = {"model": "gpt2-instruct", "prompt": prompt, "max_tokens": 2, "echo": True, "logprobs": 2}
    client.completions.create(**values | {"echo": False})  # fills the prefix cache
    if stream:
        chunks = [chunk.choices[0] for chunk in client.completions.create(**values, stream=True)]
        text = "".join(chunk.text for chunk in chunks)
        own = [one for chunk in chunks for one in chunk.logprobs.token_logprobs]
    else:
        choice = client.completions.create(**values).choices[0]
        text, own = choice.text, choice.logprobs.token_logprobs
        assert choice.logprobs.top_logprobs[0] is None
        assert choice.logprobs.text_offset[:2] == [0, len(tokenizer.decode(ids[:1]))]
    assert text.startswith(prompt)
    with torch.inference_mode():
        expected = tuned(torch.tensor([ids]))[0].log_softmax(-1)
    assert own[0] is None
    assert own[1 : len(ids)] == pytest.approx([float(expected[i, id]) for i, id in enumerate(ids[1:])], abs=1e-4)
    assert len(own) == len(ids) + 2


@pytest.mark.parametrize("stream", [False, True])
def test_no_tokens_and_echo_score_the_prompt_alone(client, stream):
    prompt = "The capital of the country is a town"
    values = {"model": "gpt2-instruct", "prompt": prompt, "echo": True, "logprobs": 1}
    longer = client.completions.create(**values, max_tokens=1).choices[0]
    answers = client.completions.create(**values, max_tokens=0, stream=stream)
    choices = [chunk.choices[0] for chunk in answers] if stream else answers.choices
    assert "".join(choice.text for choice in choices) == prompt
    assert choices[-1].finish_reason == "length"
    own = [one for choice in choices for one in choice.logprobs.token_logprobs]
    assert own == longer.logprobs.token_logprobs[:-1]
    assert stream or answers.usage.completion_tokens == 0


def test_tokenize_and_detokenize_are_inverse(url, tokenizer):
    body = {"model": "gpt2-instruct", "prompt": "Hello €", "return_token_strs": True}
    found = requests.post(f"{url}/tokenize", json=body, timeout=10).json()
    assert found["tokens"] == tokenizer.encode_ordinary("Hello €")
    assert found["count"] == len(found["tokens"]) == len(found["token_strs"])
    back = requests.post(f"{url}/detokenize", json={"tokens": found["tokens"]}, timeout=10).json()
    assert back == {"prompt": "Hello €"}
    chat = {"messages": [{"role": "user", "content": "Go."}]}
    n_chat = requests.post(f"{url}/tokenize", json=chat, timeout=10).json()["count"]
    usage = requests.post(f"{url}/v1/chat/completions", json=chat | {"max_tokens": 1}, timeout=60).json()["usage"]
    assert n_chat == usage["prompt_tokens"]
    assert error_of(requests.post(f"{url}/detokenize", json={"tokens": [10**6]}, timeout=10))["param"] == "tokens"


@pytest.mark.parametrize(
    ("route", "body"),
    [
        (tokenize.tokenize, {"prompt": "Hello.", "return_token_strs": True}),
        (tokenize.tokenize, {"messages": [{"role": "user", "content": "Go."}]}),
        (tokenize.detokenize, {"tokens": [1, 2]}),
    ],
)
def test_tokens_are_converted_outside_of_the_event_loop(tokenizer, route, body):
    threads = []

    class Recording:
        def __getattr__(self, name):
            threads.append(current_thread())
            return getattr(tokenizer, name)

    async def receive():
        return {"type": "http.request", "body": json.dumps(body).encode()}

    def encode(instruction, input=""):
        return Recording().encode_ordinary(instruction)

    generator = SimpleNamespace(
        tokenizer=Recording(),
        n_positions=128,
        adapters=SimpleNamespace(check_model=lambda *_: None),
        check_known=lambda *_: None,
        encode_instruction=encode,
    )
    app = Starlette()
    app.state.served = Served(generator, make_lineage(), 0, "last")
    request = Request({"type": "http", "headers": [], "app": app}, receive)
    assert asyncio.run(route(request)).status_code == 200
    assert threads
    assert main_thread() not in threads


def test_vllms_gauges_are_there(url):
    text = requests.get(f"{url}/metrics", timeout=10).text
    for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "gpu_cache_usage_perc"):
        assert f'vllm:{name}{{model_name="gpt2-instruct"}} ' in text
    assert 'running_lora_adapters=""' in text
    assert metric(url, "vllm:lora_requests_info") > 0
