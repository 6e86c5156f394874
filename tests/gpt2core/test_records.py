"""Files of records: every layout people bring, and errors that point at the location in the file."""

import csv
import json
import logging
import os
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gpt2core.data import (
    check_records,
    count_leaks,
    location_of,
    read_records,
    records_sha256,
    split_records,
    to_jsonl,
)

GOOD = {"instruction": "Say é.", "input": "", "output": "é"}
LINE = json.dumps(GOOD)
SAY = [{"role": "user", "content": "Say é."}, {"role": "assistant", "content": "é"}]


@pytest.fixture
def write(tmp_path):
    """A function (name, text or bytes) -> the file."""

    def make(name, content):
        file = tmp_path / name
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
        return file

    return make


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.json", json.dumps([GOOD, GOOD])),
        ("a.json", json.dumps([GOOD, GOOD], indent=4, ensure_ascii=False)),
        ("a.JSON", json.dumps([{"instruction": "Say é.", "output": "é", "more": [1]}, GOOD])),
        ("a.jsonl", f"{LINE}\n\n{LINE}\n"),
        ("a.JSONL", f"{LINE}\r\n{LINE}"),
        ("a.ndjson", f" {LINE} \n\t{LINE}\n\n"),
        ("a.json", f"{LINE}\n{LINE}\n"),  # lines in a .json
        ("a.json", f"[{LINE}]\n[{LINE}]\n"),  # two lists concatenated
        ("a.jsonl", json.dumps([GOOD, GOOD], indent=2)),  # a list in a .jsonl
        ("a.jsonl", f"{LINE}{LINE}"),  # the first file had no newline at its end
        ("a.json", f"\ufeff[{LINE}]\ufeff[{LINE}]"),  # files with byte order marks, concatenated
        ("a.jsonl", f"\ufeff{LINE}\n\ufeff{LINE}\n\ufeff"),
        ("a.json", json.dumps([GOOD | {"input": None, "group": None}, GOOD])),
    ],
)
def test_records_are_read_from_every_layout(write, name, text):
    records = read_records(write(name, text))
    assert records == [GOOD, GOOD]
    assert all(type(json.loads(json.dumps(record))) is dict for record in records)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.jsonl", json.dumps({"prompt": "Say é.", "completion": "é"})),
        (
            "a.jsonl",
            '{"conversations": [{"from": "human", "value": "Say é."}, {"from": "gpt", "value": "é"}]}',
        ),
        ("a.csv", "\ufeffoutput,instruction\r\né,Say é.\r\n"),
        ("a.CSV", "instruction;input;output\nSay é.;;é\n\n"),
        ("a.tsv", "instruction\toutput\nSay é.\té\n"),
        ("a.json", f'{{"data": [{LINE}]}}'),
        ("a.csv", "instruction;output\rSay é.;é\r"),
        ("a.jsonl", json.dumps({"prompt": "Say é.", "prompt_id": "1", "messages": SAY})),  # ultrachat, no_robots
        ("a.jsonl", json.dumps({"instruction": None, "output": None, "messages": SAY})),  # rows of several formats
        ("a.jsonl", json.dumps({"prompt": SAY[:1], "completion": SAY[1:]})),  # TRL
        ("a.jsonl", json.dumps({"messages": [SAY[0], SAY[1] | {"role": "chatgpt"}]})),
        # a Sequence of a struct, as older versions of datasets store it
        ("a.json", json.dumps([{"messages": {key: [turn[key] for turn in SAY] for key in ("role", "content")}}])),
        ("a.jsonl", json.dumps({"conversations": {"from": ["human", "gpt"], "value": ["Say é.", "é"]}})),
    ],
)
def test_records_of_every_shape_are_read_and_the_shape_is_logged(write, caplog, name, text):
    caplog.set_level(logging.INFO)
    assert read_records(write(name, text)) == [GOOD]
    assert "1 records, read 1 as" in caplog.text


