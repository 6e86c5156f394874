"""Corrections in a request log become instruction records."""

import json
import time
from dataclasses import replace

import pytest
from click.testing import CliRunner

from bentos.request_log import RequestLog
from commands.records import collect
from gpt2core.data import read_records
from gpt2core.prompt import format_prompt
from run import main
from tests.bentos.test_request_log import decode, result


@pytest.fixture
def log(tmp_path):
    """A log that keeps texts; `close` ends writing it."""
    log = RequestLog(tmp_path / "requests.jsonl", "keep")
    yield log
    log.close()


def answered(log: RequestLog, request_id: str, instruction: str, input: str = "", raw: str = "") -> None:
    log.write(result(request_id, raw or format_prompt(instruction, input)), decode)


def run_records(*arguments):
    return CliRunner().invoke(main, ["records", "--from-feedback", *map(str, arguments)], catch_exceptions=False)


def test_corrections_become_records_that_the_pipeline_reads(log, tmp_path):
    answered(log, "a", "What is the capital?", "Canada")
    answered(log, "b", "What is the capital?", "Canada")
    answered(log, "c", "Name a rivér.")
    answered(log, "d", "Say yes.")
    log.write_feedback("a", "bad", "Toronto", None)
    log.write_feedback("b", "bad", "Ottawa\n", "not Toronto")  # the same question: the newest counts
    log.write_feedback("chatcmpl-c", "bad", "Elbe\u2028Saale", None)
    log.write_feedback("d", "good", None, None)
    log.close()
    shown = run_records(tmp_path / "requests.jsonl", "--out", tmp_path / "new.jsonl")
    assert shown.exit_code == 0, shown.output
    assert "2 records, 2 of them new or changed" in shown.output
    assert read_records(tmp_path / "new.jsonl") == [
        {"instruction": "What is the capital?", "input": "Canada", "output": "Ottawa"},
        {"instruction": "Name a rivér.", "input": "", "output": "Elbe\u2028Saale"},
    ]


def test_the_logs_of_replicas_may_be_put_together_in_any_order(log, tmp_path):
    answered(log, "a", "Say yes.")
    for text in ("no", "yes"):
        log.write_feedback("a", "bad", text, None)
        time.sleep(0.002)  # the log has milliseconds
    log.close()
    file = tmp_path / "all.jsonl"
    file.write_bytes(b"".join(reversed((tmp_path / "requests.jsonl").read_bytes().splitlines(keepends=True))))
    collect(file, tmp_path / "new.jsonl")
    assert read_records(tmp_path / "new.jsonl")[0]["output"] == "yes"


def test_records_of_earlier_logs_stay_in_the_file_and_get_newer_corrections(log, tmp_path):
    out = tmp_path / "new.jsonl"
    old = [
        {"instruction": "Say yes.", "input": "", "output": "no", "family": "words"},
        {"instruction": "Say 1.", "output": "1"},
        {"instruction": "Say 1.", "output": "one"},
    ]
    out.write_text("".join(json.dumps(record) + "\n" for record in old))
    answered(log, "a", "Say yes.")
    log.write_feedback("a", "bad", "yes", None)
    log.close()
    assert collect(tmp_path / "requests.jsonl", out).changed == 1
    assert collect(tmp_path / "requests.jsonl", out).changed == 0
    assert read_records(out) == [old[0] | {"output": "yes"}, old[1] | {"input": ""}, old[2] | {"input": ""}]


def test_what_cannot_be_used_is_named_by_its_line_and_the_rest_is_written(log, tmp_path):
    file = tmp_path / "requests.jsonl"
    file.with_name("requests.jsonl.1").write_text('{"torn": ')
    answered(log, "raw", "", raw="Once upon a time")
    answered(log, "twice", "Say 1.")
    answered(log, "twice", "Say 2.")
    log.write(replace(result("good", format_prompt("Say yes."))), decode)
    for request_id in ("raw", "twice", "unknown", "good"):
        log.write_feedback(request_id, "bad", "yes", None)
    log.close()
    shown = run_records(file, "--out", tmp_path / "new.jsonl")
    assert shown.exit_code == 0
    assert "1 records, 1 of them" in shown.output
    places = [line.partition(": ") for line in shown.stderr.splitlines()[1:]]
    assert [(place.removeprefix(f"{tmp_path}/"), why.split("'")[0]) for place, _, why in places] == [
        ("requests.jsonl.1:1", "Expecting value: line 1 column 10 (char 9)"),
        ("requests.jsonl:5", "the prompt of "),
        ("requests.jsonl:6", ""),
        ("requests.jsonl:7", "no completion in the log has the request id "),
    ]


def test_a_link_to_the_file_of_records_stays_a_link(log, tmp_path):
    answered(log, "a", "Say yes.")
    log.write_feedback("a", "bad", "yes", None)
    log.close()
    (tmp_path / "link.jsonl").symlink_to("shared.jsonl")
    collect(tmp_path / "requests.jsonl", tmp_path / "link.jsonl")
    assert (tmp_path / "link.jsonl").is_symlink()
    assert len(read_records(tmp_path / "shared.jsonl")) == 1


def test_a_log_without_a_usable_correction_is_one_line_and_writes_nothing(log, tmp_path):
    log.write_feedback("a", "bad", "yes", None)
    log.close()
    for arguments, text in [
        ((tmp_path / "requests.jsonl", "--out", tmp_path / "new.jsonl"), "no usable correction; "),
        ((tmp_path / "requests.jsonl", "--out", tmp_path / "new.txt"), "must end in .jsonl"),
        ((tmp_path / "none.jsonl", "--out", tmp_path / "new.jsonl"), "there is no request log"),
    ]:
        shown = run_records(*arguments)
        assert shown.exit_code == 1
        assert text in shown.output
        assert len(shown.output.splitlines()) == 1
    assert not (tmp_path / "new.jsonl").exists()


def test_a_log_without_a_usable_correction_keeps_the_records_of_an_existing_file(log, tmp_path):
    out = tmp_path / "new.jsonl"
    out.write_text('{"instruction": "Say yes.", "input": "", "output": "yes"}\n')
    before = read_records(out)
    log.write_feedback("a", "bad", None, None)
    log.close()
    shown = run_records(tmp_path / "requests.jsonl", "--out", out)
    assert (shown.exit_code, shown.output) == (0, f"{out}: 1 records, 0 of them new or changed\n")
    assert read_records(out) == before


def test_a_correction_that_is_not_unicode_text_is_named_by_its_line(log, tmp_path):
    answered(log, "a", "Say yes.")
    log.write_feedback("a", "bad", "yes", None)
    log.close()
    file = tmp_path / "requests.jsonl"
    damaged = json.loads(file.read_bytes().splitlines()[-1]) | {"correction": "\ud800"}
    file.write_bytes(file.read_bytes() + json.dumps(damaged).encode() + b"\n")
    shown = run_records(file, "--out", tmp_path / "new.jsonl")
    assert shown.exit_code == 0, shown.output
    assert f"{file}:3: " in shown.stderr
    assert read_records(tmp_path / "new.jsonl")[0]["output"] == "yes"
