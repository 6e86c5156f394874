"""Which fields and values the OpenAI routes accept, and what their errors say."""

import openai
import pytest
import requests

from bentos.openai.protocol import ChatRequest, CompletionRequest
from gpt2core.config import GenerationConfig
from gpt2core.generate import generate
from tests.bentos.client import error_of

ROUTES = {
    "completions": (CompletionRequest, {"model": "gpt2-instruct", "prompt": "One"}),
    "chat/completions": (ChatRequest, {"model": "gpt2-instruct", "messages": [{"role": "user", "content": "a"}]}),
}
OPENAI_DEFAULTS = {
    "completions": {"best_of": 1, "echo": False, "logit_bias": {}, "suffix": ""},
    "chat/completions": {
        "function_call": "none",
        "functions": [],
        "logprobs": False,
        "metadata": {"a": "b"},
        "modalities": ["text"],
        "parallel_tool_calls": True,
        "reasoning_effort": "medium",
        "response_format": {"type": "text"},
        "service_tier": "auto",
        "store": False,
        "tool_choice": "auto",
        "tools": [],
        "verbosity": "medium",
    },
}
COMMON_DEFAULTS = {"frequency_penalty": 0, "n": 1, "presence_penalty": 0.0, "stop": [], "stream": False, "top_p": 1}
# what clients of other servers send by default
EXTRAS = {
    "repetition_penalty": 1.0,
    "chat_id": "c",
    "top_k": -1,
    "min_p": 0.0,
    "ignore_eos": False,
    "grammar": None,
    "add_special_tokens": True,
    "cache_prompt": True,
    "include_reasoning": True,
    "repeat_penalty": 1.0,
    "truncate_prompt_tokens": -1,
}
TOOLS = [{"type": "function", "function": {"name": "a"}}]


def post(url: str, route: str, **fields) -> requests.Response:
    return requests.post(f"{url}/v1/{route}", json=ROUTES[route][1] | {"max_tokens": 4} | fields, timeout=60)


@pytest.mark.parametrize("route", ROUTES)
def test_every_field_may_be_null(url, route):
    fields = {*ROUTES[route][0].model_fields, "web_search_options", "audio", "prediction"} - {"messages"}
    for name in fields:
        response = post(url, route, **{name: None})
        assert response.status_code == 200, (name, response.text)
    assert post(url, route, **dict.fromkeys(fields - {"prompt"})).status_code == 200


@pytest.mark.parametrize("route", ROUTES)
def test_defaults_of_openai_and_harmless_extras_are_accepted(url, route):
    plain = post(url, route).json()["choices"]
    for fields in (COMMON_DEFAULTS | OPENAI_DEFAULTS[route], EXTRAS):
        response = post(url, route, **fields)
        assert response.status_code == 200, response.text
        assert response.json()["choices"] == plain


@pytest.mark.parametrize(
    ("route", "name", "value"),
    [
        *(("completions", name, value) for name, value in [("best_of", 2), ("suffix", "a")]),
        *(
            ("chat/completions", name, value)
            for name, value in [
                ("audio", {"voice": "a", "format": "wav"}),
                ("function_call", {"name": "a"}),
                ("functions", [{"name": "a"}]),
                ("frequency_penalty", 2.5),
                ("logit_bias", {"1000000": 1}),
                ("logit_bias", {"a": 1}),
                ("logit_bias", {str(token): 1 for token in range(1_025)}),
                ("min_p", 1.5),
                ("min_tokens", 5),
                ("repetition_penalty", 0),
                ("stop_token_ids", [1000000]),
                ("modalities", ["text", "audio"]),
                ("n", 17),
                ("prediction", {"type": "content", "content": "a"}),
                ("presence_penalty", -3),
                ("reasoning_effort", "much"),
                ("response_format", {"type": "json_schema"}),
                ("response_format", {"type": "json_schema", "json_schema": {"schema": {"type": "x"}}}),
                ("guided_regex", "(a"),
                ("store", True),
                ("stream_options", {"include_usage": True}),
                ("temperature", -1),
                ("tool_choice", "required"),
                ("tools", TOOLS),
                ("chat_template_kwargs", {"enable_thinking": True}),
                ("repeat_penalty", 1.1),
                ("truncate_prompt_tokens", 5),
                ("top_logprobs", 2),
                ("top_p", 1.1),
                ("unknown", 1),
                ("web_search_options", {}),
            ]
        ),
    ],
)
def test_a_value_that_asks_for_what_is_not_there_is_a_400_that_names_the_field(url, route, name, value):
    response = post(url, route, **{name: value})
    assert response.status_code == 400
    assert error_of(response)["param"] == name
    if name == "unknown":
        assert error_of(response)["message"] == "unknown: this field is not supported; leave it out, or send null"


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": TOOLS, "tool_choice": "none"},
        {"functions": [{"name": "a"}], "function_call": "none"},
        {"chat_template_kwargs": {}},
        {"chat_template_kwargs": {"enable_thinking": False}},
    ],
)
def test_fields_that_ask_for_plain_text_are_accepted(url, fields):
    route = "chat/completions"
    response = post(url, route, **fields)
    assert response.status_code == 200, response.text
    assert response.json()["choices"] == post(url, route).json()["choices"]