def test_columns_map_other_names(write):
    file = write("a.csv", "output,question,answer\nnot this,Say é.,é\n")
    columns = {"instruction": "question", "output": "answer"}
    assert read_records(file, columns=columns) == [GOOD]
    assert read_records(write("b.jsonl", LINE), columns=columns) == [GOOD]  # none of the names occurs
    with pytest.raises(ValueError, match=r"record 1 \(line 2\): no 'reply', which data.columns gives as 'output'"):
        read_records(file, columns=columns | {"output": "reply"})


def test_a_conversation_becomes_one_record_for_each_answer_with_the_earlier_turns_as_input(write):
    roles = ("system", "user", "assistant", "user", "assistant", "user")
    texts = ("Be brief.", "Hi.", "Hello.", [{"type": "text", "text": "And you?"}], "Fine.", "Bye.")
    messages = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=True)]
    file = write("a.jsonl", json.dumps({"messages": messages}))
    records = read_records(file)
    group = records[0]["group"]
    assert records == [
        {"instruction": "Hi.", "input": "", "output": "Hello.", "group": group},
        {"instruction": "And you?", "input": "User: Hi.\nAssistant: Hello.", "output": "Fine.", "group": group},
    ]
    other = read_records(write("b.jsonl", json.dumps({"messages": messages[1:3] * 2})))
    assert group != other[0]["group"] == other[1]["group"]  # conversation 1 of another file
    assert location_of(records, 1) == "record 1 (line 1), answer 2"
    [question] = read_records(file, ("instruction",))
    assert (question["instruction"], question["output"]) == ("Bye.", "")


@pytest.mark.parametrize("layout", ["weight", "train", "prompt"])
def test_an_answer_of_weight_0_and_those_of_a_prompt_are_context_only(write, layout):
    bad = [{"role": "user", "content": "Say e."}, {"role": "assistant", "content": "E"}]
    value = {"prompt": bad + SAY[:1], "completion": SAY[1:]}
    if layout != "prompt":
        no, yes = {"weight": (0, 1), "train": (False, True)}[layout]
        value = {"messages": [bad[0] | {layout: no}, bad[1] | {layout: no}, SAY[0], SAY[1] | {layout: yes}]}
    expected = GOOD | {"input": "User: Say e.\nAssistant: E"}
    assert read_records(write("a.jsonl", json.dumps(value))) == [expected]
    [question] = read_records(write("a.jsonl", json.dumps({"prompt": bad + SAY[:1]})), ("instruction",))
    assert question == expected | {"output": ""}


def test_labels_may_be_integers(write):
    rows = [GOOD | {"group": 7, "family": 0}, {"messages": SAY, "group": 7}]
    records = read_records(write("a.jsonl", "\n".join(map(json.dumps, rows))))
    assert records == [GOOD | {"group": "7", "family": "0"}, GOOD | {"group": "7"}]


def test_keys_that_no_record_gets_are_named_in_a_warning(write, caplog):
    caplog.set_level(logging.WARNING)
    rows = [GOOD | {"Input": "lost", "history": [["a", "b"]], "id": None}, GOOD | {"Input": "lost"}]
    assert read_records(write("a.json", json.dumps(rows))) == [GOOD, GOOD]
    assert 'a.json: keys that are not used: "Input" in 2, "history" in 1 (data.columns maps names)' in caplog.text
    caplog.clear()
    columns = {"input": "Input"}
    assert read_records(write("a.json", json.dumps(rows[1:])), columns=columns) == [GOOD | {"input": "lost"}]
    assert read_records(write("a.jsonl", json.dumps({"messages": SAY, "group": "g"}))) == [GOOD | {"group": "g"}]
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_keys_of_turns_that_no_record_gets_are_named_too(write, caplog):
    caplog.set_level(logging.WARNING)
    call = {"role": "assistant", "content": "é", "tool_calls": [{"id": "1"}], "name": None, "weight": 1}
    turns = [SAY[0] | {"train": True, "weight": 0}, call]
    turns = [{"role": "system", "content": "Be brief.", "name": "x"}, *turns]
    cell = json.dumps(turns).replace('"', '""')
    unused = '"messages[].name" in 1, "messages[].train" in 1, "messages[].tool_calls" in 1 (data.columns'
    for name, text in (("a.jsonl", json.dumps({"messages": turns * 2})), ("a.csv", f'messages\n"{cell}"\n')):
        caplog.clear()
        read_records(write(name, text))
        assert f"{name}: keys that are not used: {unused}" in caplog.text
    caplog.clear()
    read_records(write("a.jsonl", json.dumps({"prompt": SAY[:1], "completion": [call]})))
    assert '"completion[].tool_calls" in 1 (' in caplog.text
    caplog.clear()
    read_records(write("a.jsonl", json.dumps({"prompt": '[{"a": 1}]', "completion": "x"})))
    read_records(write("a.jsonl", json.dumps({"messages": [SAY[0] | {"train": False}, SAY[1] | {"train": True}]})))
    assert not caplog.records


