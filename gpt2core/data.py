"""Instruction records: read, checked, split, encoded, batched. Downloads nothing."""

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import tiktoken
import torch
from torch import Tensor

from gpt2core.prompt import format_prompt

IGNORED = -100  # the label of a token that the loss does not see
SHARED, PADDING = -1, -2  # in place of an example's number
ROW_TOKENS = 512  # of a row of examples, about: attention's cost grows with its square
Record = dict[str, str]  # instruction, input, output; and group, family where known
_KEYS = ("instruction", "input", "output", "group", "family")
REQUIRED = ("instruction", "output")


class Split(NamedTuple):
    train: list[Record]
    val: list[Record]
    test: list[Record]


@dataclass(frozen=True)
class Example:
    """One record as tokens: the prompt's, then the response's, then end of text."""

    input_ids: list[int]
    prompt_length: int


class Batch(NamedTuple):
    """Examples behind each other in G rows; none sees another, and what all begin with is there once a row."""

    input_ids: Tensor  # (G, T), padded on the right
    labels: Tensor  # (G, T): the token that comes after, IGNORED where the loss does not look
    n_tokens: int  # without padding; a shared beginning counts for each example
    positions: Tensor | None = None  # (G, T) within the example; None: a row is one text, to be read as it stands
    example: Tensor | None = None  # (G, T) which one a token is of, SHARED, or PADDING; None: there are none


def read_records(file: str | Path, required: Sequence[str] = REQUIRED) -> list[Record]:
    """Records from a .json list or from .jsonl lines; with the `required` keys, which are not empty.

    Raises:
        FileNotFoundError, ValueError: naming the file and the record.
    """
    file = Path(file)
    if not file.is_file():
        raise FileNotFoundError(f"{file} is not there")
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
        ValueError: no list, an empty one, a missing key, a value that is no string, or an empty required one.
    """
    if not isinstance(records, list):
        raise ValueError(f"{source}: a list of records is wanted, not a {type(records).__name__}")
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
        except UnicodeEncodeError as error:  # a lone surrogate: no tokenizer can read it
            raise ValueError(f"{where}: {key!r} is no valid unicode text: {error}") from None
    return {key: record.get(key, "") for key in ("instruction", "input", "output")} | {
        key: record[key] for key in ("group", "family") if key in record
    }


def count_duplicates(records: Sequence[Record]) -> int:
    """How many records say what an earlier one said; they are kept, since repeating one is a choice of the data."""
    seen = Counter((record["instruction"], record["input"], record["output"]) for record in records)
    return sum(seen.values()) - len(seen)


def records_sha256(records: Sequence[Record]) -> str:
    """The digest of the records in their order, however their file was laid out."""
    return hashlib.sha256(to_jsonl(records)).hexdigest()


def to_jsonl(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """One JSON object a line, keys in their order, utf-8."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def split_records(
    records: Sequence[Record], seed: int | None, val_fraction: float = 0.05, test_fraction: float = 0.1
) -> Split:
    """Shuffle by the seed and cut; `seed=None` keeps the file's order: train first, then test, then validation.

    Records of one `group` stay together. Families, where records have one, get their share of each part. The parts
    have the sizes asked for unless the groups are too large to be put together so.

    Raises:
        ValueError: the fractions leave no training record.
    """
    n = len(records)
    if not (0 <= val_fraction < 1 and 0 <= test_fraction < 1 and val_fraction + test_fraction < 1):
        raise ValueError(
            f"val_fraction={val_fraction} and test_fraction={test_fraction} must be 0 or more, below 1 together"
        )
    n_test, n_val = round(n * test_fraction), round(n * val_fraction)
    if n and n_test + n_val >= n:
        raise ValueError(f"{n} records cannot be cut into train, {n_val} validation and {n_test} test records")
    groups = _ordered_groups(records, seed)
    if seed is None:  # the parts are cut from the end of the file, validation last
        groups.reverse()
        val, groups = _take(groups, n_val)
        test, groups = _take(groups, n_test)
        groups, val, test = groups[::-1], val[::-1], test[::-1]
    else:
        test, groups = _take(groups, n_test)
        val, groups = _take(groups, n_val)
    return Split(*([records[i] for group in part for i in group] for part in (groups, val, test)))