@pytest.mark.parametrize("effort", ["none", "minimal", "low", "high", "xhigh"])
def test_every_reasoning_effort_of_openai_is_accepted_since_there_is_no_reasoning(url, effort):
    response = post(url, "chat/completions", reasoning_effort=effort)
    assert response.status_code == 200, response.text
    assert response.json()["choices"] == post(url, "chat/completions").json()["choices"]


@pytest.mark.parametrize("choice", [None, "auto", "required", {"type": "function", "function": {"name": "a"}}])
@pytest.mark.parametrize("names", [("tools", "tool_choice"), ("functions", "function_call")])
def test_tools_that_the_model_could_call_are_a_400_that_says_what_works_instead(url, names, choice):
    response = post(url, "chat/completions", **dict(zip(names, (TOOLS, choice), strict=True)))
    assert response.status_code == 400
    assert error_of(response)["param"] in names
    assert error_of(response)["message"].split(": ")[1] == (
        "the model cannot call tools; leave this field out, and for JSON of a schema send response_format"
    )


@pytest.mark.parametrize(
    ("field", "reason"),
    [
        (
            {"stream_options": {"other_option": True}},
            "this field is not supported; leave it out, or send null",
        ),
        ({"response_format": {"type": "text", "strict": True}}, "unknown field"),
    ],
)
def test_the_message_names_an_unsupported_field_within_another(url, field, reason):
    [(name, value)] = field.items()
    response = post(url, "completions", stream=True, **field)
    assert error_of(response)["message"] == f"{name}.{[*value][-1]}: {reason}"
    assert error_of(response)["param"] == name


@pytest.mark.parametrize("route", ROUTES)
def test_empty_stops_are_ignored_with_structured_output_too(url, route):
    assert post(url, route, guided_choice=["red"], stop=[""]).status_code == 200


def test_errors_are_the_clients_exceptions_with_type_param_and_code(client):
    with pytest.raises(openai.NotFoundError) as raised:
        client.completions.create(model="gpt-9", prompt="a")
    assert (raised.value.code, raised.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.BadRequestError) as raised:
        client.completions.create(model="base", prompt="word " * 5000)
    assert (raised.value.code, raised.value.param) == ("context_length_exceeded", "prompt")
    assert raised.value.type == "context_length_exceeded"


@pytest.mark.parametrize("route", ROUTES)
def test_max_tokens_is_cut_to_what_the_context_leaves(url, route, tuned):
    for limit in (100_000, 1e30):
        response = post(url, route, max_tokens=limit).json()
        assert response["usage"]["total_tokens"] == tuned.config.n_positions
        assert response["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize("token", [10**6, 2**70])
def test_an_echoed_prompt_of_unknown_tokens_is_a_400(url, token):
    response = post(url, "completions", prompt=[1, token], echo=True)
    assert response.status_code == 400
    assert error_of(response)["message"].startswith(f"prompt: there is no token id {token}; ids are from 0 to ")


def test_max_completion_tokens_has_precedence_over_max_tokens(url):
    response = post(url, "chat/completions", max_tokens=9, max_completion_tokens=3).json()
    assert response["usage"]["completion_tokens"] == 3


def test_top_p_0_is_greedy(url):
    greedy = post(url, "completions").json()["choices"]
    assert post(url, "completions", top_p=0, temperature=1.5).json()["choices"] == greedy


def test_negative_seeds_are_repeatable(url):
    one, same, other = (
        post(url, "completions", seed=seed, temperature=1.5, max_tokens=16).json()["choices"] for seed in (-1, -1, -2)
    )
    assert one == same != other


@pytest.mark.parametrize("prompt", [None, ""])
def test_without_a_prompt_a_text_begins_after_end_of_text(url, tuned, tokenizer, prompt):
    config = GenerationConfig(max_new_tokens=4, eos_id=tokenizer.eot_token)
    (expected,) = generate(tuned, [[tokenizer.eot_token]], config)
    text = post(url, "completions", prompt=prompt).json()["choices"][0]["text"]
    assert text == tokenizer.decode([token for token in expected if token != tokenizer.eot_token])
