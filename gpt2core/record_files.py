"""Reads the rows of JSON, JSON Lines and CSV files, with their locations in the file.

`gpt2core/records.py` makes records of them.
"""

import csv
import io
import json
import re
from collections.abc import Generator, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, NoReturn

from gpt2core.files import describe_content, describe_file
from gpt2core.record_formats import CHATS, PAIR, is_turn, shorten

Part = Literal["train", "val", "test"]
PARTS: Mapping[str, Part] = MappingProxyType(
    {
        **dict.fromkeys(("train", "training"), "train"),
        **dict.fromkeys(("val", "valid", "validation", "dev", "eval"), "val"),
        "test": "test",
    }
)
SUFFIXES = (".json", ".jsonl", ".ndjson", ".csv", ".tsv")
NO_COLUMNS: Mapping[str, str] = MappingProxyType({})
_BLANK = re.compile("[ \t\r\n\ufeff]*")  # JSON's whitespace, and byte order marks, which concatenated files contain
_ENCODINGS = (
    (b"\xff\xfe\0\0", "UTF-32"),
    (b"\0\0\xfe\xff", "UTF-32"),
    (b"\xff\xfe", "UTF-16"),
    (b"\xfe\xff", "UTF-16"),
)


class Row(NamedTuple):
    """A value of a file that is not checked yet: it may not be a record."""

    location: str  # like "record 3 (line 7)", counted from 1
    value: Any
    part: str = ""  # part of the split, a key of PARTS; "": the file does not name it


def read_rows(file: Path, columns: Mapping[str, str] = NO_COLUMNS) -> Iterator[Row]:
    """Yield the rows of a .json, .jsonl, .ndjson, .csv or .tsv file.

    Only "\\n" ends a line of JSON. A .json file may also contain JSON lines, several lists one after the other, or an
    object of lists like {"train": [...], "test": [...]}, whose rows get the `part`. A CSV file must have a header.

    Args:
        columns: key of a record -> its name in the file, if that differs.

    Raises:
        FileNotFoundError, ValueError: the message names the file, and the line and column of the error.
    """
    if not file.is_file():
        kind = "is a directory" if file.is_dir() else "is a pipe or a device" if file.exists() else ""
        raise FileNotFoundError(f"{file} {kind}, not a file" if kind else f"{file} does not exist")
    suffix = file.suffix.lower()
    if suffix not in SUFFIXES:
        if description := describe_file(file):  # like records.jsonl.gz
            raise ValueError(f"{file} {description}")
        raise ValueError(
            f"{file} is a {suffix or 'file without a suffix'}; records are read from .json or .jsonl, .csv and .tsv, "
            "and by the pipeline from .parquet and from directories of the datasets library"
        )
    text = _decode(file.read_bytes(), file)
    return _csv_rows(text, file) if suffix in (".csv", ".tsv") else _Parser(text, file, columns).rows()


def _decode(content: bytes, file: Path) -> str:
    """Decode a UTF-8 file; the error for another encoding or format names it."""
    if description := describe_content(content[:100]):
        raise ValueError(f"{file} {description}")
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
        if error.reason == "unexpected end of data":
            hint = "the file ends inside a character: it is cut off, or has another encoding"
        elif _is_mostly_utf8(content):
            hint = "other lines are UTF-8, so the file is damaged here or mixes encodings; correct this line"
        else:
            hint = (
                "find out its encoding and convert it, for example with iconv -f WINDOWS-1252 -t UTF-8 (or from "
                "CP1250, CP1251, SHIFT_JIS, GB18030); a wrong choice gives wrong letters without an error"
            )
        raise ValueError(
            f"{file}, line {line}, column {len(before) + 1}: byte 0x{content[error.start]:02x} is not UTF-8; {hint}. "
            f"The text before it is {before[-40:]!r}"
        ) from None


def _is_mostly_utf8(content: bytes) -> bool:
    """Return whether at least half of the lines that are not ASCII are UTF-8. A few lines of any encoding may be."""
    lines = [line for line in content.split(b"\n") if not line.isascii()]
    return 2 * sum("\ufffd" not in line.decode(errors="replace") for line in lines) >= len(lines)


