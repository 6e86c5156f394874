"""Conversion of instruction records to training examples: splitting, length limits, encoding. No network access."""

from collections import Counter, defaultdict
from collections.abc import Collection, Hashable, Sequence
from dataclasses import dataclass
from operator import index
from typing import NamedTuple

import tiktoken
import torch

from gpt2core.config import GPT2Config, TooLong
from gpt2core.metrics import normalize
from gpt2core.prompt import MARKERS, format_prompt
from gpt2core.record_files import PARTS, Part
from gpt2core.records import (  # re-exported: the public path of these names
    TEXTS,
    Record,
    check_records,
    check_texts,
    location_of,
    read_records,
    records_sha256,
    to_jsonl,
)
from gpt2core.tensors import as_ints

__all__ = [
    "Example",
    "LongRecord",
    "Record",
    "Split",
    "by_part",
    "check_examples",
    "check_records",
    "connected_components",
    "count_duplicates",
    "count_leaks",
    "count_repeated_questions",
    "encode_records",
    "find_markers",
    "find_too_long",
    "limit_lengths",
    "location_of",
    "question",
    "read_records",
    "records_sha256",
    "same_question",
    "split_records",
    "to_jsonl",
]

TRUNCATED = "truncated"  # key of a record whose output is cut
SHOWN_RECORDS = 10  # maximum number of locations in one message


class Split(NamedTuple):
    train: list[Record]
    val: list[Record]
    test: list[Record]


@dataclass(frozen=True)
class Example:
    """One record as tokens: prompt, response, end of text (not if the response is truncated)."""

    input_ids: list[int]  # or an array or a tensor, which becomes a list
    prompt_length: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "input_ids", as_ints(self.input_ids))
        object.__setattr__(self, "prompt_length", index(self.prompt_length))


@dataclass(frozen=True)
class LongRecord:
    """A record with more tokens than the context."""

    index: int
    location: str  # location in the user's file, or number in the list, from 1
    tokens: int  # number of tokens of prompt, response and end of text


def count_duplicates(records: Sequence[Record]) -> int:
    """Return the number of records equal to an earlier one. They are kept: they may be repeated on purpose."""
    return len(records) - len({(*question(record), record["output"]) for record in records})


def count_repeated_questions(records: Sequence[Record]) -> int:
    """Return the number of records with an earlier record's question (`same_question`). A split keeps them together."""
    return len(records) - len({same_question(record) for record in records})


def find_markers(records: Sequence[Record]) -> list[str]:
    """Return the locations of records whose text contains a marker of the prompt.

    Markers are the section headers, the preamble and the end-of-text token. The model cannot distinguish them from the
    prompt's own. Answers are cut at a marker, so an answer equal to such an output never counts as correct.
    """
    return [
        location_of(records, i)
        for i, record in enumerate(records)
        if any(marker in (record.get(key) or "") for key in TEXTS for marker in MARKERS)
    ]


def count_leaks(records: Sequence[Record], part: Part = "train") -> int:
    """Return the number of records of later parts (of train, val, test) whose question is also in this part."""
    parts = Split._fields
    known = {same_question(record) for record in records if _part(record) == part}
    later = parts[parts.index(part) + 1 :]
    return sum(_part(record) in later and same_question(record) in known for record in records)


def by_part(records: Sequence[Record]) -> Split:
    """Return the records by their own `part`. Those without one are train records.

    Raises:
        ValueError: a part is unknown.
    """
    parts = Split([], [], [])
    for record in records:
        getattr(parts, _part(record)).append(record)
    return parts


def _part(record: Record) -> Part:
    part = record.get("part") or "train"
    if part.lower() not in PARTS:
        raise ValueError(f"a record has the part {part!r}; the known ones are {', '.join(PARTS)}")
    return PARTS[part.lower()]


def split_records(
    records: Sequence[Record], seed: int | None, val_fraction: float = 0.05, test_fraction: float = 0.1
) -> Split:
    """Split by the records' own `part`. A part without records is split off from the train records.

    Truncated records (see `limit_lengths`) of the test part are dropped.

    Raises:
        ValueError: a text is missing or not a string (see `check_records`), a part is unknown, or all test records were
            truncated; otherwise as `split_evenly`.
    """
    check_texts(records)
    given = Split(*([_without_part(record) for record in part] for part in by_part(records)))
    if not given.train:
        raise ValueError(f"{len(records)} records, but none of them is for training")
    fractions = (0.0 if given.val else val_fraction, 0.0 if given.test else test_fraction)
    parts = split_evenly(given.train, seed, *fractions)
    chosen = given.test or parts.test
    test = [record for record in chosen if not record.get(TRUNCATED)]
    if chosen and not test:
        raise ValueError(f"all {len(chosen)} records of the test part were truncated; set too_long to drop")
    return Split(parts.train, given.val or parts.val, test)


def _without_part(record: Record) -> Record:
    return {key: text for key, text in record.items() if key != "part"}


