"""GPT-2's byte-level BPE as a tiktoken.Encoding. Independent of prompts.

Use `encode_ordinary` for user text: it encodes the spelling of a special token as plain text. Words that were added to
the vocabulary ("special": false in tokenizer.json) are tokens in every text, as in transformers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import tiktoken

from gpt2core.added_words import FLAGS, AddedWord, EncodingWithWords
from gpt2core.files import read_json, read_text

END_OF_TEXT = "<|endoftext|>"
VOCAB, MERGES, TOKENIZER = "vocab.json", "merges.txt", "tokenizer.json"
ADDED_TOKENS, TOKENIZER_CONFIG = "added_tokens.json", "tokenizer_config.json"
_NO_END = f"has no {END_OF_TEXT!r}, GPT-2's end of text; other ends of text, such as </s>, are not supported"
# GPT-2's pre-tokenization (Radford et al. 2019, section 2.2), in tiktoken's faster form. The limit of 100,000 changes
# only the tokens of longer runs of whitespace. Without it, a run of a million makes tiktoken panic (not an Exception).
SPLIT_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s{1,100000}(?!\S)|\s"


def load_tokenizer(name: str | Path) -> tiktoken.Encoding:
    """Load the tokenizer named "gpt2", or from a directory with tokenizer.json, or with vocab.json and merges.txt.

    If a directory has both, as transformers 4 writes it, tokenizer.json is used, since only it has the added words.

    Raises:
        FileNotFoundError: the directory has no tokenizer files.
        ValueError: the files are damaged, do not match, or are not files of a GPT-2 tokenizer; or `name` is neither a
            directory nor known to tiktoken.
        OSError: tiktoken cannot download the tokenizer with this name.
    """
    directory = Path(name)
    if not directory.is_dir():
        try:
            return tiktoken.get_encoding(str(name))
        except ValueError as error:
            raise ValueError(
                f"no tokenizer {str(name)!r}: neither a directory nor known to tiktoken "
                f"({str(error).splitlines()[0]}); the tokenizer of every published size is 'gpt2'"
            ) from None
        except OSError as error:
            raise OSError(
                f"the tokenizer {str(name)!r} cannot be downloaded; set TIKTOKEN_CACHE_DIR to a directory with its "
                f"files, or use the directory of a base ({type(error).__name__})"
            ) from None
    vocabulary = read_vocabulary(directory)
    values: dict[str, Any] = {
        "name": f"bpe-{directory.name}",
        "pat_str": SPLIT_PATTERN,
        "mergeable_ranks": _ranks(vocabulary),
        "special_tokens": dict(vocabulary.special),
    }
    return EncodingWithWords(vocabulary.added, **values) if vocabulary.added else tiktoken.Encoding(**values)


def read_token_ids(directory: Path) -> dict[str, int] | None:
    """Return the id of each token, also special and added ones, of the tokenizer in a directory; None: there is none.

    Raises:
        ValueError: as `load_tokenizer`.
    """
    if (directory / TOKENIZER).is_file():
        vocabulary = _read_tokenizer(directory / TOKENIZER)
        return {**vocabulary.ids, **vocabulary.special}
    return _read_vocab(directory) if (directory / VOCAB).is_file() else None


def read_padding_token(directory: Path) -> tuple[str, int] | None:
    """Return text and id of the padding token that the files of a base name for transformers; None: there is none.

    A token that is not special is not returned: transformers makes a padding token special, and then no longer finds it
    in text.

    Raises:
        ValueError: a file is damaged; as `load_tokenizer`.
    """
    special = read_vocabulary(directory).special
    for name, key in (
        (TOKENIZER_CONFIG, "pad_token"),
        ("special_tokens_map.json", "pad_token"),
        ("generation_config.json", "pad_token_id"),
    ):
        token = read_json(directory / name).get(key) if (directory / name).is_file() else None
        text = token.get("content") if isinstance(token, dict) else token
        found = next((pair for pair in special.items() if text in pair and type(text) in (str, int)), None)
        if found is not None:
            return found
    return None


@dataclass(frozen=True)
class Vocabulary:
    """The content of a byte-level BPE's files."""

    source: str  # names the files, for messages
    ids: Mapping[str, int]  # ids of ordinary tokens, in GPT-2's spelling
    merges: Sequence[tuple[str, str]]  # in their order
    special: Mapping[str, int]  # ids of tokens that no merge makes
    added: Mapping[str, AddedWord]  # words found in ordinary text before merging; each is in `special` or `ids` too

    @property
    def merged(self) -> list[str]:
        """The token of each merge, in the order of the merges."""
        return ["".join(pair) for pair in self.merges]


