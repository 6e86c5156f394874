"""Incremental detokenization: emit the text of a growing completion as soon as later tokens cannot change it."""

from codecs import getincrementaldecoder
from collections.abc import Sequence
from functools import lru_cache

import tiktoken

from gpt2core.prompt import MARKERS, next_section, without_prompt

LONGEST_MARKER = max(map(len, MARKERS)) + 1  # characters of the longest marker, with one whitespace before it


class IncrementalDetokenizer:
    """Converts tokens to text incrementally; the concatenated results are the completion's text.

    Text that may still change is buffered: incomplete UTF-8 characters, a possible start of a stop string or (in a
    clean answer) of a prompt header, and whitespace that may be trailing. Apart from copies, the time for a token is
    proportional to its own text: searching a long text again for each token would take minutes.
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
            hidden: ids of tokens, in addition to end of text, that are not part of the text.
            min_tokens: stop strings have no effect in the first `min_tokens` tokens.
        """
        self._tokenizer, self._stops, self._clean = tokenizer, stops, clean
        self._hidden = {tokenizer.eot_token, *hidden}
        self._min_tokens, self._n_tokens, self._search_from = min_tokens, 0, 0
        self._decoder = getincrementaldecoder("utf-8")("replace")
        self._raw = self._text = ""  # all characters so far; and the text of the last `_emit`, the answer if clean
        self._body = ""  # of a clean answer: the text from its start on, with any sections after it
        self._section: int | None = None  # index in `_body` at which the answer ends; None: no section follows yet
        self._n_emitted = 0
        self._overlaps = [_Overlap(text) for text in ((*stops, *MARKERS) if clean else stops)]
        self.stopped = False  # the text ended at a stop string

    def push(self, token: int) -> str:
        """Return the text that became final with this token; "" after a stop string."""
        self._n_tokens += 1
        if self.stopped or token in self._hidden:
            return ""
        self._raw += self._decoder.decode(self._tokenizer.decode_single_token_bytes(token))
        return self._emit(final=False)

    def finish(self) -> str:
        """Return the rest of the text. Call it after the last token."""
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
        n_held = max((overlap.read(text, n_known) for overlap in self._overlaps), default=0)
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
        """Return `gpt2core.prompt.cut_reply` of the characters so far."""
        body = without_prompt(self._raw)
        if not body.startswith(self._body):  # the previous text was part of a prompt or header
            self._body, self._section = "", None
        if self._section is None:
            self._section = next_section(body, max(0, len(self._body) - LONGEST_MARKER))
        self._body = body
        return body[: self._section]


class _Overlap:
    """Tracks how many characters at the end of a growing text are a proper prefix of `marker`.

    The longest such prefix counts (algorithm: Knuth, Morris, Pratt, 1977).
    """

    def __init__(self, marker: str) -> None:
        self._marker, self._borders, self._n = marker, _borders(marker), 0

    def read(self, text: str, n_known: int) -> int:
        """Read the grown text, and return the length of the overlap.

        Args:
            n_known: length of the previous text, of which `text` is a continuation; 0: it is not, so start again.
        """
        marker, borders, n = self._marker, self._borders, self._n if n_known else 0
        for character in text[n_known or max(0, len(text) - len(marker)) :]:
            while n and marker[n] != character:
                n = borders[n]
            n += marker[n] == character
            if n == len(marker):
                n = borders[n]
        self._n = n
        return n


@lru_cache(maxsize=256)
def _borders(text: str) -> list[int]:
    """Return, for each length n, the length of the longest proper prefix of text[:n] that text[:n] ends with."""
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