def split_evenly(records: Sequence[Record], seed: int | None, val_fraction: float, test_fraction: float) -> Split:
    """Shuffle by the seed and split. `seed=None` keeps the file's order: train first, then test, then validation.

    Records with the same `group` or the same question (`same_question`) stay together. If records have a family, the
    split is stratified by it. The parts have exactly the requested sizes, unless no combination of whole groups has
    this size. A test_fraction above 0 gives at least one test record.

    Raises:
        ValueError: the fractions are out of range, or they or the groups leave no training record or no test record.
    """
    n = len(records)
    if not (0 <= val_fraction < 1 and 0 <= test_fraction < 1 and val_fraction + test_fraction < 1):
        raise ValueError(
            f"val_fraction={val_fraction} and test_fraction={test_fraction} must be 0 or more, and below 1 together"
        )
    n_test, n_val = round(n * test_fraction), round(n * val_fraction)
    if test_fraction:
        n_test = max(n_test, 1)
    if n and n_test + n_val >= n:
        raise ValueError(f"{n} records cannot be split into train, {n_val} validation and {n_test} test records")
    groups = _ordered_groups(records, seed)
    n_groups = len(groups)
    if seed is None:  # test and validation are taken from the end of the file; validation is the last part
        groups.reverse()
        val, groups = _take(groups, n_val)
        test, groups = _take(groups, n_test)
        groups, val, test = groups[::-1], val[::-1], test[::-1]
    else:
        test, groups = _take(groups, n_test)
        val, groups = _take(groups, n_val)
    if n and (not groups or (n_test and not test)):
        raise ValueError(
            f"{n} records in {n_groups} groups (same group or same question) cannot be split: no group is small enough "
            f"for {n_test} test records; raise test_fraction, or give records of one topic different groups"
        )
    return Split(*([records[i] for group in part for i in group] for part in (groups, val, test)))


def question(record: Record) -> tuple[str, str]:
    """Return the question of a record: its instruction and input."""
    return record["instruction"], record.get("input") or ""


def same_question(record: Record) -> tuple[str, str]:
    """Return the question after `normalize`, which removes differences such as case and whitespace."""
    instruction, input = map(normalize, question(record))
    return instruction, input


def _ordered_groups(records: Sequence[Record], seed: int | None) -> list[list[int]]:
    """Return the indices of records by group, shuffled so that every slice of the list is stratified by family."""
    groups = _groups(records)
    if seed is None:
        return groups
    generator = torch.Generator().manual_seed(int(seed))
    groups = [groups[i] for i in torch.randperm(len(groups), generator=generator).tolist()]
    families = Counter(records[group[0]].get("family", "") for group in groups)
    rank: Counter[str] = Counter()
    position = {}
    for group in groups:
        family = records[group[0]].get("family", "")
        position[group[0]] = (rank[family] + 0.5) / families[family]
        rank[family] += 1
    # stable: groups of one family keep their shuffled order
    return sorted(groups, key=lambda group: position[group[0]])


def _groups(records: Sequence[Record]) -> list[list[int]]:
    """Return the connected components of records that share a `group` or question, in order of their first record."""
    keys = list[list[tuple[str, ...]]]()
    for record in records:
        keys.append([("question", *same_question(record))])
        if record.get("group"):
            keys[-1].append(("group", record["group"]))
    return connected_components(keys)


