"""The text of a reply while it grows: what is sure to stay is given out, once."""

from codecs import getincrementaldecoder
from collections.abc import Sequence

import tiktoken

from gpt2core.prompt import MARKERS, cut_reply


class ReplyText:
    """Takes tokens, gives text. All that it gives, joined, is the answer.

    Held back until more is known: bytes that are half a character, what may become a stop text or, in a clean answer, a
    header of the prompt, and white space that may be the last.
    """

    def __init__(self, tokenizer: tiktoken.Encoding, stops: Sequence[str], clean: bool) -> None:
        """`clean`: as `gpt2core.prompt.parse_reply` cleans an answer; else the text is as the model wrote it."""
        self._tokenizer, self._stops, self._clean = tokenizer, stops, clean
        self._decoder = getincrementaldecoder("utf-8")("replace")
        self._raw = ""
        self._given = 0
        self._holds = (*stops, *MARKERS) if clean else tuple(stops)
        self.stopped = False  # at one of the stop texts

    def push(self, token: int) -> str:
        """Text that the token has made certain; "" once a stop text was met."""
        if self.stopped or token == self._tokenizer.eot_token:
            return ""
        self._raw += self._decoder.decode(self._tokenizer.decode_single_token_bytes(token))
        return self._new(final=False)

    def finish(self) -> str:
        """The rest, when no token will follow."""
        if self.stopped:
            return ""
        self._raw += self._decoder.decode(b"", final=True)
        return self._new(final=True)

    def _new(self, final: bool) -> str:
        text = cut_reply(self._raw) if self._clean else self._raw
        places = [place for stop in self._stops if (place := text.find(stop)) >= 0]
        if places:
            self.stopped = True
            text = text[: min(places)]
        elif not final:
            text = text[: len(text) - max((_begun(text, hold) for hold in self._holds), default=0)]
        if self._clean:
            text = text.rstrip()
        new = text[self._given :]
        self._given += len(new)
        return new


def _begun(text: str, hold: str) -> int:
    """How many of the last characters could be the beginning of `hold`, not all of it."""
    return next((n for n in range(min(len(hold) - 1, len(text)), 0, -1) if text.endswith(hold[:n])), 0)
