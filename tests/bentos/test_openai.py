"""Responses of the OpenAI routes, with the official openai client."""

import math

import openai
import pytest
import requests
import torch

from bentos.openai.logprobs import TextOffsets, token_text
from gpt2core.files import directory_sha256
from gpt2core.prompt import format_prompt
from tests.bentos.client import answer_of, tokens_of

N = {"max_tokens": 8}


def user(text: str) -> list[dict]:
    return [{"role": "user", "content": text}]


def test_chat_answers_as_predict_does(client, tuned, tokenizer):
    answer = client.chat.completions.create(model="gpt2-instruct", messages=user("Say hello."), **N)
    assert answer.choices[0].message.content == answer_of(tuned, tokenizer, "Say hello.")
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 8
    assert answer.usage.prompt_tokens == len(tokenizer.encode_ordinary(format_prompt("Say hello.")))


def test_a_completion_continues_the_text_as_it_is(client, base, tuned, tokenizer):
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
def test_a_stream_is_the_response_in_parts(client, route, stop):
    values = {"model": "gpt2-instruct", "max_tokens": 20, "stop": stop}
    if route == "chat":
        create, values = client.chat.completions.create, values | {"messages": user("Say hello.")}
    else:
        create, values = client.completions.create, values | {"prompt": "One"}
    whole = create(**values)
    chunks = list(create(**values, stream=True, stream_options={"include_usage": True}))
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


def test_each_event_has_the_usage_so_far_if_requested_as_of_vllm(client):
    """GuideLLM requests it."""
    options = {"include_usage": True, "continuous_usage_stats": True}
    values = {"model": "gpt2-instruct", "prompt": "One", "max_tokens": 20}
    *events, last = client.completions.create(**values, stream=True, stream_options=options)
    counts = [event.usage.completion_tokens for event in [*events, last]]
    assert counts == sorted(counts)
    assert counts[0] > 0
    assert {event.usage.prompt_tokens for event in events} == {last.usage.prompt_tokens}
    assert last.usage == client.completions.create(**values).usage


@pytest.mark.parametrize("route", ["completions", "chat"])
def test_a_stream_starts_before_the_completion_ends(client, route):
    """Tokens available when an event is sent are sent together, so some streams of a tiny model are one event."""
    values = {"model": "gpt2-instruct", "max_tokens": 60, "stream": True}

    def n_events() -> int:
        if route == "chat":
            return len(list(client.chat.completions.create(**values, messages=user("Say hello."))))
        return len(list(client.completions.create(**values, prompt="One")))

    assert any(n_events() > 1 for _ in range(20))


