"""GPT-2's byte-level BPE as a tiktoken.Encoding. Independent of prompts.

Use `encode_ordinary` for user text: it encodes the spelling of a special token as plain text.
"""

import json
from functools import lru_cache
from pathlib import Path

import tiktoken

END_OF_TEXT = "<|endoftext|>"
# GPT-2's pre-tokenization (Radford et al. 2019, section 2.2), in tiktoken's faster form
SPLIT_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"


def load_tokenizer(name: str | Path) -> tiktoken.Encoding:
    """The tokenizer named "gpt2", or that of a directory with vocab.json and merges.txt.

    Raises:
        FileNotFoundError: vocab.json or merges.txt is missing.
        ValueError: the two do not match, or `name` is neither a directory nor known to tiktoken.
    """
    directory = Path(name)
    if not directory.is_dir():
        try:
            return tiktoken.get_encoding(str(name))
        except ValueError as error:
            raise ValueError(
                f"no tokenizer {str(name)!r}: neither a directory nor known to tiktoken ({error})"
            ) from None
    ranks, end_of_text = _read_ranks(directory / "vocab.json", directory / "merges.txt")
    return tiktoken.Encoding(
        f"bpe-{directory.name}",
        pat_str=SPLIT_PATTERN,
        mergeable_ranks=ranks,
        special_tokens={END_OF_TEXT: end_of_text},
    )


def _read_ranks(vocab_file: Path, merges_file: Path) -> tuple[dict[bytes, int], int]:
    """Bytes -> id for tiktoken, which merges the pair with the lowest id first, and the id of end of text."""
    for file in (vocab_file, merges_file):
        if not file.is_file():
            raise FileNotFoundError(f"{file} does not exist; a tokenizer directory has vocab.json and merges.txt")
    try:
        vocab: dict[str, int] = json.loads(vocab_file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{vocab_file} is not valid JSON: {error}") from None
    if not isinstance(vocab, dict) or END_OF_TEXT not in vocab:
        raise ValueError(f"{vocab_file} has no {END_OF_TEXT!r}")
    end_of_text = vocab.pop(END_OF_TEXT)
    lines = merges_file.read_text(encoding="utf-8").splitlines()
    merged = [line.replace(" ", "") for line in lines if line and not line.startswith("#version")]
    missing = [token for token in (*_byte_of_character(), *merged) if token not in vocab]
    if missing:
        raise ValueError(f"{vocab_file} lacks {missing[0]!r}, which {merges_file} needs; the files do not match")
    ids = [vocab[token] for token in merged]
    if ids != sorted(ids) or len(vocab) != len(set(merged)) + 256:
        raise ValueError(
            f"{vocab_file} does not number its tokens in the order of {merges_file}: not a GPT-2 tokenizer"
        )
    return {_to_bytes(token): id for token, id in vocab.items()}, end_of_text


def _to_bytes(token: str) -> bytes:
    return bytes(_byte_of_character()[character] for character in token)


@lru_cache
def _byte_of_character() -> dict[str, int]:
    """GPT-2 spells each byte as one visible character: its own in Latin-1 if visible, else one from U+0100 on."""
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(256 + i): byte for i, byte in enumerate(hidden)}
