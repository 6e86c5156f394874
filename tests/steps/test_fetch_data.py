import functools
import hashlib
import json
import re
import threading
from dataclasses import replace
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pandas as pd
import pytest
from zenml import pipeline
from zenml.enums import ExecutionMode

from gpt2core.demo.records import write_records
from gpt2core.demo.world import make_world
from steps.adapters.download import DownloadError
from steps.config import BaseConfig, DataConfig
from steps.fetch_data import fetch_data, read_source
from steps.fetch_text import split_documents

RECORDS = [{"instruction": f"Say {i % 3}.", "input": "", "output": str(i % 3)} for i in range(5)]
LONG = {"instruction": "Repeat the rhyme.", "input": "", "output": "row the boat, " * 100}
BASE = BaseConfig("random")


@pipeline(enable_cache=False, execution_mode=ExecutionMode.FAIL_FAST)
def only_fetch_data(data: DataConfig) -> None:
    fetch_data(data, BASE, 0)


def fetched(data: DataConfig):
    """The records and their metadata."""
    [artifact] = only_fetch_data(data).steps["fetch_data"].outputs["records"]
    return artifact.load(), artifact.run_metadata


@pytest.fixture
def url(tmp_path):
    (tmp_path / "records.json").write_text(json.dumps(RECORDS))
    handler = functools.partial(SimpleHTTPRequestHandler, directory=tmp_path)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever).start()
        yield f"http://127.0.0.1:{server.server_port}/records.json"
        server.shutdown()


def write(tmp_path, records) -> str:
    file = tmp_path / "mine.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(file)


def test_records_from_a_url_are_read_counted_and_traceable(url, caplog):
    sha256 = hashlib.sha256(json.dumps(RECORDS).encode()).hexdigest()
    records, about = fetched(DataConfig(source="url", url=f"{url}?token=secret", sha256=sha256))
    assert records == RECORDS
    assert (about["source"], about["records"], about["duplicates"]) == ("url", 5, 2)
    assert (about["location"], about["file_sha256"]) == (url, sha256)
    repeats = "2 of 5 records repeat an earlier instruction and input (2 of them also the output)"
    assert f"{repeats}; a split keeps them together" in caplog.text


def test_an_error_in_a_file_from_a_url_names_the_url(url, tmp_path):
    content = b'[{"instruction": "What?"}]'
    (tmp_path / "records.json").write_bytes(content)
    with pytest.raises(ValueError, match=rf"^{re.escape(url)}: record 1 .*output"):
        read_source(DataConfig(source="url", url=url, sha256=hashlib.sha256(content).hexdigest()), 0)


@pytest.mark.parametrize("path", ["", "/", "/x/..", "/export?file=a.json"])
def test_a_url_without_the_name_of_a_file_is_refused_before_the_run(path):
    with pytest.raises(ValueError, match=r"DataConfig.url .* ends in one of .json"):
        DataConfig(source="url", url=f"http://host{path}", sha256="0" * 64)


def test_a_file_with_another_digest_fails_the_step(url):
    with pytest.raises(DownloadError):
        only_fetch_data(DataConfig(source="url", url=url, sha256="0" * 64))


def test_the_bundled_records_follow_from_the_seed():
    records, about = fetched(DataConfig(n_facts=40))
    assert records == write_records(make_world(0, 40), 0)
    assert about["duplicates"] == 0


def test_all_records_that_are_too_long_are_named_by_their_place_in_the_file(tmp_path):
    file = write(tmp_path, [*RECORDS, LONG, RECORDS[0], LONG])
    with pytest.raises(ValueError, match=rf"{file}: 2 of 8 records .*line 6.*line 8.*too_long to drop or truncate"):
        only_fetch_data(DataConfig(source="file", path=file))


