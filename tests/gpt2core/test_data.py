"""Instruction records: reading, checking, splitting, encoding."""

import json
import os
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt2core.data import (
    check_records,
    count_duplicates,
    encode_records,
    read_records,
    records_sha256,
    split_records,
    to_jsonl,
)
from gpt2core.prompt import format_prompt
from gpt2core.tokenizer import load_tokenizer

GOOD = {"instruction": "Say é.", "input": "", "output": "é"}


def numbered(n: int, **values) -> list[dict]:
    return [{"instruction": f"Say {i}.", "input": "", "output": str(i), **values} for i in range(n)]


@pytest.fixture(scope="module")
def tokenizer(tokenizer_dir):
    return load_tokenizer(tokenizer_dir)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.json", json.dumps([GOOD, GOOD])),
        ("a.json", "\ufeff" + json.dumps([GOOD, GOOD], ensure_ascii=False)),
        ("a.jsonl", f"{json.dumps(GOOD)}\n\n{json.dumps(GOOD)}\n"),
        ("a.json", json.dumps([{"instruction": "Say é.", "output": "é", "more": 1}, GOOD])),
    ],
)
def test_records_are_read_from_json_and_jsonl(tmp_path, name, text):
    file = tmp_path / name
    file.write_text(text, encoding="utf-8")
    assert read_records(file) == [GOOD, GOOD]


def test_group_and_family_are_kept():
    record = GOOD | {"group": "g", "family": "f"}
    assert check_records([record, GOOD]) == [record, GOOD]


