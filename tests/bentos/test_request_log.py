import hashlib
import json
import os
import threading
import time

import pytest

from bentos import request_log
from bentos.request_log import RequestLog

TEXT = {"prompt": "Name a rivér.", "answer": "Elbe"}


def lines(file) -> list[dict]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("text", ["hash", "keep", "drop"])
def test_the_text_is_hashed_kept_or_dropped_by_choice(tmp_path, text):
    file = tmp_path / "folder" / "requests.jsonl"
    log = RequestLog(str(file), text)
    log.write(**TEXT, request_id="r1")
    log.close()
    (line,) = lines(file)
    assert line["request_id"] == "r1"
    assert (line["prompt_characters"], line["answer_characters"]) == (13, 4)
    assert line.get("prompt") == (TEXT["prompt"] if text == "keep" else None)
    hashed = hashlib.sha256(TEXT["prompt"].encode()).hexdigest()
    assert line.get("prompt_sha256") == (hashed if text == "hash" else None)
    if text != "keep":
        assert "Elbe" not in file.read_text()
        assert "riv" not in file.read_text()


def test_files_are_rotated_and_only_so_many_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(request_log, "MAX_BYTES", 1000)
    monkeypatch.setattr(request_log, "BACKUPS", 2)
    file = tmp_path / "requests.jsonl"
    log = RequestLog(str(file), "drop")
    for i in range(100):
        log.write(**TEXT, number=i)
    log.close()
    files = sorted(tmp_path.iterdir())
    assert [file.name for file in files] == ["requests.jsonl", "requests.jsonl.1", "requests.jsonl.2"]
    assert all(file.stat().st_size <= 1000 for file in files)
    kept = [line["number"] for file in (files[2], files[1], files[0]) for line in lines(file)]
    assert kept == list(range(kept[0], 100))


def test_a_disk_that_stands_still_costs_lines_and_no_time(tmp_path, monkeypatch):
    monkeypatch.setattr(request_log, "MAX_WAITING", 10)
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDWR | os.O_NONBLOCK)  # nobody reads it yet, so it fills up
    log = RequestLog(str(pipe), "keep")
    done = threading.Event()

    def write() -> None:
        for _ in range(100):
            log.write("p" * 10_000, "a")
        done.set()

    threading.Thread(target=write, daemon=True).start()
    assert done.wait(20)
    text = b""
    while True:  # now somebody does
        try:
            text += os.read(reader, 1 << 20)
        except BlockingIOError:
            if log._queue.empty():
                break
            time.sleep(0.01)
    log.write("p", "a")
    log.close()
    text += os.read(reader, 1 << 20)
    written = [json.loads(line) for line in text.splitlines()]
    lost = sum(line.get("lost_before", 0) for line in written)
    assert lost > 0
    assert len(written) + lost == 101
    os.close(reader)


def test_nothing_is_written_where_no_file_is_named():
    log = RequestLog("", "hash")
    assert not log.wanted
    log.close()


def test_a_wrong_choice_is_named():
    with pytest.raises(ValueError, match="GPT2_REQUEST_LOG_TEXT is 'all'; it must be one of hash, keep, drop"):
        RequestLog("", "all")