def test_an_answer_before_the_first_question_of_sharegpt_is_skipped_and_counted(write, caplog):
    caplog.set_level(logging.WARNING)
    turns = [{"from": "human", "value": "Say é."}, {"from": "gpt", "value": "é"}]
    system, greeting = {"from": "system", "value": "Be brief."}, {"from": "gpt", "value": "Hello!"}
    rows = [{"conversations": conversation} for conversation in (turns, [greeting, *turns], [system, greeting, *turns])]
    assert read_records(write("a.jsonl", "\n".join(map(json.dumps, rows)))) == [GOOD] * 3
    dropped, record = caplog.records
    assert dropped.getMessage().endswith("a.jsonl: 1 of 3 conversations have system messages, which are dropped")
    assert record.getMessage().endswith(
        "a.jsonl: 2 of 3 conversations begin with an answer instead of a question; this answer is skipped"
    )
    with pytest.raises(ValueError, match="comes after no turn"):  # OpenAI's format has no such habit
        read_records(write("a.jsonl", json.dumps({"messages": [SAY[1], *SAY]})))


@pytest.mark.parametrize("key", ["messages", "conversations", "prompt"])
def test_conversations_with_system_messages_are_counted(write, caplog, key):
    caplog.set_level(logging.WARNING)
    rows = [[{"role": role, "content": "Be a pirate."}, *SAY] for role in ("system", "developer")] + [SAY, SAY]
    values = [{"prompt": turns[:-1], "completion": turns[-1:]} if key == "prompt" else {key: turns} for turns in rows]
    lines = [*map(json.dumps, values), LINE]
    assert read_records(write("a.jsonl", "\n".join(lines))) == [GOOD] * 5
    [record] = caplog.records
    assert record.getMessage().endswith("a.jsonl: 2 of 4 conversations have system messages, which are dropped")


def test_the_parts_of_a_file_are_the_parts_of_the_split(write):
    rows = [GOOD | {"output": str(i)} for i in range(6)]
    text = json.dumps({"train": rows[:3], "validation": rows[3:4], "test": rows[4:]}, indent=1)
    records = read_records(write("a.json", text))
    assert [record["part"] for record in records] == ["train"] * 3 + ["val"] + ["test"] * 2
    assert location_of(records, 5) == "test record 2 (line 32)"
    assert [len(part) for part in split_records(records, 0)] == [3, 1, 2]
    assert split_records(records, 0).test == rows[4:]
    assert count_leaks(records) == 3
    assert count_leaks(records, "val") == 2
    without_val = [record for record in records if record["part"] != "val"]
    assert [len(part) for part in split_records(without_val, 0)] == [3, 0, 2]  # one question cannot be split


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=10)
FILLED = TEXT.filter(str.strip)
RECORDS = st.lists(
    st.fixed_dictionaries({"instruction": FILLED, "input": TEXT, "output": FILLED}, optional={"group": TEXT}),
    min_size=1,
    max_size=4,
)