@pytest.mark.parametrize(
    ("name", "text", "named"),
    [
        ("a.json", "[]", ["empty"]),
        ("a.json", "{}", ["a list", "dict"]),
        ("a.json", "[", ["not valid json"]),
        ("a.jsonl", f"{json.dumps(GOOD)}\n{{", ["not valid jsonl"]),
        ("a.json", json.dumps([GOOD, 3]), ["record 1", "int"]),
        ("a.json", json.dumps([GOOD, {"instruction": "x"}]), ["record 1", "'output'"]),
        ("a.json", json.dumps([GOOD, GOOD | {"output": 3}]), ["record 1", "'output'", "3", "int"]),
        ("a.json", json.dumps([GOOD | {"input": None}]), ["record 0", "'input'", "NoneType"]),
        ("a.json", json.dumps([GOOD | {"group": 3}]), ["record 0", "'group'"]),
        ("a.json", json.dumps([GOOD | {"output": " \n"}]), ["record 0", "'output'", "empty"]),
        ("a.json", '[{"instruction": "\\ud800", "output": "x"}]', ["record 0", "'instruction'", "Unicode"]),
    ],
)
def test_an_error_names_the_file_and_the_record(tmp_path, name, text, named):
    file = tmp_path / name
    file.write_text(text)
    with pytest.raises(ValueError, match=r"a\.json") as error:
        read_records(file)
    for word in named:
        assert word in str(error.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nope\.json does not exist"):
        read_records(tmp_path / "nope.json")


def test_a_file_that_is_not_text_is_named(tmp_path):
    (tmp_path / "a.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"a\.json"):
        read_records(tmp_path / "a.json")


def test_duplicates_are_counted_and_kept():
    records = [GOOD, GOOD | {"input": "x"}, GOOD, GOOD]
    assert check_records(records) == records
    assert count_duplicates(records) == 2


def test_the_digest_depends_on_the_records_and_their_order_not_on_their_file(tmp_path):
    records = numbered(3)
    (tmp_path / "a.json").write_text(json.dumps(records, indent=4))
    (tmp_path / "a.jsonl").write_bytes(to_jsonl(records))
    assert records_sha256(read_records(tmp_path / "a.json")) == records_sha256(read_records(tmp_path / "a.jsonl"))
    assert records_sha256(records) != records_sha256(records[::-1])


group_and_family = st.tuples(st.sampled_from(["", *"abcdefgh"]), st.sampled_from(["", "x", "y"]))


@given(st.lists(group_and_family, min_size=4, max_size=80), st.integers(0, 3) | st.none())
def test_a_split_is_a_partition_with_whole_groups_on_one_side(kinds, seed):
    records = [
        {"instruction": str(i), "input": "", "output": "o", "group": group, "family": family}
        for i, (group, family) in enumerate(kinds)
    ]
    parts = split_records(records, seed, 0.2, 0.2)
    assert sorted(r["instruction"] for part in parts for r in part) == sorted(r["instruction"] for r in records)
    sides = Counter(group for part in parts for group in {r["group"] for r in part} - {""})
    assert set(sides.values()) <= {1}
    n = round(0.2 * len(records))
    assert len(parts.val) <= n
    assert len(parts.test) <= n
    assert parts == split_records(records, seed, 0.2, 0.2)


@pytest.mark.parametrize("seed", [0, 1, None])
def test_1100_records_without_groups_are_split_935_55_110(seed):
    assert [len(part) for part in split_records(numbered(1100), seed)] == [935, 55, 110]


def test_without_a_seed_the_order_of_the_file_is_kept_train_then_test_then_validation():
    records = numbered(1100)
    parts = split_records(records, None)
    assert parts.train + parts.test + parts.val == records


def test_another_seed_is_another_split():
    one, other = (split_records(numbered(100), seed).test for seed in (0, 1))
    assert one != other
    assert one != numbered(100)[:10]


def test_families_are_represented_in_proportion_in_each_part():
    records = [r | {"family": family} for family, n in (("a", 100), ("b", 200)) for r in numbered(n)]
    for part in split_records(records, 0, 0.1, 0.2):
        counts = Counter(r["family"] for r in part)
        assert counts["b"] == pytest.approx(2 * counts["a"], abs=2)


@pytest.mark.parametrize("fractions", [(0.5, 0.5), (-0.1, 0.1), (0.1, 1.0), (float("nan"), 0.1)])
def test_impossible_fractions_are_refused(fractions):
    with pytest.raises(ValueError, match="val_fraction"):
        split_records(numbered(10), 0, *fractions)


def test_fractions_that_leave_nothing_to_train_on_are_refused():
    with pytest.raises(ValueError, match="1 records cannot be split"):
        split_records(numbered(1), 0, 0.0, 0.6)


def test_an_example_is_the_prompt_then_the_response_then_end_of_text(tokenizer):
    [example] = encode_records([GOOD | {"input": "x"}], tokenizer, 200)
    prompt = tokenizer.encode_ordinary(format_prompt("Say é.", "x"))
    assert example.prompt_length == len(prompt) < len(example.input_ids)
    assert example.input_ids[: len(prompt)] == prompt
    assert tokenizer.decode(example.input_ids[len(prompt) : -1]) == "é"
    assert example.input_ids[-1] == tokenizer.eot_token


def test_end_of_text_spelled_in_a_record_is_plain_text(tokenizer):
    [example] = encode_records([GOOD | {"instruction": "<|endoftext|>", "output": "<|endoftext|>"}], tokenizer, 200)
    assert example.input_ids.count(tokenizer.eot_token) == 1


def test_a_record_longer_than_the_context_is_named_with_both_lengths(tokenizer):
    records = [GOOD, GOOD | {"output": "é" * 50}]
    n = len(encode_records(records, tokenizer, 1000)[1].input_ids)
    assert len(encode_records(records, tokenizer, n)) == 2
    with pytest.raises(ValueError, match=f"record 1 has {n} tokens but the context holds {n - 1}"):
        encode_records(records, tokenizer, n - 1)


def test_the_1100_records_of_mariovas3_llms_are_read_and_split():
    file = os.environ.get("INSTRUCTION_DATA")
    if file is None:
        pytest.skip("INSTRUCTION_DATA does not name the instruction-data.json of mariovas3/llms")
    records = read_records(Path(file))
    assert [len(part) for part in split_records(records, 0)] == [935, 55, 110]
    assert split_records(records, None).train[0]["instruction"].startswith("Evaluate the following phrase")
