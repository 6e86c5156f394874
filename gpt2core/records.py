"""Validates and writes instruction records. Errors have the location in the user's file.

`gpt2core/record_files.py` reads the files; `gpt2core/record_formats.py` has the known formats of records.
"""

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from gpt2core.record_files import NO_COLUMNS, PARTS, Row, read_rows
from gpt2core.record_formats import (
    LABELS,
    REQUIRED,
    SHAREGPT,
    TEXTS,
    format_of,
    ignored_keys,
    roles_of,
    shorten,
    to_records,
    type_name,
)

logger = logging.getLogger(__name__)

Record = dict[str, str]  # keys: instruction, input, output; if known also group, family, part; truncated
SHOWN_PROBLEMS = 5  # maximum number of a file's faulty records in one message


class FileRecord(dict[str, str]):
    """A record with its location in a file. It is equal to a dict of the same values; JSON drops the location."""

    location: str = ""  # like "record 3 (line 7)", counted from 1


def location_of(records: Sequence[Record], i: int) -> str:
    """Return the record's location in its file, counted from 1; for records made in memory, its number in the list."""
    return getattr(records[i], "location", "") or f"record {i + 1}"


def read_records(
    file: str | Path,
    required: Sequence[str] = REQUIRED,
    columns: Mapping[str, str] = NO_COLUMNS,
    on_invalid: Callable[[str], object] | None = None,
) -> list[Record]:
    """Read the records of a file that `read_rows` supports. Each must have non-empty `required` keys.

    Args:
        columns: key of a record -> its name in the file, if that differs.
        on_invalid: see `make_records`.

    Raises:
        FileNotFoundError, ValueError: the message names the file, and the line, column and record of the error.
    """
    file = Path(file)
    return make_records(read_rows(file, columns), str(file), required, columns, on_invalid)


def make_records(
    rows: Iterable[Row],
    source: str,
    required: Sequence[str] = REQUIRED,
    columns: Mapping[str, str] = NO_COLUMNS,
    on_invalid: Callable[[str], object] | None = None,
) -> list[Record]:
    """Convert rows of any known format to records, and log the formats.

    The records of a conversation get a common `group`, so that a split keeps them together.

    Args:
        on_invalid: called with location and error of each faulty record, which is dropped with a warning. None: faulty
            records are an error.

    Raises:
        ValueError: there are no rows, or some are faulty (with `on_invalid`: all); the message has the source and their
            locations.
    """
    records: list[Record] = []
    problems: list[str] = []
    counts = _FormatCounts(columns)
    for row in rows:
        counts.add(row.value)
        for record in _records_of(row, required, columns):
            if isinstance(record, str):
                problems.append(record)
            else:
                records.append(record)
    if not records and not problems:
        raise ValueError(f"{source}: the list of records is empty")
    if problems and (counts.formats[""] or any(": no '" in problem for problem in problems)):
        known = "instruction and output, prompt and completion, messages, or conversations"
        problems[min(len(problems), SHOWN_PROBLEMS) - 1] += f" (a record has {known}; data.columns maps other names)"
    if on_invalid is None or not records:
        way_out = "; data.invalid=drop leaves such records out" if records and "output" in required else ""
        _refuse(problems, source, way_out)
    elif problems:
        dropped, total = len(problems), len(problems) + len(records)
        logger.warning("%s: %d of %d records are invalid and were dropped: %s", source, dropped, total, _list(problems))
        for problem in problems:
            on_invalid(problem)
    counts.log(source, len(records))
    return records


def _records_of(row: Row, required: Sequence[str], columns: Mapping[str, str]) -> Iterator[Record | str]:
    """Yield the records of a row. For a faulty record, yield its location and a description of its error."""
    try:
        records = [_record(value, required) for value in to_records(row.value, required, columns)]
    except ValueError as error:
        records = [str(error)]
    is_conversation = len(records) > 1
    # The group is named by its content: a number could be the same for conversations of different files.
    digest = records_sha256([record for record in records if not isinstance(record, str)]) if is_conversation else ""
    for answer, record in enumerate(records, 1):
        location = f"{row.location}, answer {answer}" if is_conversation else row.location
        if isinstance(record, str):
            yield f"{location}: {record}"
            continue
        if is_conversation:
            record.setdefault("group", f"conversation {digest[:12]}")
        yield _with_location(record | ({"part": PARTS[row.part]} if row.part else {}), location)


