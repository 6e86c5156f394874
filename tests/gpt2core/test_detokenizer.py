"""Incremental detokenization: the concatenated results are the text of the whole completion."""

import pytest
import tiktoken
from hypothesis import example, given
from hypothesis import strategies as st

from gpt2core.inference.detokenizer import IncrementalDetokenizer
from gpt2core.prompt import MARKERS, PREAMBLE, parse_reply

# one token per byte, and end of text
tokenizer = tiktoken.Encoding(
    "bytes",
    pat_str=r"[\s\S]",
    mergeable_ranks={bytes([i]): i for i in range(256)},
    special_tokens={"<|endoftext|>": 256},
)
fragments = st.sampled_from(
    [*MARKERS, " ", "\n", "\t\n ", "a", "b", "é", "🙂", "###", "### Res", "<|end", PREAMBLE[:20], "#"]
)
texts = st.lists(fragments, max_size=8).map("".join)
stop_texts = st.lists(st.sampled_from(["a", "ab", "\n", "ba", "🙂", "é b", "### "]), max_size=2)


def pieces(data: bytes, stops: list[str], clean: bool) -> list[str]:
    detokenizer = IncrementalDetokenizer(tokenizer, stops, clean)
    return [*(detokenizer.push(token) for token in data), detokenizer.finish()]


@given(texts)
@example("### Response:\nParis\n\n### Instruction:\nmore")
@example(PREAMBLE + " x ### Response: y")
def test_pieces_of_a_clean_answer_join_to_what_parse_reply_returns(text):
    assert "".join(pieces(text.encode(), [], clean=True)) == parse_reply(text)


@given(st.binary(max_size=40))
def test_invalid_utf8_is_replaced_as_in_the_whole(data):
    assert "".join(pieces(data, [], clean=False)) == data.decode("utf-8", "replace")


@given(texts, stop_texts)
def test_the_text_ends_before_the_first_stop(text, stops):
    starts = [text.find(stop) for stop in stops if stop in text]
    whole = "".join(pieces(text.encode(), stops, clean=False))
    # the stop string that is complete first ends it, even if a longer one started before
    assert text.startswith(whole)
    assert not any(stop in whole for stop in stops)
    if not starts:
        assert whole == text


def test_text_is_emitted_as_soon_as_it_is_certain():
    assert pieces(b"ab c ", [], clean=True) == ["a", "b", "", " c", "", ""]
    assert pieces(b"ab c ", [], clean=False) == ["a", "b", " ", "c", " ", ""]
    assert pieces("é!".encode(), [], clean=False) == ["", "é", "!", ""]
    assert pieces(b"a STx STOP b", ["STOP"], clean=False)[:6] == ["a", " ", "", "", "STx", " "]


def test_end_of_text_emits_nothing():
    detokenizer = IncrementalDetokenizer(tokenizer, [], clean=False)
    assert [detokenizer.push(97), detokenizer.push(256), detokenizer.finish()] == ["a", "", ""]


@pytest.mark.parametrize("clean", [True, False])
def test_nothing_is_emitted_after_a_stop(clean):
    detokenizer = IncrementalDetokenizer(tokenizer, ["!"], clean)
    assert "".join(detokenizer.push(token) for token in b"ab!cd") == "ab"
    assert detokenizer.stopped
    assert detokenizer.finish() == ""
