"""Which message of a conversation is answered."""

import openai
import pytest

from bentos.errors import ServiceError
from bentos.openai.chat import instruction_of
from bentos.openai.protocol import Message
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
    assert instruction_of(turns, "last") == ("Say hello.", 3)
    with pytest.raises(ServiceError, match="3 turns"):
        instruction_of(turns, "refuse")
    assert instruction_of([turns[0], turns[-1]], "refuse") == ("Say hello.", 1)
