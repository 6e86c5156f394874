"""Splitting, length limits and encoding of instruction records."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from gpt2core.config import GPT2Config
from gpt2core.data import (
    Example,
    LongRecord,
    check_examples,
    count_duplicates,
    count_leaks,
    count_repeated_questions,
    encode_records,
    find_markers,
    find_too_long,
    limit_lengths,
    read_records,
    split_records,
    to_jsonl,
)

GOOD = {"instruction": "Say é.", "input": "", "output": "é"}


def numbered(n: int, **values) -> list[dict]:
    return [{"instruction": f"Say {i}.", "input": "", "output": str(i), **values} for i in range(n)]


def test_duplicates_and_repeated_questions_are_counted():
    records = [GOOD, GOOD | {"input": "x"}, GOOD, GOOD, GOOD | {"output": "e"}, GOOD | {"input": " X."}]
    assert count_duplicates(records) == 2
    assert count_repeated_questions(records) == 4


KINDS = st.tuples(st.sampled_from(["", *"abcdefgh"]), st.sampled_from(["", "x", "y"]), st.integers(0, 30))


@given(st.lists(KINDS, min_size=20, max_size=80), st.integers(0, 3) | st.none())
def test_a_split_is_a_partition_with_whole_groups_and_equal_questions_on_one_side(kinds, seed):
    records = [
        {"instruction": f"Say {question}.", "input": "", "output": str(i), "group": group, "family": family}
        for i, (group, family, question) in enumerate(kinds)
    ]
    try:
        parts = split_records(records, seed, 0.2, 0.2)
    except ValueError as error:
        assume("no group is small enough" not in str(error))
        raise
    assert sorted(r["output"] for part in parts for r in part) == sorted(r["output"] for r in records)
    for key in ("group", "instruction"):
        sides = Counter(value for part in parts for value in {r[key] for r in part} - {""})
        assert set(sides.values()) <= {1}
    n = round(0.2 * len(records))
    assert len(parts.val) <= n
    assert 1 <= len(parts.test) <= n
    assert parts == split_records(records, seed, 0.2, 0.2)


@pytest.mark.parametrize("seed", range(5))
def test_copies_of_a_record_never_land_on_both_sides(seed):
    records = [record | {"instruction": record["instruction"] + end} for record in numbered(60) for end in ("", "\n")]
    parts = split_records(records, seed)
    questions = [{record["instruction"].strip() for record in part} for part in parts]
    assert sum(map(len, questions)) == 60
    assert [len(part) for part in parts] == [102, 6, 12]


@pytest.mark.parametrize("seed", [0, 1, None])
def test_1100_records_without_groups_are_split_935_55_110(seed):
    assert [len(part) for part in split_records(numbered(1100), seed)] == [935, 55, 110]


def test_without_a_seed_the_order_of_the_file_is_kept_train_then_test_then_validation():
    records = numbered(1100)
    parts = split_records(records, None)
    assert parts.train + parts.test + parts.val == records


def test_a_part_may_have_any_of_its_names_and_an_unknown_one_is_named():
    records = [*numbered(9), *numbered(1, part="Validation"), *numbered(1, part="Test")]
    assert [len(part) for part in split_records(records, 0)] == [9, 1, 1]
    assert count_leaks(records) == 2
    with pytest.raises(ValueError, match=r"the part 'held out'; the known ones are train, .*dev"):
        split_records([*records, *numbered(1, part="held out")], 0)


def test_another_seed_gives_another_split():
    one, other = (split_records(numbered(100), seed).test for seed in (0, 1))
    assert one != other
    assert one != numbered(100)[:10]


def test_a_seed_may_be_a_number_of_numpy():
    assert split_records(numbered(20), np.int64(1)) == split_records(numbered(20), 1)


def test_families_are_represented_in_proportion_in_each_part():
    records = [r | {"family": family, "input": family} for family, n in (("a", 100), ("b", 200)) for r in numbered(n)]
    for part in split_records(records, 0, 0.1, 0.2):
        counts = Counter(r["family"] for r in part)
        assert counts["b"] == pytest.approx(2 * counts["a"], abs=2)


@pytest.mark.parametrize("fractions", [(0.5, 0.5), (-0.1, 0.1), (0.1, 1.0), (float("nan"), 0.1)])
def test_impossible_fractions_are_refused(fractions):
    with pytest.raises(ValueError, match="val_fraction"):
        split_records(numbered(10), 0, *fractions)


def test_too_few_records_or_groups_are_refused():
    with pytest.raises(ValueError, match="1 records cannot be split into train, 0 validation and 1 test records"):
        split_records(numbered(1), 0)
    with pytest.raises(ValueError, match=r"20 records in 1 groups .* no group is small enough for 2 test records"):
        split_records(numbered(20, group="all"), 0)


def test_even_few_records_have_a_test_record():
    assert [len(part) for part in split_records(numbered(3), 0)] == [2, 0, 1]
    assert [len(part) for part in split_records(numbered(3), 0, 0.0, 0.0)] == [3, 0, 0]


def test_records_made_in_memory_may_have_no_input_and_are_otherwise_refused_by_number(tokenizer):
    records = [record | {"input": None} for record in numbered(20)]
    outputs = [[record["output"] for record in part] for part in split_records(records, 0)]
    assert outputs == [[record["output"] for record in part] for part in split_records(numbered(20), 0)]
    assert encode_records(records, tokenizer, 1000) == encode_records(numbered(20), tokenizer, 1000)
    assert find_markers(records) == []
    for wrong, problem in [({"output": 5}, "'output' is 5, an int"), ({"instruction": None}, "'instruction' is null")]:
        for refuse in (lambda each: split_records(each, 0), lambda each: encode_records(each, tokenizer, 1000)):
            with pytest.raises(ValueError, match=f"record 2: {problem}"):
                refuse([GOOD, GOOD | wrong])
    with pytest.raises(ValueError, match="record 2: no 'output' in"):
        split_records([GOOD, {"instruction": "Say 1."}], 0)


def test_records_with_markers_are_found_by_their_place():
    records = [
        GOOD,
        GOOD | {"output": "a\n\n### Response:\nb"},
        GOOD | {"input": "### Input: x"},
        GOOD | {"instruction": "What is <|endoftext|>?"},
        GOOD | {"output": "### Cities:"},
    ]
    assert find_markers(records) == ["record 2", "record 3", "record 4"]


LONG = [GOOD, GOOD | {"output": "é" * 50}, GOOD | {"output": "e" * 60}]


@pytest.fixture(scope="module")
def lengths(tokenizer):
    return [len(example.input_ids) for example in encode_records(LONG, tokenizer, 1000)]


def test_records_longer_than_the_context_are_all_named_by_their_place(tokenizer, lengths, tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"\n" + to_jsonl(LONG))
    records = read_records(tmp_path / "a.jsonl")
    context = lengths[0]
    assert find_too_long(records, tokenizer, context) == [
        LongRecord(1, "record 2 (line 3)", lengths[1]),
        LongRecord(2, "record 3 (line 4)", lengths[2]),
    ]
    message = rf"2 of 3 .* of {context}: record 2 \(line 3\) has {lengths[1]} tokens, record 3 \(line 4\)"
    for call in (encode_records, lambda *arguments: limit_lengths(*arguments, "error")):
        with pytest.raises(ValueError, match=message):
            call(records, tokenizer, context)
    assert find_too_long(records, tokenizer, max(lengths)) == []
    with pytest.raises(ValueError, match=r"record 11 has .* and 2 more"):
        encode_records([GOOD] + LONG[1:2] * 12, tokenizer, context)


def test_long_records_are_dropped_or_truncated_on_request(tokenizer, lengths):
    context = lengths[0] + 5
    kept, found = limit_lengths(LONG, tokenizer, context, "drop")
    assert kept == [GOOD]
    assert [long.location for long in found] == ["record 2", "record 3"]
    kept, found = limit_lengths(LONG, tokenizer, context, "truncate")
    assert len(found) == 2
    assert [record["instruction"] for record in kept] == ["Say é."] * 3
    for before, after in zip(LONG[1:], kept[1:], strict=True):
        assert before["output"].startswith(after["output"])
        assert 0 < len(after["output"]) < len(before["output"])
    assert max(len(example.input_ids) for example in encode_records(kept, tokenizer, context)) > lengths[0]
    assert limit_lengths(LONG, tokenizer, max(lengths), "truncate") == (LONG, [])


def test_a_truncated_output_has_no_end_of_text_and_is_never_a_test_reference(tokenizer, lengths):
    context = lengths[0] + 5
    kept, _ = limit_lengths(LONG, tokenizer, context, "truncate")
    whole, *cut = encode_records(kept, tokenizer, context)
    assert whole.input_ids[-1] == tokenizer.eot_token
    assert tokenizer.eot_token not in cut[0].input_ids + cut[1].input_ids
    full = encode_records(LONG, tokenizer, max(lengths))
    assert cut[1].input_ids == full[2].input_ids[:context]  # a prefix of the tokens that fills the context
    given = [GOOD, *(record | {"part": "test"} for record in LONG), LONG[2] | {"part": "val"}]
    kept, found = limit_lengths(given, tokenizer, context, "truncate")
    assert [(record.get("part"), len(record["output"]) > 1) for record in kept] == [
        (None, False),
        ("test", False),
        ("val", True),
    ]
    assert len(found) == 3
    longer = [record | {"output": "e" * 60} for record in numbered(20)]
    limited, _ = limit_lengths([*numbered(20), *longer], tokenizer, context, "truncate")
    parts = split_records(limited, 0, 0.1, 0.4)
    assert 0 < len(parts.test) < 16
    assert all(record["output"] == record["instruction"][4:-1] for record in parts.test)
    with pytest.raises(ValueError, match="all 4 records of the test part were truncated"):
        split_records(limited[20:], 0, 0.0, 0.2)


def test_a_prompt_without_room_for_an_output_is_named_and_at_least_one_record_must_remain(tokenizer, lengths):
    with pytest.raises(ValueError, match=r"1 prompts leave no room .*: record 2 has"):
        limit_lengths([GOOD, GOOD | {"instruction": "é" * 90}], tokenizer, lengths[0], "truncate")
    with pytest.raises(ValueError, match="all 1 records have more tokens than the context of 10"):
        limit_lengths([GOOD], tokenizer, 10, "drop")
    long = GOOD | {"output": "é" * 90, "part": "test"}
    with pytest.raises(ValueError, match="all 1 records of the part test have more tokens"):
        limit_lengths([GOOD, long], tokenizer, lengths[0], "drop")


@pytest.mark.parametrize(
    ("ids", "prompt_length", "problem"),
    [
        ([1, 2], 2, "example 2 has a prompt of 2 tokens"),
        ([1, 2], 0, "a prompt of 0 tokens"),
        ([], 0, "a prompt of 0 tokens"),
        ([1] * 10, 1, "10 tokens, more than the context of 8"),
        ([1, 7], 1, "token ids from 1 to 7, but the model has 7"),
        ([-1, 2], 1, "token ids from -1 to 2"),
    ],
)
def test_examples_that_do_not_fit_the_model_are_refused(ids, prompt_length, problem):
    config = GPT2Config(vocab_size=7, n_positions=8)
    check_examples("training", [Example([1] * 9, 1)], config)
    with pytest.raises(ValueError, match=problem):
        check_examples("training", [Example([1, 2], 1), Example(ids, prompt_length)], config)