def _csv_rows(text: str, file: Path) -> Iterator[Row]:
    """Yield the rows of a CSV file as objects."""
    csv.field_size_limit(max(csv.field_size_limit(), len(text)))  # for the process; the default limit is 128 KiB
    stream = io.StringIO(text.lstrip("\ufeff"), newline="")
    separator = "\t" if file.suffix.lower() == ".tsv" else max(",;\t", key=lambda each: _header_width(stream, each))
    stream.seek(0)
    lines = csv.reader(stream, delimiter=separator, strict=True, skipinitialspace=_has_padding(text, separator))
    header: list[str] = []
    number, start = 0, 1
    try:
        for cells in lines:
            location, start = f"line {start}", lines.line_num + 1
            if not any(cell.strip() for cell in cells):
                continue
            if not header:
                header = [name.strip() for name in cells]
                twice = next((name for name in header if name and header.count(name) > 1), None)
                if twice is not None:
                    raise ValueError(f"{file}, {location}: the column {twice!r} occurs twice in the header")
                continue
            number += 1
            if len(cells) != len(header):
                raise ValueError(
                    f"{file}, {location} (record {number}): {len(cells)} cells, but the header has {len(header)} "
                    f"columns: {shorten(cells)}; a cell with a separator or a line break must be in double quotes"
                )
            # Excel writes empty columns without a name at the end, pandas row numbers at the beginning
            extra = next((i for i, cell in enumerate(cells) if i and cell.strip() and not header[i]), None)
            if extra is not None:
                raise ValueError(
                    f"{file}, {location} (record {number}): column {extra + 1} has no name, but a cell: "
                    f"{shorten(cells[extra])}; name it, or put a cell with a separator in double quotes"
                )
            yield Row(f"record {number} ({location})", dict(zip(header, cells, strict=True)))
    except csv.Error as error:
        raise ValueError(f"{file}, line {start} (record {number + 1}): {error}") from None


def _has_padding(text: str, separator: str) -> bool:
    """Return whether a cell in quotes has blanks before them. Blanks at the beginning of cells are not text then."""
    cells = re.finditer(rf'( *)"(?:[^"]++|"")*+"(?=[{separator}\r\n]|\Z)|[^{separator}\r\n]+', text)
    return any(cell[1] for cell in cells)


def _header_width(stream: io.StringIO, separator: str) -> int:
    """Return the header's number of columns with this separator; 0 if the header cannot be read.

    A separator in a quoted name does not count.
    """
    stream.seek(0)
    try:
        rows = csv.reader(stream, delimiter=separator, strict=True, skipinitialspace=True)
        return next((len(cells) for cells in rows if any(cell.strip() for cell in cells)), 0)
    except csv.Error:
        return 0


class _Forbidden(ValueError):
    """Raised for JSON that Python's json accepts but records must not contain: NaN, Infinity, or a repeated key."""

    def __init__(self, message: str, pattern: str, occurrence: int) -> None:
        super().__init__(message)
        self.pattern, self.occurrence = pattern, occurrence

    def position(self, text: str, start: int) -> int:
        """Search for the position in the text, since json does not tell its hooks.

        Strings are skipped, unless the searched pattern is a string itself.
        """
        matches = re.compile(rf'({self.pattern})|"(?:[^"\\]|\\.)*"', re.DOTALL).finditer(text, start)
        locations = [match.start() for match in matches if match[1]]
        return locations[min(self.occurrence, len(locations)) - 1] if locations else start