def read_vocabulary(directory: Path) -> Vocabulary:
    """Read the vocabulary from the tokenizer files of a directory, without validating it.

    Raises:
        FileNotFoundError, ValueError: as `load_tokenizer`.
    """
    if (directory / TOKENIZER).is_file():
        return _read_tokenizer(directory / TOKENIZER)
    for file in (directory / VOCAB, directory / MERGES):
        if not file.is_file():
            raise FileNotFoundError(
                f"{file} does not exist; a tokenizer directory has {TOKENIZER}, or {VOCAB} and {MERGES}"
            )
    ids = _read_vocab(directory)
    if END_OF_TEXT not in ids:
        raise ValueError(f"{directory / VOCAB} {_NO_END}")
    special = {END_OF_TEXT: ids.pop(END_OF_TEXT)}
    lines = read_text(directory / MERGES).split("\n")
    merges = [line.rstrip("\r") for line in lines]
    pairs = [_pair(merge.split(" ")) for merge in merges if merge and not merge.startswith("#version")]
    return Vocabulary(f"{directory / VOCAB} with {MERGES}", ids, pairs, special, added={})


def _read_vocab(directory: Path) -> dict[str, int]:
    file, added = directory / VOCAB, directory / ADDED_TOKENS
    ids = read_json(file)
    if not ids or not all(type(id) is int and id >= 0 for id in ids.values()):
        raise ValueError(f"{file}: a vocabulary maps tokens to ids, which are 0 or more")
    if added.is_file() and (words := [word for word in read_json(added) if word not in ids]):
        raise ValueError(  # the file does not tell which words are special, and how to find the others in text
            f"{added} adds {words[0]!r} to {VOCAB}, which only {TOKENIZER} describes completely; write one with "
            "transformers: AutoTokenizer.from_pretrained(directory).save_pretrained(directory)"
        )
    return ids


def _read_tokenizer(file: Path) -> Vocabulary:
    """Read tokenizer.json, the format of the tokenizers library and the only file that transformers 5 writes."""
    content = read_json(file)
    _check_is_gpt2(file, content)
    try:
        model = content["model"]
        ids = {str(token): _as_id(id) for token, id in model["vocab"].items()}
        pairs = [_pair(merge.split(" ") if isinstance(merge, str) else merge) for merge in model["merges"]]
        listed = {str(token["content"]): token for token in content.get("added_tokens") or ()}
        listed_ids = {text: _as_id(token["id"]) for text, token in listed.items()}
        added = {
            text: AddedWord(listed_ids[text], *(token.get(flag) is True for flag in FLAGS))
            for text, token in listed.items()
            if not token.get("special", True) and text not in (END_OF_TEXT, "")
        }
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{file} is damaged: {type(error).__name__}: {error}") from None
    for text, id in listed_ids.items():
        if ids.get(text, id) != id:
            raise ValueError(f"{file} is damaged: {text!r} is {id} in added_tokens and {ids[text]} in the vocabulary")
    made = {*_byte_of_character(), *map("".join, pairs)} - {END_OF_TEXT}
    # A special token, for example for padding, may be a token that a merge makes. It stays an ordinary token.
    special = {text: id for text, id in listed_ids.items() if text not in ids or text not in made}
    if END_OF_TEXT in ids:
        special[END_OF_TEXT] = ids[END_OF_TEXT]
    if END_OF_TEXT not in special:
        raise ValueError(f"{file} {_NO_END}")
    ordinary = {token: id for token, id in ids.items() if token not in special}
    return Vocabulary(str(file), ordinary, pairs, special, added)