@given(RECORDS, st.sampled_from(["lines", "lines.json", "list"]))
@example([{"instruction": "a\u2028b\u2029c\x85d\x0c", "input": "\x1c\x1e\ufeff", "output": "o\r\n\x0b"}], "lines")
def test_written_records_are_read_back_whatever_characters_they_have(tmp_path_factory, records, layout):
    file = tmp_path_factory.mktemp("records") / {"lines": "a.jsonl", "lines.json": "b.json", "list": "c.json"}[layout]
    content = json.dumps(records, ensure_ascii=False).encode() if layout == "list" else to_jsonl(records)
    file.write_bytes(content)
    assert read_records(file) == records
    assert records_sha256(read_records(file)) == records_sha256(check_records(records))


def test_records_know_their_place_in_the_file(write):
    records = read_records(write("a.jsonl", f"{LINE}\n\n\n{LINE}\n"))
    assert [location_of(records, i) for i in range(2)] == ["record 1 (line 1)", "record 2 (line 4)"]
    records = read_records(write("a.json", json.dumps([GOOD, GOOD], indent=1)))
    assert [location_of(records, i) for i in range(2)] == ["record 1 (line 2)", "record 2 (line 7)"]
    assert location_of([GOOD, GOOD], 1) == "record 2"


BROKEN = '{"instruction": "Quote the "sign".", "output": "x"}'
LIST = f"[\n  {LINE},\n  %s\n]"