def test_a_stream_of_several_choices_numbers_them(client):
    values = {"model": "gpt2-instruct", "prompt": ["One", "Two", "Three"], **N}
    whole = client.completions.create(**values)
    texts = ["", "", ""]
    for chunk in client.completions.create(**values, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == [choice.text for choice in whole.choices]


def test_logprobs_are_the_models(client, tuned, tokenizer):
    completion = tokens_of(tuned, tokenizer, "One")
    prompt = tokenizer.encode_ordinary("One")
    with torch.inference_mode():
        expected = tuned(torch.tensor([prompt + completion]))[0, len(prompt) - 1 : -1].log_softmax(-1)
    own = [float(row[token]) for row, token in zip(expected, completion, strict=True)]
    logprobs = client.completions.create(model="gpt2-instruct", prompt="One", logprobs=3, **N).choices[0].logprobs
    assert logprobs.token_logprobs == pytest.approx(own, abs=1e-4)
    assert logprobs.tokens == [token_text(token, tokenizer) for token in completion]
    assert all(len(top) == 3 for top in logprobs.top_logprobs)


def test_every_token_has_its_logprobs_also_while_text_is_held_back(client):
    values = {"model": "base", "prompt": "The capital of Canada", "max_tokens": 24, "logprobs": 2}
    whole = client.completions.create(**values).choices[0]
    assert len(whole.logprobs.tokens) == 24
    # the text begins as this stop string does, and then differs: it is held back until the end
    stop = whole.text[: len(whole.text) // 2] + "\x01never"
    assert client.completions.create(**values, stop=stop).choices[0] == whole
    chunks = [chunk.choices[0] for chunk in client.completions.create(**values, stop=stop, stream=True)]
    for field in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
        assert [one for chunk in chunks for one in getattr(chunk.logprobs, field)] == getattr(whole.logprobs, field)


def test_a_stop_text_ends_the_text_and_its_tokens_keep_their_logprobs(client):
    values = {"model": "base", "prompt": "The capital of Canada", "max_tokens": 24, "logprobs": 0}
    whole = client.completions.create(**values).choices[0]
    stop = whole.text[len(whole.text) // 2 :][:3]
    response = client.completions.create(**values, stop=stop)
    assert response.choices[0].text == whole.text[: whole.text.index(stop)]
    assert len(response.choices[0].logprobs.tokens) == response.usage.completion_tokens


def test_tokens_that_are_no_text_by_themselves_have_distinct_texts(tokenizer):
    tokens = [tokenizer.encode_single_token(bytes([byte])) for byte in range(256)]
    assert len({token_text(token, tokenizer) for token in tokens}) == 256
    assert token_text(tokenizer.encode_single_token(b"\xe2"), tokenizer) == r"bytes:\xe2"


def test_offsets_count_characters_of_the_text(tokenizer):
    offsets = TextOffsets(tokenizer)
    tokens = [tokenizer.encode_single_token(bytes([byte])) for byte in "a€b".encode()]
    assert offsets.next(tokens[:2]) + offsets.next(tokens[2:]) == [0, 1, 1, 1, 2]


def test_offsets_count_what_the_text_has_of_unfinished_characters_and_end_of_text(tokenizer):
    a, lead, middle, b = (tokenizer.encode_single_token(byte) for byte in (b"a", b"\xe2", b"\x82", b"b"))
    assert TextOffsets(tokenizer).next([a, lead, middle, b, lead, b, a]) == [0, 1, 1, 2, 3, 4, 5]  # a\ufffdb\ufffdba
    end = tokenizer.eot_token
    assert TextOffsets(tokenizer, 2, [end]).next([end, a, end, b]) == [0, 13, 14, 14]  # <|endoftext|>ab


def test_chat_logprobs_begin_with_the_most_likely_token(client):
    answer = client.chat.completions.create(
        model="gpt2-instruct", messages=user("Say hello."), logprobs=True, top_logprobs=2, **N
    )
    content = answer.choices[0].logprobs.content
    assert len(content) == 8
    for one in content:
        assert one.logprob == one.top_logprobs[0].logprob < 0
        assert math.isclose(one.top_logprobs[0].logprob, max(top.logprob for top in one.top_logprobs))


def test_an_unknown_token_id_is_refused(client):
    with pytest.raises(openai.BadRequestError, match="token id"):
        client.completions.create(model="gpt2-instruct", prompt=[10**6], **N)


def test_models_are_listed_and_found(client, base_dir, adapter_dir):
    by_id = {model.id: model for model in client.models.list()}
    assert {"gpt2-instruct", "base"} <= by_id.keys()
    assert by_id["gpt2-instruct"].sha256 == directory_sha256(adapter_dir)
    assert by_id["base"].sha256 == directory_sha256(base_dir)
    assert client.models.retrieve("base").id == "base"
    with pytest.raises(openai.NotFoundError, match="gpt2-instruct, base"):
        client.models.retrieve("other")


def test_the_system_fingerprint_is_the_bento_and_the_adapter(url, bento_tag, adapter_dir):
    body = {"model": "gpt2-instruct", "prompt": "a", **N}
    fingerprint = requests.post(f"{url}/v1/completions", json=body, timeout=60).json()["system_fingerprint"]
    assert fingerprint == f"{bento_tag}+{directory_sha256(adapter_dir)[:16]}"