def _check_is_gpt2(file: Path, content: Mapping[str, Any]) -> None:
    """Raise ValueError if the tokenizer splits or changes text in another way than GPT-2's."""
    model, pre_tokenizer, post_processor = (
        content.get(key) or {} for key in ("model", "pre_tokenizer", "post_processor")
    )
    is_gpt2 = (
        all(isinstance(part, dict) for part in (model, pre_tokenizer, post_processor))
        and model.get("type") == "BPE"
        and pre_tokenizer.get("type") == "ByteLevel"
        and not pre_tokenizer.get("add_prefix_space")
        and pre_tokenizer.get("use_regex", True)
        and not content.get("normalizer")
        and not model.get("ignore_merges")
    )
    if not is_gpt2:
        raise ValueError(
            f"{file} is not a GPT-2 tokenizer; needed is a byte-level BPE without normalizer and prefix space"
        )
    # transformers 5 writes a TemplateProcessing without special tokens, which adds nothing
    kind = post_processor.get("type", "ByteLevel")
    if kind != "ByteLevel" and (kind != "TemplateProcessing" or post_processor.get("special_tokens")):
        raise ValueError(
            f"{file}: post_processor is a {kind}, which may add tokens to every text; only GPT-2's ByteLevel is "
            'supported. Set "post_processor" to null to use the tokenizer without these tokens'
        )


def _pair(parts: Sequence[str]) -> tuple[str, str]:
    """Return a merge. A merge that is not of two parts makes a token without an id, which is reported later."""
    return "".join(parts[:1]), "".join(parts[1:])


def _as_id(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{value!r} is not an id")
    return value


def _ranks(vocabulary: Vocabulary) -> dict[bytes, int]:
    """Return bytes -> id for tiktoken, which merges the pair with the lowest id first."""
    ids, merged, source = vocabulary.ids, vocabulary.merged, vocabulary.source
    lacking = len(_byte_of_character().keys() - ids)
    if lacking:
        raise ValueError(
            f"{source}: the vocabulary lacks {lacking} of the 256 bytes, so it cannot encode every text; with the "
            "tokenizers library, train it with initial_alphabet=ByteLevel.alphabet()"
        )
    missing = [token for token in merged if token not in ids]
    if missing:
        raise ValueError(f"{source}: the vocabulary has no {missing[0]!r}, which the merges need; they do not match")
    made = {*_byte_of_character(), *merged}
    unmade = next((token for token in ids if token not in made), None)
    if unmade is not None:
        raise ValueError(
            f"{source}: no merge makes the token {unmade!r}; the files do not match, or it is a special token: declare "
            f"it in transformers (add_special_tokens, then save_pretrained), which lists it in {TOKENIZER}"
        )
    order = [ids[token] for token in merged]
    if order != sorted(order) or len(ids) != len(set(merged)) + 256:
        raise ValueError(f"{source}: tokens are not numbered in the order of the merges; this is not a GPT-2 tokenizer")
    numbers = sorted([*ids.values(), *vocabulary.special.values()])
    if numbers != list(range(len(numbers))):
        raise ValueError(f"{source}: {len(numbers)} tokens do not have the ids 0 to {len(numbers) - 1}, each once")
    return {_to_bytes(token): id for token, id in ids.items()}


def _to_bytes(token: str) -> bytes:
    return bytes(_byte_of_character()[character] for character in token)


@lru_cache
def _byte_of_character() -> dict[str, int]:
    """Return GPT-2's spelling of bytes: the byte's Latin-1 character if it is visible, otherwise one from U+0100 on."""
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(256 + i): byte for i, byte in enumerate(hidden)}