@pytest.mark.parametrize(
    ("name", "text", "named"),
    [
        ("a.jsonl", f"{LINE}\n\n{BROKEN}\n{LINE}", ["line 3, column 29 (record 2)", "Quote the \"'", "sign"]),
        ("a.jsonl", f'{LINE}\n{{"instruction": "x",\n{LINE}', ["line 2, column 21 (record 2)"]),  # truncated line
        ("a.jsonl", f'{LINE}\n{{"instruction": "x\n{LINE}', ["line 2", "record 2", "Unterminated string"]),
        ("a.jsonl", json.dumps(GOOD, indent=1), ["line 1, column 2", "records of several lines: rename it to .json"]),
        ("a.json", '{"instruction": {"0": "a"}, "output": {"0": "b"}}', ["are columns", "orient='records'"]),
        ("a.json", '{"instruction": ["a"], "output": ["b"]}', ["are columns", "one record per row"]),
        ("a.json", '{"instruction": {"text": "a"}, "output": {"text": "b"}}', ["'instruction' is {", "a dict"]),
        (
            "a.csv",
            "messages\n\"[{'role': 'user', 'content': 'x'}]\"\n",
            ["'messages' is text that is not JSON", "a list that pandas wrote to CSV is not; write JSON lines instead"],
        ),
        (
            "a.json",
            f'{{"version": "1.0", "data": [{LINE}]}}',
            ["the records are in its list 'data'", "this list alone"],
        ),
        (
            "a.jsonl",
            f"{LINE}\n{json.dumps(GOOD | {'output': 3})}",
            ["'output' is 3, an int; it must be a string", "data.invalid=drop leaves such records out"],
        ),
        (
            "a.jsonl",
            json.dumps({"messages": [SAY[0], {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}]}),
            ["messages[1]: the assistant calls a tool ('tool_calls'), which records cannot contain"],
        ),
        ("a.json", LIST % BROKEN, ["line 3, column 31 (record 2)", "sign"]),
        ("a.json", LIST % f"{LINE},", ["line 3, column 66 (record 2)", "trailing comma"]),
        ("a.json", LIST % '{"instruction": "x", "output": "y",}', ["line 3, column 37", "trailing comma"]),
        (
            "a.json",
            LIST % '{"instruction": "NaN", "output": NaN}',
            ["line 3, column 36 (record 2)", "NaN is not"],
        ),
        ("a.jsonl", '{"instruction": "x", "output": "y", "n": -Infinity}', ["line 1, column 42", "-Infinity"]),
        (
            "a.json",
            LIST % '{"output": "a", "instruction": "output", "output": "b"}',
            ["line 3, column 44 (record 2)", "'output' occurs twice"],
        ),
        ("a.jsonl", f"{LINE},\n{LINE},\n", ["line 1, column 64 (record 1)", "comma between records outside of a list"]),
        ("a.jsonl", '{"ä": "a", "ä": "b"}', ["line 1, column 12", "'ä' occurs twice"]),
        ("a.json", f"[{LINE}", ["line 1", "',' or ']'"]),
        ("a.json", f"[{LINE}] x", ["line 1", "Expecting value"]),
        ("a.json", "[" * 100_000, ["nested too deeply"]),
        ("a.json", f'[{{"n": {"9" * 5000}}}]', ["record 1", "Exceeds the limit"]),
        ("a.json", "", ["list of records is empty"]),
        ("a.jsonl", "\n\n", ["list of records is empty"]),
        ("a.json", "[]", ["list of records is empty"]),
        ("a.json", json.dumps([GOOD, 3]), ["record 2 (line 1)", "int"]),
        ("a.json", json.dumps([GOOD, {"instruction": "x"}]), ["record 2 (line 1)", "no 'output'"]),
        ("a.json", json.dumps([GOOD, GOOD | {"output": 3}]), ["record 2", "'output'", "3", "int"]),
        ("a.json", json.dumps([GOOD | {"output": None}]), ["record 1", "'output' is null"]),
        ("a.json", json.dumps([GOOD | {"group": 3.5}]), ["record 1", "'group'"]),
        ("a.json", json.dumps([GOOD | {"family": True}]), ["record 1", "'family' is true, a bool"]),
        ("a.jsonl", f"{LINE}\n\n{json.dumps(GOOD | {'output': ' '})}", ["record 2 (line 3)", "'output' is empty"]),
        ("a.json", '[{"instruction": "\\ud800", "output": "x"}]', ["record 1", "'instruction'", "Unicode"]),
        ("a.json", json.dumps([GOOD], ensure_ascii=False).encode("utf-16"), ["UTF-16", "byte order mark", "UTF-8"]),
        ("a.json", json.dumps([GOOD]).encode("utf-16-le"), ["UTF-16"]),
        ("a.json", json.dumps([GOOD]).encode("utf-32"), ["UTF-32"]),
        ("a.jsonl", f"{LINE}\n" + LINE.replace("\\u00e9", "é"), []),
        ("a.csv", "instruction,output\nСтолица?,Париж\n".encode("cp1251"), ["byte 0xd1", "find out", "CP1251"]),
        ("a.csv", b"q,a\n\xe9,x\n" + "é,x\n".encode(), ["line 2, column 1", "mixes encodings; correct this line"]),
        ("a.csv", "instruction,output\né,é".encode()[:-1], ["line 2, column 3", "cut off"]),
        ("a.csv", "instruction,output\n", ["list of records is empty"]),
        ("a.txt", LINE, [".txt", ".json or .jsonl, .csv"]),
        ("a.csv", 'instruction,output\n"a\nb",c\n\nd\n', ["line 5 (record 2)", "1 cells", "2 columns"]),
        ("a.csv", 'instruction,output\na,"b', ["line 2 (record 1)", "unexpected end of data"]),
        ("a.csv", "a,a\n1,2\n", ["line 1", "'a' occurs twice"]),
        ("a.csv", "instruction,output\na, \n", ["record 1 (line 2)", "'output' is empty"]),
        ("a.csv", "prompt,response\na,b\n", ["no 'completion' in", '"response": "b"', "data.columns maps other names"]),
        ("a.csv", "instruction,response\na,b\n", ["no 'output' in", "data.columns maps other names"]),
        ("a.csv", "q,a\n1,2\n", ["record 1 (line 2)", "no 'instruction'", "data.columns maps other names"]),
        ("a.json", f'{{"a": [{LINE}], "b": []}}', ["line 1, column 1", "'a', 'b'", "train"]),
        ("a.json", f'{{"train": [{LINE},\n{{}}]}}', ["train record 2 (line 2)", "no 'instruction'"]),
        ("a.jsonl", '{"messages": []}', ["record 1 (line 1)", "'messages' is []", "list of turns"]),
        ("a.jsonl", '{"messages": [{"role": "tool", "content": "x"}]}', ["messages[0]: the role is", "tool"]),
        ("a.jsonl", '{"conversations": [{"from": "gpt", "value": "x"}]}', ["no answer", "to learn"]),
        ("a.jsonl", json.dumps({"conversations": [{"from": "gpt", "value": "x"}] * 2}), ["comes after no turn"]),
        ("a.jsonl", '{"messages": [{"role": ["user"], "content": "x"}]}', ['messages[0]: the role is ["user"]']),
        ("a.csv", f'messages\n"{"[" * 100_000}"\n', ["'messages' is text that is not JSON"]),
        ("a.jsonl", '{"messages": [{"role": "user", "content": "x"}]}', ["no answer of the assistant"]),
        ("a.jsonl", '{"prompt": "x"}', ["no 'completion'"]),
        (
            "a.jsonl",
            json.dumps({"chosen": SAY, "rejected": SAY}),
            ["record 1", "'chosen' is a conv", "{messages: chosen}"],
        ),
        ("a.jsonl", json.dumps({"conversation": SAY}), ["record 1", "set data.columns to {messages: conversation}"]),
        ("a.jsonl", '{"prompt": [{"role": "user", "content": "x"}], "completion": "y"}', ["'completion' is \"y\""]),
        ("a.jsonl", json.dumps({"messages": [SAY[0], SAY[1] | {"weight": 0}]}), ["no answer", "to learn"]),
        ("a.jsonl", json.dumps({"messages": [SAY[0], SAY[1] | {"weight": 0.5}]}), ["messages[1]: 'weight' is 0.5"]),
        ("a.jsonl", json.dumps({"messages": [SAY[0], SAY[1] | {"train": "no"}]}), ["messages[1]: 'train' is \"no\""]),
        ("a.json", b"\x1f\x8b\x08\0\0", ["compressed by gzip"]),
        ("a.json", b"\xfd7zXZ\0", ["compressed by xz"]),
        ("a.json", b"\x28\xb5\x2f\xfd", ["compressed by zstd"]),
        ("a.json", b"BZh91AY", ["compressed by bzip2"]),
        ("a.jsonl.gz", b"\x1f\x8b\x08\0\0", ["a.jsonl.gz is compressed by gzip; decompress it"]),
        ("a.zip", b"PK\x03\x04", ["a.zip is a zip archive or a workbook; unpack it, or save its sheet as CSV"]),
        ("a.xlsx", b"PK\x03\x04", ["save its sheet as CSV"]),
        ("a.json", "<!doctype html><html>", ["is a web page, not the data"]),
        ("a.csv", "version https://git-lfs.github.com/spec/v1\noid sha256:0\n", ["Git LFS", "git lfs pull"]),
    ],
)
def test_an_error_names_the_file_and_the_place(write, name, text, named):
    if not named:  # the same text in Latin-1
        text, named = (
            text.encode("latin-1"),
            ["line 2, column 22", "byte 0xe9", "iconv -f WINDOWS-1252", "CP1251", "Say "],
        )
    with pytest.raises(ValueError, match=name.replace(".", r"\.")) as error:
        read_records(write(name, text))
    for part in named:
        assert part in str(error.value)
    assert len(str(error.value)) < 700