@pytest.mark.parametrize(("too_long", "left", "done"), [("drop", 5, "dropped"), ("truncate", 6, "truncated")])
def test_records_that_are_too_long_are_dropped_or_truncated_on_request(tmp_path, caplog, too_long, left, done):
    file = write(tmp_path, [*RECORDS, LONG])
    records, about = fetched(DataConfig(source="file", path=file, too_long=too_long))
    assert len(records) == about["records"] == left
    assert about["too_long"] == 1
    assert f"1 of 6 records have more tokens than the context of 128 and were {done}: record 6 (line 6)" in caplog.text


def test_test_records_that_are_too_long_are_dropped_also_by_truncate(tmp_path, caplog):
    test_path = tmp_path / "test.jsonl"
    test_path.write_text(f"{json.dumps(RECORDS[0])}\n{json.dumps(LONG)}\n")
    data = DataConfig(source="file", path=write(tmp_path, [*RECORDS, LONG]), test_path=str(test_path))
    _, about = fetched(replace(data, too_long="truncate"))
    assert about["records"] == 7
    assert (
        "2 of 8 records have more tokens than the context of 128 and were truncated (1 of the test part dropped): "
        in (caplog.text)
    )


def test_faulty_records_are_refused_or_dropped_and_counted(tmp_path, caplog):
    test_path = tmp_path / "test.jsonl"
    test_path.write_text(f'{json.dumps(RECORDS[0])}\n{{"messages": []}}\n')
    file = write(tmp_path, [*RECORDS, RECORDS[0] | {"output": ""}])
    data = DataConfig(source="file", path=file, test_path=str(test_path))
    with pytest.raises(ValueError, match=r"record 6 \(line 6\): 'output' is empty"):
        read_source(data, 0)
    records, about = fetched(replace(data, invalid="drop"))
    assert len(records) == about["records"] == 6
    assert about["invalid"] == 2
    assert f"{file}: 1 of 6 records are invalid and were dropped: record 6 (line 6): 'output' is empty" in caplog.text
    assert f"{test_path}: 1 of 2 records are invalid and were dropped: record 2 (line 2)" in caplog.text


def test_records_with_section_headers_of_the_prompt_are_counted_and_named(tmp_path, caplog):
    odd = {"instruction": "Complete it.", "input": "", "output": "### Response: yes"}
    _, about = fetched(DataConfig(source="file", path=write(tmp_path, [*RECORDS, odd])))
    assert about["with_prompt_markers"] == 1
    assert (
        "1 of 6 records contain a section header of the prompt or <|endoftext|>, at which answers are cut"
        in caplog.text
    )


def test_own_files_for_the_parts_are_read_with_mapped_columns_and_leaks_are_counted(tmp_path, caplog):
    rows = [{"q": record["instruction"], "a": record["output"]} for record in RECORDS]
    path, test_path = str(tmp_path / "train.parquet"), tmp_path / "test.csv"
    pd.DataFrame(rows).to_parquet(path)
    test_path.write_text("q,a\nSay 0.,0\nSay 9.,9\n")
    columns = {"instruction": "q", "output": "a"}
    data = DataConfig(source="file", path=path, test_path=str(test_path), columns=columns)
    records, about = fetched(data)
    assert records[:5] == RECORDS
    assert [record["part"] for record in records[5:]] == ["test", "test"]
    assert (about["in_train"], about["test_location"]) == (1, str(test_path))
    assert "1 records of the given validation and test parts repeat a question of the train part" in caplog.text


def test_repeats_in_other_given_parts_are_not_reported_as_kept_together(tmp_path, caplog):
    other = tmp_path / "other.jsonl"
    other.write_text("".join(json.dumps({"instruction": f"Say {i}.", "output": "x"}) + "\n" for i in (7, 8, 9, 9)))
    path, again = write(tmp_path, RECORDS), str(other)
    _, about = fetched(DataConfig(source="file", path=path, val_path=again, test_path=again))
    assert (about["in_train"], about["test_in_val"], about["repeated_questions"]) == (0, 4, 4)
    assert "4 records of the given test part repeat a question of the validation part" in caplog.text
    assert "repeat an earlier instruction and input of the same part (4 of them also the output)\n" in caplog.text
    assert "keeps them together" not in caplog.text
    caplog.clear()
    _, about = fetched(DataConfig(source="file", path=path, test_path=path))
    assert (about["in_train"], about["test_in_val"], about["repeated_questions"]) == (5, 0, 4)
    assert "5 records of the given validation and test parts repeat a question of the train part" in caplog.text


