"""Incremental detokenization: emits the text of a growing completion once later tokens cannot change it."""

from codecs import getincrementaldecoder
from collections.abc import Sequence
from functools import lru_cache

import tiktoken

from gpt2core.prompt import MARKERS, next_section, without_prompt

LONGEST_MARKER = max(map(len, MARKERS)) + 1  # with the whitespace before it


class IncrementalDetokenizer:
    """Converts tokens to text incrementally; the concatenated results are the completion's text.

    Holds back what may still change: incomplete UTF-8 characters, a possible start of a stop string or (in a clean
    answer) of a prompt header, and whitespace that may be trailing. A token takes time in proportion to its own
    text, apart from copies: searching all of a long text again for each token would take minutes.
    """

    def __init__(
        self,
        tokenizer: tiktoken.Encoding,
        stops: Sequence[str],
        clean: bool,
        hidden: Sequence[int] = (),
        min_tokens: int = 0,
    ) -> None:
        """
        Args:
            clean: clean the text as `gpt2core.prompt.parse_reply` does; otherwise it is the model's raw text.
            hidden: tokens, in addition to end of text, that are not part of the text.
            min_tokens: stop strings have no effect before that many tokens.
        """
        self._tokenizer, self._stops, self._clean = tokenizer, stops, clean
        self._hidden = {tokenizer.eot_token, *hidden}
        self._min_tokens, self._n_tokens, self._search_from = min_tokens, 0, 0
        self._decoder = getincrementaldecoder("utf-8")("replace")
        self._raw = self._text = ""  # all characters so far, and what the last `_emit` found in them
        self._body = ""  # of a clean answer: the text that it is the beginning of
        self._section: int | None = None  # where the answer ends in `_body`, if it does
        self._n_emitted = 0
        self._held = [_Overlap(text) for text in ((*stops, *MARKERS) if clean else stops)]
        self.stopped = False  # whether the text ended at a stop string

    def push(self, token: int) -> str:
        """The text that became final with this token; "" after a stop string."""
        self._n_tokens += 1
        if self.stopped or token in self._hidden:
            return ""
        self._raw += self._decoder.decode(self._tokenizer.decode_single_token_bytes(token))
        return self._emit(final=False)

    def finish(self) -> str:
        """The rest of the text, after the last token."""
        if self.stopped:
            return ""
        self._raw += self._decoder.decode(b"", final=True)
        return self._emit(final=True)

    def _emit(self, final: bool) -> str:
        text = self._answer() if self._clean else self._raw
        n_known = len(self._text) if text.startswith(self._text) else 0
        self._text = text
        if self._n_tokens <= self._min_tokens and self._min_tokens:
            self._search_from = len(text)
        starts = [
            start
            for stop in self._stops
            if (start := _find(text, stop, max(self._search_from, n_known - len(stop) + 1))) >= 0
        ]
        n_held = max((held.read(text, n_known) for held in self._held), default=0)
        if starts:
            self.stopped = True
            text = text[: min(starts)]
        elif not final:
            text = text[: len(text) - n_held]
        if self._clean:
            text = text.rstrip()
        new = text[self._n_emitted :]
        self._n_emitted += len(new)
        return new

    def _answer(self) -> str:
        """`gpt2core.prompt.cut_reply` of the characters so far."""
        body = without_prompt(self._raw)
        if not body.startswith(self._body):  # what seemed to be its beginning was a prompt or a header
            self._body, self._section = "", None
        if self._section is None:
            self._section = next_section(body, max(0, len(self._body) - LONGEST_MARKER))
        self._body = body
        return body[: self._section]


class _Overlap:
    """The length of the longest proper prefix of `held` that a growing text ends with (Knuth, Morris, Pratt, 1977)."""

    def __init__(self, held: str) -> None:
        self._held, self._borders, self._n = held, _borders(held), 0

    def read(self, text: str, n_known: int) -> int:
        """The length for a text; `n_known`: it begins with the last one, which had so many characters, or 0."""
        held, borders, n = self._held, self._borders, self._n if n_known else 0
        for character in text[n_known or max(0, len(text) - len(held)) :]:
            while n and held[n] != character:
                n = borders[n]
            n += held[n] == character
            if n == len(held):
                n = borders[n]
        self._n = n
        return n


@lru_cache(maxsize=256)
def _borders(text: str) -> list[int]:
    """For each length n, the length of the longest proper prefix of text[:n] that text[:n] ends with."""
    borders = [0, 0]
    n = 0
    for character in text[1:]:
        while n and text[n] != character:
            n = borders[n]
        n += text[n] == character
        borders.append(n)
    return borders


def _find(text: str, stop: str, first: int) -> int:
    return text.find(stop, first)