def test_several_faulty_records_are_named_together(write):
    lines = "\n".join(json.dumps(GOOD | {"output": "" if i % 2 else "x"}) for i in range(20))
    with pytest.raises(ValueError, match=r"record 2 \(line 2\): .*; record 4 .*; record 10 .*; and 5 more records"):
        read_records(write("a.jsonl", lines))


INVALID = {
    '{"messages": []}': "'messages' is []",
    json.dumps({"messages": [SAY[0], {"role": "tool", "content": "x"}]}): 'messages[1]: the role is "tool"',
    json.dumps({"messages": [*SAY, SAY[1]]}): "an assistant turn comes after another assistant turn",
    json.dumps(GOOD | {"output": " "}): "'output' is empty",
    "3": "an int, not an object",
    json.dumps({"messages": {"role": ["user", "assistant"], "content": ["x"]}}): "it must be a list of turns",
}


def test_faulty_records_are_dropped_on_request(write, caplog):
    caplog.set_level(logging.WARNING)
    problems = []
    lines = "".join(f"{line}\n{LINE}\n" for line in INVALID)
    records = read_records(write("a.jsonl", lines), on_invalid=problems.append)
    assert records == [GOOD] * 6
    assert location_of(records, 5) == "record 12 (line 12)"
    for i, (problem, reason) in enumerate(zip(problems, INVALID.values(), strict=True)):
        assert problem.startswith(f"record {2 * i + 1} (line {2 * i + 1}): ")
        assert reason in problem
    [warning] = [each.getMessage() for each in caplog.records if "dropped" in each.getMessage()]
    assert "a.jsonl: 6 of 12 records are invalid and were dropped: record 1 (line 1): 'messages' is []; " in warning
    assert warning.endswith("; and 1 more records")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("".join(f"{line}\n" for line in INVALID), r"record 1 \(line 1\): 'messages' is \[\]; .*and 1 more records"),
        (f"{LINE}\nno JSON\n", "line 2, column 1"),
        ('{"question": "x", "reply": "y"}\n' * 3, "data.columns maps other names"),
    ],
)
def test_a_file_without_a_valid_record_or_that_is_not_json_is_refused_in_any_case(write, text, message):
    with pytest.raises(ValueError, match=message):
        read_records(write("a.jsonl", text), on_invalid=lambda problem: None)


