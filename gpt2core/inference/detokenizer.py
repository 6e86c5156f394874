"""Incremental detokenization: emits the text of a growing completion once later tokens cannot change it."""

from codecs import getincrementaldecoder
from collections.abc import Sequence

import tiktoken

from gpt2core.prompt import MARKERS, cut_reply


class IncrementalDetokenizer:
    """Converts tokens to text incrementally; the concatenated results are the completion's text.

    Holds back what may still change: incomplete UTF-8 characters, a possible start of a stop string or (in a clean
    answer) of a prompt header, and whitespace that may be trailing.
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
        self._raw = ""
        self._n_emitted = 0
        self._held_texts = (*stops, *MARKERS) if clean else tuple(stops)
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
        text = cut_reply(self._raw) if self._clean else self._raw
        if self._n_tokens <= self._min_tokens and self._min_tokens:
            self._search_from = len(text)
        starts = [start for stop in self._stops if (start := text.find(stop, self._search_from)) >= 0]
        if starts:
            self.stopped = True
            text = text[: min(starts)]
        elif not final:
            text = text[: len(text) - max((_overlap(text, held) for held in self._held_texts), default=0)]
        if self._clean:
            text = text.rstrip()
        new = text[self._n_emitted :]
        self._n_emitted += len(new)
        return new


def _overlap(text: str, held: str) -> int:
    """The length of the longest proper prefix of `held` that the text ends with."""
    start = text.find(held[0], max(0, len(text) - len(held) + 1))
    while start >= 0 and not held.startswith(text[start:]):
        start = text.find(held[0], start + 1)
    return len(text) - start if start >= 0 else 0