class _FormatCounts:
    """What `make_records` logs about the formats of a file's rows."""

    def __init__(self, columns: Mapping[str, str]) -> None:
        self._columns = columns
        self.formats, self._ignored = Counter[str](), Counter[str]()
        self._conversations = self._with_system = self._skipped = 0

    def add(self, value: Any) -> None:
        name, roles = format_of(value, self._columns), roles_of(value, self._columns)
        self.formats[name] += 1
        self._ignored.update(ignored_keys(value, self._columns))
        self._conversations += bool(roles)
        self._with_system += "system" in roles
        first = next((role for role in roles if role != "system"), "")
        self._skipped += name == SHAREGPT and first == "assistant"

    def log(self, source: str, n_records: int) -> None:
        read_as = ", ".join(f"{count} as {name}" for name, count in self.formats.items())
        logger.info("%s: %d records, read %s", source, n_records, read_as)
        if self._ignored:
            keys = ", ".join(f"{shorten(key)} in {count}" for key, count in self._ignored.most_common(SHOWN_PROBLEMS))
            logger.warning("%s: keys that are not used: %s (data.columns maps names)", source, keys)
        if self._with_system:
            what = "have system messages, which are dropped"
            logger.warning("%s: %d of %d conversations %s", source, self._with_system, self._conversations, what)
        if self._skipped:
            what = "begin with an answer instead of a question; this answer is skipped"
            logger.warning("%s: %d of %d conversations %s", source, self._skipped, self.formats[SHAREGPT], what)


def check_records(records: Any, source: str = "records", required: Sequence[str] = REQUIRED) -> list[Record]:
    """Check the records; return them without unknown keys, each with all keys of `TEXTS`.

    Raises:
        ValueError: the records are not a list or an empty list, a required key is missing or empty, or a value is not a
            string.
    """
    if not isinstance(records, list):
        raise ValueError(f"{source}: expected a list of records, not a {type(records).__name__}")
    if not records:
        raise ValueError(f"{source}: the list of records is empty")
    checked = [_record(record, required) for record in records]
    _refuse([f"record {i + 1}: {problem}" for i, problem in enumerate(checked) if isinstance(problem, str)], source)
    return [record for record in checked if not isinstance(record, str)]


def check_texts(records: Sequence[Record]) -> None:
    """
    Raises:
        ValueError: a text is missing or not a string, with the record's location.
    """
    texts = ([record.get(key) for key in REQUIRED] + [record.get("input") or ""] for record in records)
    wrong = [i for i, values in enumerate(texts) if not all(isinstance(text, str) for text in values)]
    _refuse([f"{location_of(records, i)}: {_record(records[i], REQUIRED)}" for i in wrong], "records")


def records_sha256(records: Sequence[Record]) -> str:
    """Return the digest of the records in their order. It does not depend on the layout of their file."""
    return hashlib.sha256(to_jsonl(records)).hexdigest()


def to_jsonl(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """Return JSON lines in UTF-8: one object per line, with the keys in their order."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def _with_location(record: Record, location: str) -> Record:
    located = FileRecord(record)
    located.location = location
    return located


def _refuse(problems: Sequence[str], source: str, way_out: str = "") -> None:
    if problems:
        raise ValueError(f"{source}: {_list(problems)}{way_out}")


def _list(problems: Sequence[str]) -> str:
    shown, rest = problems[:SHOWN_PROBLEMS], len(problems) - SHOWN_PROBLEMS
    return f"{'; '.join(shown)}{f'; and {rest} more records' if rest > 0 else ''}"


def _record(value: Any, required: Sequence[str]) -> Record | str:
    """Return the checked record, or a description of its error. An optional key with null counts as missing."""
    if not isinstance(value, dict):
        return f"{type_name(value)}, not an object: {shorten(value)}"
    for key in required:
        if key not in value:
            return f"no {key!r} in {shorten(value)}"
    record = {}
    for key in (*TEXTS, *LABELS):
        text = value.get(key)
        if key in LABELS and isinstance(text, int) and not isinstance(text, bool):  # an id
            text = str(text)
        if text is None and key not in required:
            if key in TEXTS:
                record[key] = ""
            continue
        if not isinstance(text, str):
            kind = "null" if text is None else f"{shorten(text)}, {type_name(text)}"
            return f"{key!r} is {kind}; it must be a string"
        if key in required and not text.strip():
            return f"{key!r} is empty in {shorten(value)}"
        try:
            text.encode()
        except UnicodeEncodeError as error:  # a lone surrogate: no tokenizer can encode it
            return f"{key!r} is not valid Unicode text: {error}"
        record[key] = text
    return record
