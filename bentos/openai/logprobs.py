"""Texts and offsets of tokens, for the logprobs of both routes."""

from codecs import getincrementaldecoder
from collections.abc import Collection, Sequence

import tiktoken


def token_text(token: int, tokenizer: tiktoken.Encoding) -> str:
    r"""The token's text, or as in OpenAI's responses `bytes:\xe2\x80` for bytes that are not valid text by themselves.

    Different tokens have different texts, so they can be keys of a mapping.
    """
    data = tokenizer.decode_single_token_bytes(token)
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


class TextOffsets:
    """Where the tokens of one completion begin in its text, in characters."""

    def __init__(self, tokenizer: tiktoken.Encoding, n_echoed: int = 0, hidden: Collection[int] = ()) -> None:
        """
        Args:
            n_echoed: how many tokens come first, those of an echoed prompt.
            hidden: tokens that are no part of the text after these.
        """
        self._tokenizer, self._n_echoed, self._hidden = tokenizer, n_echoed, frozenset(hidden)
        self._decoder = getincrementaldecoder("utf-8")("replace")
        self._n_characters = self._n_tokens = 0

    def next(self, tokens: Sequence[int]) -> list[int]:
        """Offsets of the next tokens, after those of earlier calls. Tokens of one character have the same offset."""
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
    """Whether the first byte continues a character of UTF-8."""
    return data[0] & 0xC0 == 0x80
