"""Texts and offsets of tokens, for the logprobs of both routes."""

from codecs import getincrementaldecoder
from collections.abc import Collection, Sequence

import tiktoken


def token_text(token: int, tokenizer: tiktoken.Encoding) -> str:
    r"""Return the token's text, or like OpenAI `bytes:\xe2\x80` if its bytes are not valid UTF-8 by themselves.

    Different tokens have different texts, so the texts can be keys of a mapping.
    """
    data = tokenizer.decode_single_token_bytes(token)
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


class TextOffsets:
    """Computes the offsets, in characters, at which the tokens of one completion begin in its text."""

    def __init__(self, tokenizer: tiktoken.Encoding, n_echoed: int = 0, hidden: Collection[int] = ()) -> None:
        """
        Args:
            n_echoed: number of prompt tokens at the start (with `echo`).
            hidden: ids of tokens, such as end of text, that are not part of the completion's text.
        """
        self._tokenizer, self._n_echoed, self._hidden = tokenizer, n_echoed, frozenset(hidden)
        self._decoder = getincrementaldecoder("utf-8")("replace")
        self._n_characters = self._n_tokens = 0

    def next(self, tokens: Sequence[int]) -> list[int]:
        """Return the offsets of the next tokens. Tokens that are bytes of the same character have the same offset."""
        offsets = []
        for token in tokens:
            data = self._tokenizer.decode_single_token_bytes(token)
            is_hidden = token in self._hidden and self._n_tokens >= self._n_echoed
            if not is_hidden and not _continues(data):  # bytes of an unfinished character become a character here
                self._n_characters += len(self._decoder.decode(b"", final=True))
            offsets.append(self._n_characters)
            self._n_tokens += 1
            if not is_hidden:
                self._n_characters += len(self._decoder.decode(data))
        return offsets


def _continues(data: bytes) -> bool:
    """Whether the first byte is a continuation byte of UTF-8."""
    return data[0] & 0xC0 == 0x80