def connected_components(keys: Sequence[Collection[Hashable]]) -> list[list[int]]:
    """Return the indices of items that common keys connect, directly or not, in order of each component's first item.

    Args:
        keys: the keys of each item.
    """
    parent = list(range(len(keys)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = i = parent[parent[i]]
        return i

    first: dict[Hashable, int] = {}
    for i, item_keys in enumerate(keys):
        for key in item_keys:
            lower, higher = sorted((root(first.setdefault(key, i)), root(i)))
            parent[higher] = lower
    components: dict[int, list[int]] = defaultdict(list)
    for i in range(len(keys)):
        components[root(i)].append(i)
    return list(components.values())


def _take(groups: list[list[int]], size: int) -> tuple[list[list[int]], list[list[int]]]:
    """Take whole groups, in order, with at most `size` records in total; return these and the remaining groups."""
    taken, rest = [], []
    for group in groups:
        if len(group) <= size:
            taken.append(group)
            size -= len(group)
        else:
            rest.append(group)
    return taken, rest


def find_too_long(records: Sequence[Record], tokenizer: tiktoken.Encoding, context_length: int) -> list[LongRecord]:
    """Return all records with more than `context_length` tokens."""
    return _too_long(records, [_encode(record, tokenizer) for record in records], context_length)


def limit_lengths(
    records: Sequence[Record], tokenizer: tiktoken.Encoding, context_length: int, too_long: TooLong
) -> tuple[list[Record], list[LongRecord]]:
    """Apply `too_long` to records that do not fit into the context.

    Returns the records that fit or were truncated, and a description of the dropped and the truncated records. A
    truncated record has the key `truncated`: its example does not end with the end of text, so that the model does not
    learn to stop there. A test record is dropped instead, because a full answer would differ from a cut reference.

    Raises:
        ValueError: `too_long` is "error" and a record does not fit, or it is "truncate" and a prompt leaves no space
            for an output: the message has all locations. Or no record of a part is left.
    """
    long_records = find_too_long(records, tokenizer, context_length)
    if long_records and too_long == "error":
        raise _too_long_error(long_records, len(records), context_length)
    limited: dict[int, Record] = dict(enumerate(records))
    without_room = []
    for long_record in long_records:
        record = limited.pop(long_record.index)
        if too_long == "truncate" and _part(record) != "test":
            shorter = _truncate(record, tokenizer, context_length)
            if shorter is None:
                without_room.append(long_record)
            else:
                limited[long_record.index] = shorter
    limited = dict(sorted(limited.items()))
    if without_room:
        raise ValueError(
            f"{len(without_room)} prompts leave no room for an output in a context of {context_length} tokens: "
            f"{_locations(without_room)}; set too_long to drop, or use a base with a longer context"
        )
    parts = Counter(record.get("part", "") for record in records)
    for part in parts.keys() - {record.get("part", "") for record in limited.values()}:  # else split off from train
        of_part = f" of the part {part}" if part else ""
        raise ValueError(f"all {parts[part]} records{of_part} have more tokens than the context of {context_length}")
    return list(limited.values()), long_records


def encode_records(records: Sequence[Record], tokenizer: tiktoken.Encoding, context_length: int) -> list[Example]:
    """Convert each record to an `Example`.

    Prompt and response are encoded separately, so that the tokens of the inference prompt are a strict prefix of the
    example's tokens.

    Raises:
        ValueError: records have more than `context_length` tokens, or a text is missing or not a string; the message
            names them.
    """
    check_texts(records)
    examples = [_encode(record, tokenizer) for record in records]
    long_records = _too_long(records, examples, context_length)
    if long_records:
        raise _too_long_error(long_records, len(records), context_length)
    return examples


def check_examples(name: str, examples: Sequence[Example], config: GPT2Config) -> None:
    """Reject invalid examples. Without this check, an out-of-range index on a GPU is an error without a location.

    Raises:
        ValueError: an example has no prompt or no response, more tokens than the context, or an unknown token.
    """
    for i, (ids, prompt_length) in enumerate((example.input_ids, example.prompt_length) for example in examples):
        if not 1 <= prompt_length < len(ids):
            problem = f"has a prompt of {prompt_length} tokens; it must be at least 1 and leave a response"
        elif len(ids) > config.n_positions + 1:  # the last token is a label only
            problem = f"has {len(ids)} tokens, more than the context of {config.n_positions}"
        elif not (0 <= min(ids) and max(ids) < config.vocab_size):
            problem = f"has token ids from {min(ids)} to {max(ids)}, but the model has {config.vocab_size} tokens"
        else:
            continue
        raise ValueError(f"{name} example {i + 1} {problem}")


def _encode(record: Record, tokenizer: tiktoken.Encoding) -> Example:
    prompt = tokenizer.encode_ordinary(format_prompt(record["instruction"], record.get("input", "")))
    end = [] if record.get(TRUNCATED) else [tokenizer.eot_token]
    return Example([*prompt, *tokenizer.encode_ordinary(record["output"]), *end], len(prompt))


def _truncate(record: Record, tokenizer: tiktoken.Encoding, context_length: int) -> Record | None:
    """Return the record with its output cut to the longest prefix that fits; None if not even one token fits."""
    example = _encode(record, tokenizer)
    output = example.input_ids[example.prompt_length : -1]
    for length in range(context_length - example.prompt_length, 0, -1):
        # A cut inside a character leaves incomplete bytes, which are ignored; the shorter text may have other tokens.
        text = tokenizer.decode_bytes(output[:length]).decode(errors="ignore")
        shorter = record | {"output": text, TRUNCATED: "true"}
        if text.strip() and len(_encode(shorter, tokenizer).input_ids) <= context_length:
            return shorter
    return None


def _too_long(records: Sequence[Record], examples: Sequence[Example], context_length: int) -> list[LongRecord]:
    return [
        LongRecord(i, location_of(records, i), len(example.input_ids))
        for i, example in enumerate(examples)
        if len(example.input_ids) > context_length
    ]


def _too_long_error(long_records: Sequence[LongRecord], n: int, context_length: int) -> ValueError:
    return ValueError(
        f"{len(long_records)} of {n} records have more tokens than the context of {context_length}: "
        f"{_locations(long_records)}; shorten them, set too_long to drop or truncate, or use a base with a longer "
        "context"
    )


def _locations(long_records: Sequence[LongRecord]) -> str:
    shown = ", ".join(f"{record.location} has {record.tokens} tokens" for record in long_records[:SHOWN_RECORDS])
    rest = len(long_records) - SHOWN_RECORDS
    return f"{shown}{f' and {rest} more' if rest > 0 else ''}"