def _ordered_groups(records: Sequence[Record], seed: int | None) -> list[list[int]]:
    """Indices of records by group, shuffled so that any stretch of the list holds each family in proportion."""
    members: dict[tuple[str, str], list[int]] = defaultdict(list)
    for i, record in enumerate(records):
        # "#3" cannot be some record's group as well: the first element tells them apart
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
    return sorted(groups, key=lambda group: place[group[0]])  # a stable sort: one family keeps the shuffled order


def _take(groups: list[list[int]], size: int) -> tuple[list[list[int]], list[list[int]]]:
    """Whole groups, first come first taken, that hold `size` records together; and the rest."""
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

    Prompt and response are encoded apart, so the tokens of the inference prompt are a strict prefix of the example's.

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
                f"shorten it, leave it out, or take a base with a longer context: {_shorten(record)}"
            )
        examples.append(Example(input_ids, len(prompt)))
    return examples


def pack(
    examples: Sequence[Example], loss_on: str, device: torch.device | str = "cpu", share_beginning: bool = True
) -> Batch:
    """Lay the examples out so that next to nothing is padding.

    Args:
        share_beginning: what all examples begin with (every prompt has the same preamble) is computed once a row, which
            changes no loss and no gradient. Only where the loss does not look at it.
    """
    first = [example.prompt_length if loss_on == "response" else 1 for example in examples]  # that the loss sees
    shared = _common_prefix(examples, min(first) - 1) if share_beginning and len(examples) > 1 else 0
    lengths = [len(example.input_ids) - 1 - shared for example in examples]  # the last token is only ever a label
    n_rows = min(-(-sum(lengths) // max(ROW_TOKENS - shared, 1)), len(examples))
    rows: list[list[int]] = [[] for _ in range(n_rows)]
    loads = [0] * len(rows)
    for i in sorted(range(len(examples)), key=lambda i: -lengths[i]):  # the longest first, into the emptiest row
        row = loads.index(min(loads))
        rows[row].append(i)
        loads[row] += lengths[i]

    shape = len(rows), shared + max(loads)
    input_ids, positions = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
    labels, example = torch.full(shape, IGNORED), torch.full(shape, PADDING)
    input_ids[:, :shared] = torch.tensor(examples[0].input_ids[:shared], dtype=torch.long)
    positions[:, :shared] = torch.arange(shared)
    example[:, :shared] = SHARED
    for row, members in enumerate(rows):
        start = shared
        for i in members:
            ids, place = torch.tensor(examples[i].input_ids[shared:]), slice(start, start + lengths[i])
            input_ids[row, place], example[row, place] = ids[:-1], i
            positions[row, place] = torch.arange(shared, shared + lengths[i])
            labels[row, start + first[i] - 1 - shared : place.stop] = ids[first[i] - shared :]
            start = place.stop
    n_tokens = sum(lengths) + shared * len(examples)
    plain = n_rows == len(examples)
    return Batch(
        input_ids.to(device),
        labels.to(device),
        n_tokens,
        None if plain else positions.to(device),
        example.to(device),
    )


def _common_prefix(examples: Sequence[Example], at_most: int) -> int:
    """How many tokens, and no more than that, all examples begin with."""
    smallest, largest = min(example.input_ids for example in examples), max(example.input_ids for example in examples)
    for i, (one, other) in enumerate(zip(smallest[:at_most], largest[:at_most], strict=False)):
        if one != other:
            return i
    return at_most


def batches(
    examples: Sequence[Example], batch_size: int, order: Sequence[int] | None = None
) -> Iterator[list[Example]]:
    """`batch_size` examples at a time, in their order or in that of the indices given; the last may be smaller."""
    order = range(len(examples)) if order is None else order
    for start in range(0, len(order), batch_size):
        yield [examples[i] for i in order[start : start + batch_size]]


def _shorten(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=True, default=str)
    return text if len(text) <= 120 else f"{text[:117]}..."
