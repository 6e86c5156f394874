"""Which message of a conversation is answered."""

from dataclasses import dataclass

import openai
import pytest
from tiktoken import Encoding

from bentos.errors import ServiceError
from bentos.generation import TextGenerator
from bentos.openai.chat import instruction_of, prompt_of
from bentos.openai.protocol import Message
from gpt2core.prompt import format_prompt
from gpt2core.record_formats import to_records
from tests.bentos.client import answer_of

N = {"max_tokens": 8}


def user(text: str) -> list[dict]:
    return [{"role": "user", "content": text}]


SYSTEM = {"role": "system", "content": "You are a helpful assistant."}
CONVERSATIONS = {
    "a system message": [SYSTEM, *user("Say hello.")],
    "a developer message": [{"role": "developer", "content": "Be brief."}, *user("Say hello.")],
    "an empty system message": [{"role": "system", "content": ""}, *user("Say hello.")],
    "earlier turns": [SYSTEM, *user("Hi."), {"role": "assistant", "content": "Hello!"}, *user("Say hello.")],
    "a tool call among earlier turns": [
        *user("Hi."),
        {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "type": "function", "function": {}}]},
        {"role": "tool", "content": "42", "tool_call_id": "1"},
        {"role": "assistant", "content": "42", "refusal": None, "annotations": [], "audio": None},
        *user("Say hello."),
    ],
    "text parts": [
        {"role": "user", "name": "me", "content": [{"type": "text", "text": t} for t in ("Say ", "hello.")]}
    ],
    "a system message at the end": [*user("Say hello."), SYSTEM],
}


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_the_last_user_turn_is_the_instruction(client, tuned, tokenizer, name):
    answer = client.chat.completions.create(model="gpt2-instruct", messages=CONVERSATIONS[name], **N)
    assert answer.choices[0].message.content == answer_of(tuned, tokenizer, "Say hello.")
    texts = [message for message in CONVERSATIONS[name] if message["content"] != ""]
    assert answer.ignored_messages == len(texts) - 1


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "at least 1 item"),
        (user(""), "blank"),
        ([*user("a"), *user(" \n")], "blank"),
        ([SYSTEM], "must be the user's"),
        ([*user("a"), {"role": "assistant", "content": "b"}], "must be the user's"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}]}], "must be text"),
        ([{"role": "user", "content": None}], "must be text"),
        ([{"role": "robot", "content": "a"}], r"messages\.0\.role: "),
        (user("word " * 200), "shorten"),
    ],
)
def test_messages_that_cannot_be_answered_are_refused(client, messages, message):
    with pytest.raises(openai.BadRequestError, match=message) as raised:
        client.chat.completions.create(model="gpt2-instruct", messages=messages)
    assert raised.value.param == "messages"


def test_with_multi_turn_refuse_earlier_turns_are_an_error():
    turns = [Message(**message) for message in CONVERSATIONS["earlier turns"]]
    with pytest.raises(ServiceError, match="3 turns"):
        instruction_of(turns, "refuse")
    assert instruction_of([turns[0], turns[-1]], "refuse") == ("Say hello.", [])


def test_with_multi_turn_history_earlier_turns_are_the_input_as_in_training(tokenizer):
    messages = [*CONVERSATIONS["a tool call among earlier turns"], SYSTEM]
    record = {"messages": [message for message in messages if message["role"] in ("user", "assistant")]}
    record["messages"] = [m for m in record["messages"] if m["content"]] + [{"role": "assistant", "content": "Hello."}]
    [*_, trained] = to_records(record, ("output",), {})
    expected = tokenizer.encode_ordinary(format_prompt(trained["instruction"], trained["input"]))
    turns = [Message(**message) for message in messages]
    generator = Encoder(tokenizer, n_positions=1000)
    assert prompt_of(turns, generator, "history", 8) == (expected, 3)  # the tool's two messages and the system's
    short = Encoder(tokenizer, n_positions=len(expected) + 7)  # the oldest turn does not fit
    prompt, n_ignored = prompt_of(turns, short, "history", 8)
    assert n_ignored == 4
    assert tokenizer.decode(prompt) == format_prompt("Say hello.", "Assistant: 42")
    assert prompt_of(turns, Encoder(tokenizer, n_positions=10), "history", 8) == prompt_of(turns, short, "last", 8)


@dataclass
class Encoder:
    """What `prompt_of` uses of TextGenerator."""

    tokenizer: Encoding
    n_positions: int
    encode_instruction = TextGenerator.encode_instruction
