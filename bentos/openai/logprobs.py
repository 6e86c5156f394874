"""Texts and offsets of tokens, for the logprobs of both routes."""

from codecs import getincrementaldecoder
from collections.abc import Sequence

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

    def __init__(self, tokenizer: tiktoken.Encoding) -> None:
        self._tokenizer = tokenizer
        self._decoder = getincrementaldecoder("utf-8")("replace")
        self._n_characters = 0

    def next(self, tokens: Sequence[int]) -> list[int]:
        """Offsets of the next tokens, after those of earlier calls. Tokens of one character have the same offset."""
        offsets = []
        for token in tokens:
            offsets.append(self._n_characters)
            self._n_characters += len(self._decoder.decode(self._tokenizer.decode_single_token_bytes(token)))
        return offsets
