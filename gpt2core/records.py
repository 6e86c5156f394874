"""Instruction records: reading files of them, checking them, writing them. Errors name the place in the user's file."""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

Record = dict[str, str]  # instruction, input, output; and group, family where known
TEXTS = ("instruction", "input", "output")
LABELS = ("group", "family")
REQUIRED = ("instruction", "output")
SHOWN_PROBLEMS = 5  # of a file's faulty records, in one message
_BLANK = re.compile("[ \t\r\n\ufeff]*")  # JSON's whitespace, and the byte order marks that concatenating files leaves
_ENCODINGS = (
    (b"\xff\xfe\0\0", "UTF-32"),
    (b"\0\0\xfe\xff", "UTF-32"),
    (b"\xff\xfe", "UTF-16"),
    (b"\xfe\xff", "UTF-16"),
)


class FileRecord(dict[str, str]):
    """A record that knows where it was read. Equal to a plain dict of the same values; JSON does not keep the place."""

    place: str = ""  # like "record 3 (line 7)", counted from 1


def place_of(records: Sequence[Record], i: int) -> str:
    """Where the record is in its file, as the user counts; for records made in memory, its number in the list."""
    return getattr(records[i], "place", "") or f"record {i + 1}"


def read_records(file: str | Path, required: Sequence[str] = REQUIRED) -> list[Record]:
    """Records from a .json, .jsonl or .ndjson file, each with non-empty `required` keys.

    Lines end at "\\n" only. A .json file may also contain lines, or several lists one after the other.

    Raises:
        FileNotFoundError, ValueError: naming the file, and line, column and record where something is wrong.
    """
    file = Path(file)
    if not file.is_file():
        raise FileNotFoundError(f"{file} is a directory, not a file" if file.is_dir() else f"{file} does not exist")
    if file.suffix.lower() not in (".json", ".jsonl", ".ndjson"):
        raise ValueError(f"{file} is a {file.suffix or 'file without a suffix'}; records are read from .json or .jsonl")
    text = _decode(file.read_bytes(), file)
    found = list(_Parser(text, file).records())
    if not found:
        raise ValueError(f"{file}: the list of records is empty")
    records = [_record(value, required) for _, value in found]
    problems = [
        f"{place}: {problem}" for (place, _), problem in zip(found, records, strict=True) if isinstance(problem, str)
    ]
    _refuse(problems, str(file))
    return [_placed(record, place) for (place, _), record in zip(found, records, strict=True)]


def check_records(records: Any, source: str = "records", required: Sequence[str] = REQUIRED) -> list[Record]:
    """The records, each with `input` and `output` and without unknown keys.

    Raises:
        ValueError: not a list, an empty list, a missing key, a value that is not a string, or an empty required one.
    """
    if not isinstance(records, list):
        raise ValueError(f"{source}: expected a list of records, not a {type(records).__name__}")
    if not records:
        raise ValueError(f"{source}: the list of records is empty")
    checked = [_record(record, required) for record in records]
    _refuse([f"record {i + 1}: {problem}" for i, problem in enumerate(checked) if isinstance(problem, str)], source)
    return [record for record in checked if not isinstance(record, str)]


def records_sha256(records: Sequence[Record]) -> str:
    """Digest of the records in their order, independent of the layout of their file."""
    return hashlib.sha256(to_jsonl(records)).hexdigest()