def test_a_file_of_one_part_gives_only_its_records_of_that_part(tmp_path):
    mine, parts = write(tmp_path, RECORDS[:1]), tmp_path / "parts.json"
    parts.write_text(json.dumps({"train": RECORDS[1:2], "test": RECORDS[2:3]}))
    records, _ = read_source(DataConfig(source="file", path=mine, test_path=str(parts)), 0)
    assert records == [RECORDS[0], RECORDS[2] | {"part": "test"}]
    with pytest.raises(ValueError, match="configured as the val part, but has only test, train records"):
        read_source(DataConfig(source="file", path=mine, val_path=str(parts)), 0)


@pytest.mark.parametrize("is_table", [False, True])
def test_locations_have_the_file_if_there_are_several(tmp_path, caplog, is_table):
    for name in ("h/main", "d/x/train", "d/x/test"):
        file = tmp_path / f"{name}.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        if is_table:
            pd.DataFrame([RECORDS[0], LONG]).to_parquet(file.with_suffix(".parquet"))
        else:
            file.write_text(f"{json.dumps(RECORDS[0])}\n{json.dumps(LONG)}\n")
    suffix, line = (".parquet", "") if is_table else (".jsonl", " (line 2)")
    main, directory = str(tmp_path / f"h/main{suffix}"), str(tmp_path / "d")
    named = [f"{part}{suffix}, record 2{line} has" for part in ("test", "train")]
    cases = [
        ({"path": main}, rf"{main}: 1 of 2 records .*: record 2{line} has"),
        ({"path": directory}, rf"{directory}: 2 of 4 records .*: x/{named[0]} .* x/{named[1]}"),
        (
            {"path": main, "test_path": directory},
            rf"{main}, {directory}: 2 of 4 .*: {main}, record 2{line} has .* {directory}/x/{named[0]}",
        ),
    ]
    for paths, message in cases:
        with pytest.raises(ValueError, match=message.replace("(", r"\(").replace(")", r"\)")):
            only_fetch_data(DataConfig(source="file", **paths))
    fetched(DataConfig(source="file", path=directory, too_long="drop"))
    assert f"were dropped: x/{named[0][:-4]}, x/{named[1][:-4]}" in caplog.text


@pytest.mark.parametrize("source", ["file", "hub"])
def test_a_pattern_selects_files_and_the_digest_covers_only_these(tmp_path, source):
    for name, record in zip(("train_a", "test_a", "train_b"), RECORDS, strict=False):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(record))
    where = {"name": str(tmp_path), "path": "*_a.jsonl"} if source == "hub" else {"path": str(tmp_path / "*_a.jsonl")}
    data = DataConfig(source=source, **where)
    records, origin = read_source(data, 0)
    assert records == [RECORDS[1] | {"part": "test"}, RECORDS[0] | {"part": "train"}]
    (tmp_path / "train_b.jsonl").unlink()
    assert read_source(data, 0) == (records, origin)
    (tmp_path / "train_a.jsonl").write_text(json.dumps(RECORDS[2]))
    assert read_source(data, 0)[1]["file_sha256"] != origin["file_sha256"]


@pytest.mark.parametrize(
    ("text", "documents"),
    [
        (" One.\n\nTwo.\n", [" One.\n\nTwo.\n"]),
        ("One.\n<|endoftext|>\nTwo.\n<|endoftext|>\n", ["One.", "Two."]),
        ("<|endoftext|> \n", []),
    ],
)
def test_end_of_text_separates_the_documents_of_a_text(text, documents):
    assert split_documents(text) == documents
