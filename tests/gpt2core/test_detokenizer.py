"""Incremental detokenization: the concatenated results are the text of the whole completion."""

import pytest
import tiktoken
from hypothesis import example, given
from hypothesis import strategies as st

import gpt2core.inference.detokenizer as detokenizer_module
from gpt2core.inference.detokenizer import LONGEST_MARKER, IncrementalDetokenizer, _Overlap
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


@given(st.lists(st.text("ab", max_size=4)), st.text("ab", min_size=1, max_size=6))
def test_the_overlap_is_the_longest_proper_prefix_of_a_stop_that_the_text_ends_with(parts, stop):
    overlap, text = _Overlap(stop), ""
    for part in parts:
        n_known, text = len(text), text + part
        expected = max(n for n in range(len(stop)) if text.endswith(stop[:n]))
        assert overlap.read(text, n_known) == overlap.read(text, 0) == expected


class CountingText(str):
    """Counts the characters of it that are compared one by one."""

    n_read = 0

    def __getitem__(self, place):
        CountingText.n_read += 1
        return super().__getitem__(place)


@pytest.mark.parametrize("stop", ["a" * 200 + "b" + "a" * 199, "ab" * 200, "a" * 400])
def test_holding_back_a_stop_takes_a_bounded_number_of_comparisons_per_character(stop):
    detokenizer = IncrementalDetokenizer(tokenizer, [CountingText(stop)], clean=False)
    CountingText.n_read = 0
    for token in b"a" * 399 + b"ba" * 2_000:
        detokenizer.push(token)
        if detokenizer.stopped:
            break
    assert CountingText.n_read <= 5 * detokenizer._n_tokens


@pytest.mark.parametrize("clean", [True, False])
def test_no_token_searches_the_whole_text_again(monkeypatch, clean):
    n_searched = [0]

    def counting(search):
        def counted(text, *arguments):
            n_searched[0] += len(text) - arguments[-1]
            return search(text, *arguments)

        return counted

    for name in ("_find", "next_section"):
        monkeypatch.setattr(detokenizer_module, name, counting(getattr(detokenizer_module, name)))
    n = 5_000
    assert "".join(pieces(b"a" * n, ["b" * 400, "c"], clean)) == "a" * n
    assert n_searched[0] <= n * (400 + 1 + LONGEST_MARKER + 3)


@pytest.mark.parametrize("clean", [True, False])
def test_a_stop_across_tokens_is_found_where_it_begins(clean):
    detokenizer = IncrementalDetokenizer(tokenizer, ["abc"], clean)
    assert "".join(map(detokenizer.push, b"xababcx")) == "xab"
    assert detokenizer.stopped


def test_a_stop_in_the_answer_after_a_prompt_in_the_completion_is_found():
    text = f"{PREAMBLE}\n\n### Response:\nXYZ".encode()
    assert "".join(pieces(text, ["X"], clean=True)) == ""
    assert "".join(pieces(text, ["YZ"], clean=True)) == "X"