def to_jsonl(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """JSON lines in UTF-8: one object per line, keys in their order."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def _placed(record: Record | str, place: str) -> Record:
    assert not isinstance(record, str)
    placed = FileRecord(record)
    placed.place = place
    return placed


def _refuse(problems: Sequence[str], source: str) -> None:
    if problems:
        shown, rest = problems[:SHOWN_PROBLEMS], len(problems) - SHOWN_PROBLEMS
        raise ValueError(f"{source}: {'; '.join(shown)}{f'; and {rest} more records' if rest > 0 else ''}")


def _record(value: Any, required: Sequence[str]) -> Record | str:
    """The checked record, or what is wrong with it. null in an optional key counts as absent."""
    if not isinstance(value, dict):
        return f"a {type(value).__name__}, not an object: {shorten(value)}"
    for key in required:
        if key not in value:
            return f"no {key!r} in {shorten(value)}"
    record = {}
    for key in (*TEXTS, *LABELS):
        text = value.get(key)
        if text is None and key not in required:
            if key in TEXTS:
                record[key] = ""
            continue
        if not isinstance(text, str):
            kind = "null" if text is None else f"{shorten(text)}, a {type(text).__name__}"
            return f"{key!r} is {kind}; it must be a string"
        if key in required and not text.strip():
            return f"{key!r} is empty in {shorten(value)}"
        try:
            text.encode()
        except UnicodeEncodeError as error:  # a lone surrogate: no tokenizer can encode it
            return f"{key!r} is not valid Unicode text: {error}"
        record[key] = text
    return record


def _decode(content: bytes, file: Path) -> str:
    """The text of a UTF-8 file; other encodings are recognised and named."""
    for mark, encoding in _ENCODINGS:
        if content.startswith(mark):
            raise ValueError(f"{file} is {encoding} text (its byte order mark is {mark.hex(' ')}); save it as UTF-8")
    if b"\0" in content[:4]:  # a JSON text starts with ASCII characters
        raise ValueError(f"{file} is UTF-16 or UTF-32 text, or not text at all (it starts with NUL bytes); use UTF-8")
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        before = content[content.rfind(b"\n", 0, error.start) + 1 : error.start].decode(errors="replace")
        raise ValueError(
            f"{file}, line {line}, column {len(before) + 1}: byte 0x{content[error.start]:02x} is not UTF-8; the file "
            f"looks like Latin-1 (ISO-8859-1) or Windows-1252 text, so convert it: iconv -f WINDOWS-1252 -t UTF-8. "
            f"The text before it is {before[-40:]!r}"
        ) from None


class _Forbidden(ValueError):
    """Something that Python's json accepts and a record must not have: a constant like NaN, or a repeated key."""

    def __init__(self, message: str, pattern: str, occurrence: int) -> None:
        super().__init__(message)
        self.pattern, self.occurrence = pattern, occurrence

    def position(self, text: str, start: int) -> int:
        """Where it is: json's hooks are not told. Strings are skipped unless they are what is searched for."""
        matches = re.compile(rf'({self.pattern})|"(?:[^"\\]|\\.)*"', re.DOTALL).finditer(text, start)
        places = [match.start() for match in matches if match[1]]
        return places[min(self.occurrence, len(places)) - 1] if places else start


class _Parser:
    """Reads JSON values one after the other: records, lists of records, or one value per line."""

    def __init__(self, text: str, file: Path) -> None:
        self.text, self.file = text, file
        self.number = 0  # of the current record, from 1
        self.line, self.line_start = 1, 0  # of the position that was located last
        self.decoder = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_no_constant)

    def records(self) -> Iterator[tuple[str, Any]]:
        """Place and value of each record."""
        if not self._has_lines():
            yield from self._values(self.text, 0)
            return
        start = 0
        for line in self.text.split("\n"):
            yield from self._values(line, start)
            start += len(line) + 1

    def _has_lines(self) -> bool:
        """Whether each line is complete by itself: parsed separately, so that an error is found in its own line."""
        start = _skip(self.text, 0)
        if self.file.suffix.lower() != ".json" and not self.text.startswith("[", start):
            return True
        first, newline, _ = self.text[start:].partition("\n")
        try:
            _, end = self.decoder.raw_decode(first)
        except (ValueError, RecursionError):
            return False
        return bool(newline) and _skip(first, end) == len(first)

    def _values(self, text: str, offset: int) -> Iterator[tuple[str, Any]]:
        """The records of a line or of the whole text, which starts at `offset` of the file."""
        position = _skip(text, 0)
        while position < len(text):
            if text[position] == ",":
                self._fail("comma between records outside of a list", offset + position)
            if text[position] != "[":
                place, value, position = self._value(text, position, offset)
                self._check_is_record(value)
                yield place, value
                position = _skip(text, position)
                continue
            position = _skip(text, position + 1)
            while not text.startswith("]", position):
                place, value, position = self._value(text, position, offset)
                yield place, value
                comma = position = _skip(text, position)
                if text.startswith(",", position):
                    position = _skip(text, position + 1)
                    if text.startswith("]", position):
                        self._fail("trailing comma at the end of the list", offset + comma)
                elif not text.startswith("]", position):
                    self._fail("expected ',' or ']' after a record of the list", offset + position)
            position = _skip(text, position + 1)

    def _value(self, text: str, position: int, offset: int) -> tuple[str, Any, int]:
        self.number += 1
        self._locate(offset + position)
        place = f"record {self.number} (line {self.line})"
        try:
            value, end = self.decoder.raw_decode(text, position)
        except json.JSONDecodeError as error:
            before = text[position : error.pos].rstrip()
            if before.endswith(",") and text.startswith(("}", "]"), error.pos):
                self._fail("trailing comma", offset + position + len(before) - 1)
            self._fail(error.msg, offset + error.pos)
        except _Forbidden as error:
            self._fail(str(error), offset + error.position(text, position))
        except RecursionError:
            self._fail("the value is nested too deeply", offset + position)
        except ValueError as error:  # an integer of thousands of digits
            self._fail(str(error).partition(";")[0], offset + position)
        return place, value, end

    def _locate(self, position: int) -> None:
        """Set `line` and `line_start` to those of the position; positions grow, so each character is counted once."""
        self.line += self.text.count("\n", self.line_start, position)
        self.line_start = max(self.text.rfind("\n", self.line_start, position) + 1, self.line_start)

    def _fail(self, what: str, position: int) -> NoReturn:
        self._locate(position)
        before = self.text[max(self.line_start, position - 40) : position]
        after = self.text[position : position + 40].partition("\n")[0]
        raise ValueError(
            f"{self.file}, line {self.line}, column {position - self.line_start + 1} (record {self.number}): "
            f"{what}: after {before!r}{f', before {after!r}' if after else ''}"
        )

    def _check_is_record(self, value: Any) -> None:
        """Refuse a whole file like {"train": [...], "test": [...]}, which is no record."""
        if not isinstance(value, dict) or not value or value.keys() & {"messages", "conversations"}:
            return
        if all(isinstance(inner, list) for inner in value.values()):
            keys = ", ".join(map(repr, list(value)[:5]))
            raise ValueError(
                f"{self.file}: an object with the lists {keys} instead of a list of records with 'instruction' and "
                "'output'; save each list as a file of its own"
            )


def _skip(text: str, position: int) -> int:
    match = _BLANK.match(text, position)
    assert match is not None
    return match.end()


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for i, key in enumerate(keys) if key in keys[:i])
        spellings = (re.escape(json.dumps(twice, ensure_ascii=ascii)) for ascii in (True, False))
        raise _Forbidden(f"the key {twice!r} occurs twice in one object", rf"(?:{'|'.join(spellings)})\s*:", 2)
    return value


def _no_constant(name: str) -> NoReturn:
    raise _Forbidden(f"{name} is not allowed in JSON", name, 1)


def shorten(value: Any) -> str:
    """The value as ASCII JSON of at most 120 characters, for messages."""
    text = json.dumps(value, ensure_ascii=True, default=str)
    return text if len(text) <= 120 else f"{text[:117]}..."
