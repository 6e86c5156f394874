"""Words that were added to a tokenizer's vocabulary, and their search in text, as in the tokenizers library."""

import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from os.path import commonprefix
from typing import Any

import tiktoken

FLAGS = ("single_word", "lstrip", "rstrip", "normalized")  # fields of AddedWord, keys in tokenizer.json
# Unicode's White_Space and \w, with which the library implements the flags; \s and \w of Python's `re` differ
_WHITESPACE = "\t\n\v\f\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000" + "".join(map(chr, range(0x2000, 0x200B)))
_SPACES = re.compile(f"[{_WHITESPACE}]*")
_WORD_CATEGORIES = {"Lu", "Ll", "Lt", "Lm", "Lo", "Mn", "Mc", "Me", "Nd", "Nl", "Pc"}
_CIRCLED = (range(0x24B6, 0x24EA), range(0x1F130, 0x1F14A), range(0x1F150, 0x1F16A), range(0x1F170, 0x1F18A))


@dataclass(frozen=True)
class AddedWord:
    """A word of transformers' `add_tokens`, with the flags of its AddedToken."""

    id: int
    single_word: bool = False  # found only if no letter or digit is next to it
    lstrip: bool = False  # includes the whitespace to its left
    rstrip: bool = False  # includes the whitespace to its right
    normalized: bool = True  # found only in the text that remains between words without this flag


class EncodingWithWords(tiktoken.Encoding):
    """An encoding that finds added words in ordinary text."""

    def __init__(self, words: Mapping[str, AddedWord], **values: Any) -> None:
        super().__init__(**values)
        groups = ({text: word for text, word in words.items() if word.normalized is flag} for flag in (False, True))
        self._searches = [(re.compile(_longest_of(list(group))), group) for group in groups if group]

    def encode_ordinary(self, text: str) -> list[int]:
        pieces: list[str | int] = [text]
        for pattern, words in self._searches:
            pieces = [part for piece in pieces for part in _find_words(piece, pattern, words)]
        ids: list[int] = []
        for piece in pieces:
            ids += [piece] if isinstance(piece, int) else super().encode_ordinary(piece)
        return ids


def _find_words(piece: str | int, pattern: re.Pattern[str], words: Mapping[str, AddedWord]) -> Iterator[str | int]:
    """Split a text into the ids of words and the text between them; an id stays as it is."""
    if isinstance(piece, int):
        yield piece
        return
    end = 0  # end of the previous word
    for match in pattern.finditer(piece):
        word, (start, stop) = words[match[0]], match.span()
        if word.single_word and (_is_word(piece[start - 1 : start]) or _is_word(piece[stop : stop + 1])):
            continue
        if word.lstrip and start > end:
            start = end + len(piece[end:start].rstrip(_WHITESPACE))
        if word.rstrip and (spaces := _SPACES.match(piece, stop)):
            stop = spaces.end()
        if start > end:
            yield piece[end:start]
        yield word.id
        end = stop
    if end < len(piece):
        yield piece[end:]


def _is_word(character: str) -> bool:
    """Return whether the library counts a character as a word character; "", beyond the ends of a text, is not one."""
    return bool(character) and (
        unicodedata.category(character) in _WORD_CATEGORIES
        or character in "\u200c\u200d"
        or any(ord(character) in letters for letters in _CIRCLED)
    )


def _longest_of(words: Sequence[str], depth: int = 0) -> str:
    """Return a regular expression that matches the longest of the words.

    Common prefixes are factored out. With 10,000 words, plain alternatives take 12 us per character of the text.
    """
    if depth == 50:  # `re` raises RecursionError for hundreds of nested groups, as words like runs of blanks make them
        return f"(?:{'|'.join(map(re.escape, sorted(words, key=len, reverse=True)))})"
    by_first = defaultdict(list)
    for word in words:
        by_first[word[:1]].append(word)
    may_end = by_first.pop("", None) is not None
    branches = []
    for group in by_first.values():
        prefix = commonprefix(group)  # noqa: RUF071  # of characters, as wanted
        branches.append(re.escape(prefix) + _longest_of([word[len(prefix) :] for word in group], depth + 1))
    return f"(?:{'|'.join(branches)}){'?' if may_end else ''}" if branches else ""
