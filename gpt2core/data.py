"""Instruction records: reading, checking, splitting, encoding. Downloads nothing."""

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import tiktoken
import torch

from gpt2core.prompt import format_prompt

Record = dict[str, str]  # instruction, input, output; and group, family where known
_KEYS = ("instruction", "input", "output", "group", "family")
REQUIRED = ("instruction", "output")


class Split(NamedTuple):
    train: list[Record]
    val: list[Record]
    test: list[Record]


@dataclass(frozen=True)
class Example:
    """One record as tokens: prompt, response, end of text."""

    input_ids: list[int]
    prompt_length: int


def read_records(file: str | Path, required: Sequence[str] = REQUIRED) -> list[Record]:
    """Records from a .json list or from .jsonl lines, each with non-empty `required` keys.

    Raises:
        FileNotFoundError, ValueError: naming the file and the record.
    """
    file = Path(file)
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist")
    try:
        text = file.read_text(encoding="utf-8-sig")
        if file.suffix == ".jsonl":
            records: Any = [json.loads(line) for line in text.splitlines() if line.strip()]
        else:
            records = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{file} is not valid {file.suffix.lstrip('.') or 'json'}: {error}") from None
    return check_records(records, str(file), required)


def check_records(records: Any, source: str = "records", required: Sequence[str] = REQUIRED) -> list[Record]:
    """The records, each with `input` and `output` and without unknown keys.

    Raises:
        ValueError: not a list, an empty list, a missing key, a value that is not a string, or an empty required one.
    """
    if not isinstance(records, list):
        raise ValueError(f"{source}: expected a list of records, not a {type(records).__name__}")
    if not records:
        raise ValueError(f"{source}: the list of records is empty")
    return [_check_record(record, f"{source}: record {i}", required) for i, record in enumerate(records)]


def _check_record(record: Any, where: str, required: Sequence[str]) -> Record:
    if not isinstance(record, dict):
        raise ValueError(f"{where} is a {type(record).__name__}, not an object: {_shorten(record)}")
    for key in required:
        if key not in record:
            raise ValueError(f"{where} has no {key!r}: {_shorten(record)}")
    for key in _KEYS:
        value = record.get(key, "")
        if not isinstance(value, str):
            raise ValueError(f"{where}: {key!r} is {_shorten(value)}, a {type(value).__name__}; it must be a string")
        if key in required and not value.strip():
            raise ValueError(f"{where}: {key!r} is empty: {_shorten(record)}")
        try:
            value.encode()
        except UnicodeEncodeError as error:  # a lone surrogate: no tokenizer can encode it
            raise ValueError(f"{where}: {key!r} is not valid Unicode text: {error}") from None
    return {key: record.get(key, "") for key in ("instruction", "input", "output")} | {
        key: record[key] for key in ("group", "family") if key in record
    }


def count_duplicates(records: Sequence[Record]) -> int:
    """Number of records equal to an earlier one. They are kept: repeating a record is a choice of the data's author."""
    seen = Counter((record["instruction"], record["input"], record["output"]) for record in records)
    return sum(seen.values()) - len(seen)


def records_sha256(records: Sequence[Record]) -> str:
    """Digest of the records in their order, independent of the layout of their file."""
    return hashlib.sha256(to_jsonl(records)).hexdigest()


def to_jsonl(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """JSON lines in UTF-8: one object per line, keys in their order."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def split_records(
    records: Sequence[Record], seed: int | None, val_fraction: float = 0.05, test_fraction: float = 0.1
) -> Split:
    """Shuffle by the seed and split; `seed=None` keeps the file's order: train first, then test, then validation.

    Records of one `group` stay together. Each family, where records have one, is represented in each part in
    proportion. The parts have exactly the requested sizes unless the groups are too large to add up to them.

    Raises:
        ValueError: the fractions leave no training record.
    """
    n = len(records)
    if not (0 <= val_fraction < 1 and 0 <= test_fraction < 1 and val_fraction + test_fraction < 1):
        raise ValueError(
            f"val_fraction={val_fraction} and test_fraction={test_fraction} must be 0 or more, and below 1 together"
        )
    n_test, n_val = round(n * test_fraction), round(n * val_fraction)
    if n and n_test + n_val >= n:
        raise ValueError(f"{n} records cannot be split into train, {n_val} validation and {n_test} test records")
    groups = _ordered_groups(records, seed)
    if seed is None:  # the parts are taken from the end of the file, validation last
        groups.reverse()
        val, groups = _take(groups, n_val)
        test, groups = _take(groups, n_test)
        groups, val, test = groups[::-1], val[::-1], test[::-1]
    else:
        test, groups = _take(groups, n_test)
        val, groups = _take(groups, n_val)
    return Split(*([records[i] for group in part for i in group] for part in (groups, val, test)))


def _ordered_groups(records: Sequence[Record], seed: int | None) -> list[list[int]]:
    """Indices of records by group, shuffled so that any slice of the list has each family in proportion."""
    members: dict[tuple[str, str], list[int]] = defaultdict(list)
    for i, record in enumerate(records):
        # the first element keeps a record without a group apart from a group that is named like its index
        members[("group", record["group"]) if record.get("group") else ("record", str(i))].append(i)
    groups = list(members.values())
    if seed is None:
        return groups
    generator = torch.Generator().manual_seed(seed)
    groups = [groups[i] for i in torch.randperm(len(groups), generator=generator).tolist()]
    families = Counter(records[group[0]].get("family", "") for group in groups)
    rank: Counter[str] = Counter()
    place = {}
    for group in groups:
        family = records[group[0]].get("family", "")
        place[group[0]] = (rank[family] + 0.5) / families[family]
        rank[family] += 1
    return sorted(groups, key=lambda group: place[group[0]])  # stable: groups of one family keep their shuffled order


def _take(groups: list[list[int]], size: int) -> tuple[list[list[int]], list[list[int]]]:
    """Whole groups, in order, that have at most `size` records together; and the remaining groups."""
    taken, rest = [], []
    for group in groups:
        if len(group) <= size:
            taken.append(group)
            size -= len(group)
        else:
            rest.append(group)
    return taken, rest


def encode_records(records: Sequence[Record], tokenizer: tiktoken.Encoding, context_length: int) -> list[Example]:
    """Each record as an Example.

    Prompt and response are encoded separately: the tokens of the inference prompt are a strict prefix of the example's.

    Raises:
        ValueError: a record has more than `context_length` tokens.
    """
    examples = []
    for i, record in enumerate(records):
        prompt = tokenizer.encode_ordinary(format_prompt(record["instruction"], record.get("input", "")))
        input_ids = [*prompt, *tokenizer.encode_ordinary(record["output"]), tokenizer.eot_token]
        if len(input_ids) > context_length:
            raise ValueError(
                f"record {i} has {len(input_ids)} tokens but the context holds {context_length}; "
                f"shorten it, remove it, or use a base with a longer context: {_shorten(record)}"
            )
        examples.append(Example(input_ids, len(prompt)))
    return examples


def _shorten(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=True, default=str)
    return text if len(text) <= 120 else f"{text[:117]}..."