def test_a_missing_file_and_a_directory_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nope\.json does not exist"):
        read_records(tmp_path / "nope.json")
    with pytest.raises(FileNotFoundError, match="is a directory"):
        read_records(tmp_path)
    with pytest.raises(FileNotFoundError, match="is a pipe or a device"):
        read_records("/dev/null")


def test_the_way_out_of_faulty_records_is_only_named_where_it_exists(write):
    faulty = json.dumps(GOOD | {"output": ""})
    for text, required in ((faulty, ("instruction", "output")), (f"{LINE}\n3", ("instruction",))):
        with pytest.raises(ValueError, match="record") as error:  # all records are faulty; questions of `run.py ask`
            read_records(write("a.jsonl", text), required)
        assert "data.invalid" not in str(error.value)


def test_roles_may_have_capital_letters(write):
    turns = [{"from": "Human", "value": "Say hi."}, {"from": "GPT", "value": "Hi."}]
    [record] = read_records(write("a.json", json.dumps([{"conversations": turns}])))
    assert (record["instruction"], record["output"]) == ("Say hi.", "Hi.")


def test_records_in_memory_are_checked_alike():
    record = GOOD | {"group": "g", "family": "f"}
    assert check_records([record, GOOD]) == [record, GOOD]
    assert check_records([{"instruction": "x"}], "the question", ("instruction",)) == [
        {"instruction": "x", "input": "", "output": ""}
    ]
    with pytest.raises(ValueError, match="the question: record 1: no 'instruction'"):
        check_records([{}], "the question", ("instruction",))
    with pytest.raises(ValueError, match="records: expected a list of records, not a dict"):
        check_records({})
    with pytest.raises(ValueError, match="the list of records is empty"):
        check_records([])