class _Parser:
    """Reads JSON values one after the other: records, lists of records, or one value per line."""

    def __init__(self, text: str, file: Path, columns: Mapping[str, str]) -> None:
        self.text, self.file = text, file
        lists = (*CHATS, *PAIR)  # keys of a record whose values can be lists
        self.lists = {*lists, *(columns[key] for key in lists if key in columns)}
        self.number = 0  # number of the current record, from 1
        self.line, self.line_start = 1, 0  # line, and index of its first character, of the position located last
        self.decoder = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_no_constant)

    def rows(self) -> Iterator[Row]:
        if not self._has_lines():
            yield from self._values(self.text, 0)
            return
        start = 0
        for line in self.text.split("\n"):
            yield from self._values(line, start)
            start += len(line) + 1

    def _has_lines(self) -> bool:
        """Return whether each line is a complete value. Lines are then parsed separately, so errors name their line."""
        start = _skip(self.text, 0)
        if self.file.suffix.lower() != ".json" and not self.text.startswith("[", start):
            return True
        first, newline, _ = self.text[start:].partition("\n")
        try:
            _, end = self.decoder.raw_decode(first)
        except (ValueError, RecursionError):
            return False
        return bool(newline) and _skip(first, end) == len(first)

    def _values(self, text: str, offset: int) -> Iterator[Row]:
        """Yield the records of a text: a line, or the whole file. It starts at character `offset` of the file."""
        position = _skip(text, 0)
        while position < len(text):
            if text[position] == ",":
                self._fail("comma between records outside of a list", offset + position)
            if text[position] == "[":
                position = yield from self._list(text, position, offset)
                continue
            location, value, end = self._value(text, position, offset)
            if self._has_parts(value):
                yield from self._parts(text, position, offset, list(value))
            else:
                yield Row(location, value)
            position = _skip(text, end)

    def _list(self, text: str, position: int, offset: int, part: str = "") -> Generator[Row, None, int]:
        """Yield the records of the list that starts at the position; return the position after the list."""
        position = _skip(text, position + 1)
        while not text.startswith("]", position):
            location, value, position = self._value(text, position, offset)
            yield Row(f"{part} {location}".lstrip(), value, part)
            comma = position = _skip(text, position)
            if text.startswith(",", position):
                position = _skip(text, position + 1)
                if text.startswith("]", position):
                    self._fail("trailing comma at the end of the list", offset + comma)
            elif not text.startswith("]", position):
                self._fail("expected ',' or ']' after a record of the list", offset + position)
        return _skip(text, position + 1)

    def _has_parts(self, value: Any) -> bool:
        """Return whether the value is an object of lists of records, like {"train": [...], "test": [...]}."""
        if not isinstance(value, dict) or not value or value.keys() & self.lists:
            return False
        return all(
            isinstance(inner, list) and all(isinstance(x, dict) and not is_turn(x) for x in inner)
            for inner in value.values()
        )

    def _parts(self, text: str, position: int, offset: int, names: Sequence[str]) -> Iterator[Row]:
        """Yield the records of the object of lists at the position. It must be valid JSON."""
        unknown = [name for name in names if name.lower() not in PARTS]
        if unknown and len(names) > 1:
            self._fail(
                f"an object with the lists {', '.join(map(repr, names[:5]))}; the known ones are {', '.join(PARTS)} "
                "(a single list may have any name)",
                offset + position,
            )
        for name in names:
            _, position = self.decoder.raw_decode(text, _skip(text, position + 1))  # after { or a comma: the key
            self.number = 0
            position = yield from self._list(text, text.index("[", position), offset, "" if unknown else name.lower())

    def _value(self, text: str, position: int, offset: int) -> tuple[str, Any, int]:
        self.number += 1
        self._locate(offset + position)
        location = f"record {self.number} (line {self.line})"
        try:
            value, end = self.decoder.raw_decode(text, position)
        except json.JSONDecodeError as error:
            before = text[position : error.pos].rstrip()
            if before.endswith(",") and text.startswith(("}", "]"), error.pos):
                self._fail("trailing comma", offset + position + len(before) - 1)
            what = error.msg
            if self.file.suffix.lower() != ".json" and error.pos >= len(text.rstrip()) < len(self.text.rstrip()):
                what += " (a line ends within a record; if the file has records of several lines: rename it to .json)"
            self._fail(what, offset + error.pos)
        except _Forbidden as error:
            self._fail(str(error), offset + error.position(text, position))
        except RecursionError:
            self._fail("the value is nested too deeply", offset + position)
        except ValueError as error:  # an integer of thousands of digits
            self._fail(str(error).partition(";")[0], offset + position)
        return location, value, end

    def _locate(self, position: int) -> None:
        """Update `line` and `line_start` for a position.

        Positions must not decrease from call to call, so that each character is scanned only once.
        """
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
