"""The text of a growing reply: whatever it is cut into, it is the text of the whole."""

import pytest
import tiktoken
from hypothesis import example, given
from hypothesis import strategies as st

from gpt2core.inference.detokenizer import ReplyText
from gpt2core.prompt import MARKERS, PREAMBLE, parse_reply

# a token for each byte, and end of text
tokenizer = tiktoken.Encoding(
    "bytes",
    pat_str=r"[\s\S]",
    mergeable_ranks={bytes([i]): i for i in range(256)},
    special_tokens={"<|endoftext|>": 256},
)
pieces = st.sampled_from(
    [*MARKERS, " ", "\n", "\t\n ", "a", "b", "é", "🙂", "###", "### Res", "<|end", PREAMBLE[:20], "#"]
)
texts = st.lists(pieces, max_size=8).map("".join)
stop_texts = st.lists(st.sampled_from(["a", "ab", "\n", "ba", "🙂", "é b", "### "]), max_size=2)


def parts(data: bytes, stops: list[str], clean: bool) -> list[str]:
    reply = ReplyText(tokenizer, stops, clean)
    return [*(reply.push(token) for token in data), reply.finish()]


@given(texts)
@example("### Response:\nParis\n\n### Instruction:\nmore")
@example(PREAMBLE + " x ### Response: y")
def test_parts_of_a_clean_answer_join_to_what_parse_reply_gives(text):
    assert "".join(parts(text.encode(), [], clean=True)) == parse_reply(text)


@given(st.binary(max_size=40))
def test_broken_utf8_is_replaced_as_it_is_in_the_whole(data):
    assert "".join(parts(data, [], clean=False)) == data.decode("utf-8", "replace")


@given(texts, stop_texts)
def test_the_text_ends_before_the_first_stop(text, stops):
    places = [text.find(stop) for stop in stops if stop in text]
    whole = "".join(parts(text.encode(), stops, clean=False))
    # a stop that is complete first ends it, also where a longer one began before
    assert text.startswith(whole)
    assert not any(stop in whole for stop in stops)
    if not places:
        assert whole == text


def test_text_is_given_as_soon_as_it_is_certain():
    assert parts(b"ab c ", [], clean=True) == ["a", "b", "", " c", "", ""]
    assert parts(b"ab c ", [], clean=False) == ["a", "b", " ", "c", " ", ""]
    assert parts("é!".encode(), [], clean=False) == ["", "é", "!", ""]
    assert parts(b"a STx STOP b", ["STOP"], clean=False)[:6] == ["a", " ", "", "", "STx", " "]


def test_end_of_text_is_no_text():
    reply = ReplyText(tokenizer, [], clean=False)
    assert [reply.push(97), reply.push(256), reply.finish()] == ["a", "", ""]


@pytest.mark.parametrize("clean", [True, False])
def test_nothing_follows_a_stop(clean):
    reply = ReplyText(tokenizer, ["!"], clean)
    assert "".join(reply.push(token) for token in b"ab!cd") == "ab"
    assert reply.stopped
    assert reply.finish() == ""