def test_the_digest_depends_on_the_records_and_their_order_not_on_their_file(write):
    records = [GOOD | {"output": str(i)} for i in range(3)]
    list_file, lines_file = write("a.json", json.dumps(records, indent=4)), write("a.jsonl", to_jsonl(records))
    assert (
        records_sha256(read_records(list_file)) == records_sha256(read_records(lines_file)) == records_sha256(records)
    )
    assert records_sha256(records) != records_sha256(records[::-1])


def test_a_large_file_is_read_in_linear_time(write):
    records = read_records(write("a.jsonl", f"{LINE}\n" * 20_000))
    assert location_of(records, 19_999) == "record 20000 (line 20000)"


def test_the_1100_records_of_mariovas3_llms_are_read():
    file = os.environ.get("INSTRUCTION_DATA")
    if file is None:
        pytest.skip("INSTRUCTION_DATA does not name the instruction-data.json of mariovas3/llms")
    records = read_records(Path(file))
    assert len(records) == 1100
    assert records[0]["instruction"].startswith("Evaluate the following phrase")


@pytest.mark.parametrize(
    ("header", "column"),
    [
        ('"instruction, full";output', "instruction, full"),
        ('"a, b, c";output', "a, b, c"),
        ('"a; b; c",output', "a; b; c"),
        ('"two\nlines, here";output', "two\nlines, here"),
        (' \n"a, b";output', "a, b"),
    ],
)
def test_separators_within_quotes_of_the_header_do_not_count(write, header, column):
    separator = header.removesuffix("output")[-1]
    file = write("a.csv", f"{header}\nSay é.{separator}é\n")
    assert read_records(file, columns={"instruction": column}) == [GOOD]


@pytest.mark.parametrize(
    ("text", "instruction", "output"),
    [
        ('instruction, output\n"a, x", " b"\n', "a, x", " b"),
        ('instruction; output\n  "a ""y""";  b\n', 'a "y"', "b"),
        ('"instruction", "output"\na, b\n', "a", "b"),
        ('instruction, output\n"a\n, ""x"" y", "b"\n', 'a\n, "x" y', "b"),
        # no blank is before the quotes of a cell, so blanks are text
        ("instruction, output\na, b\n", "a", " b"),
        ('instruction,output\n5" or, x "y"\n', '5" or', ' x "y"'),
        ('instruction,output\n"a, ""x""",b\n', 'a, "x"', "b"),
        ('instruction,output\n"a\n ""x""", b\n', 'a\n "x"', " b"),
    ],
)
def test_blanks_before_the_quotes_of_a_cell_are_not_text(write, text, instruction, output):
    [record] = read_records(write("a.csv", text))
    assert (record["instruction"], record["output"]) == (instruction, output)


@pytest.mark.parametrize("text", ["instruction,output,,\na,b,,\nc,d,, \n", ",instruction,output\n0,a,b\n1,c,d\n"])
def test_empty_columns_without_a_name_and_row_numbers_are_ignored(write, text):
    assert [record["output"] for record in read_records(write("a.csv", text))] == ["b", "d"]


@pytest.mark.parametrize("header", ["instruction,output,,", "instruction,output,other,"])
def test_a_cell_of_a_column_without_a_name_is_refused(write, header):
    """It is probably the end of a row whose texts have a comma outside of quotes."""
    with pytest.raises(ValueError, match=r"line 3 \(record 2\): column 4 has no name, but a cell: \"d\".*quotes"):
        read_records(write("a.csv", f"{header}\na,b,,\na,b,,d\n"))


def test_a_long_cell_of_a_csv_file_is_read(tmp_path):
    (tmp_path / "a.csv").write_text(f"instruction,output\na,{'x' * 200_000}\n")
    assert len(read_records(tmp_path / "a.csv")[0]["output"]) == 200_000
    (tmp_path / "a.csv").write_text("instruction,output\na,b\n")
    read_records(tmp_path / "a.csv")
    assert csv.field_size_limit() >= 131_072  # other users of the process keep theirs
