import errno
import hashlib
import json
import os
import resource
import sys
import threading
from contextlib import suppress

import pytest

from bentos import request_log
from bentos.completion import CompletionResult, GenerationRequest
from bentos.request_log import RequestLog
from gpt2core.config import GenerationConfig
from tests.helpers import wait_until

PROMPT, ANSWER = "Name a rivér.", "Elbe"


def result(request_id: str = "r1", prompt: str = PROMPT, answer: str = ANSWER) -> CompletionResult:
    """A completion whose token ids are code points; `decode` makes text of them. Token 0 is end of text."""
    config = GenerationConfig(eos_id=0)
    request = GenerationRequest([ord(c) for c in prompt], config, "gpt2-instruct", 0.0, request_id)
    return CompletionResult(request, None, "stop", [*map(ord, answer), 0], [1.5], submitted_at=1.0, ended_at=2.0)


def decode(ids: list[int]) -> str:
    return "".join(map(chr, ids))


def lines(file) -> list[dict]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("text", ["hash", "keep", "drop"])
def test_text_is_hashed_kept_or_dropped(tmp_path, text):
    file = tmp_path / "folder" / "requests.jsonl"
    log = RequestLog(str(file), text)
    log.write(result(), decode)
    log.close()
    (line,) = lines(file)
    assert line["request_id"] == "r1"
    assert (line["milliseconds"], line["first_token_milliseconds"]) == (1000, 500)
    assert (line["prompt_characters"], line["answer_characters"]) == (13, 4)
    assert (line.get("prompt"), line.get("answer")) == ((PROMPT, ANSWER) if text == "keep" else (None, None))
    hashed = hashlib.sha256(PROMPT.encode()).hexdigest()
    assert line.get("prompt_sha256") == (hashed if text == "hash" else None)
    if text != "keep":
        assert "Elbe" not in file.read_text()
        assert "riv" not in file.read_text()


def test_files_are_rotated_and_a_limited_number_is_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(request_log, "MAX_BYTES", 1000)
    monkeypatch.setattr(request_log, "BACKUPS", 2)
    file = tmp_path / "requests.jsonl"
    log = RequestLog(str(file), "drop")
    for i in range(100):
        log.write(result(str(i)), decode)
    log.close()
    files = sorted(tmp_path.iterdir())
    assert [file.name for file in files] == ["requests.jsonl", "requests.jsonl.1", "requests.jsonl.2"]
    assert all(file.stat().st_size <= 1000 for file in files)
    kept = [int(line["request_id"]) for file in (files[2], files[1], files[0]) for line in lines(file)]
    assert kept == list(range(kept[0], 100))


def test_a_full_disk_loses_lines_but_shows_none_of_their_texts(tmp_path, monkeypatch, caplog, capfd):
    log = RequestLog("/dev/full", "keep")
    for _ in range(2):
        log.write(result(), decode)
    wait_until(lambda: log._dropped == 2, 20, "losing both lines")
    assert not log.write_feedback("r1", "bad", "a corréction", None)
    log.close()
    assert [record.getMessage() for record in caplog.records] == [
        "the request log cannot be written; lines are being dropped: [Errno 28] No space left on device"
    ]
    assert capfd.readouterr().err == ""
    log = RequestLog(tmp_path / "log", "keep")
    log._dropped = 3
    log.write(result(), decode)
    log.close()
    assert lines(tmp_path / "log")[0]["lost_before"] == 3


@pytest.mark.parametrize("rest", ["", '{"request_id": "half'])
def test_a_line_that_a_crash_cut_short_does_not_damage_the_next(tmp_path, rest):
    file = tmp_path / "requests.jsonl"
    for request_id in ("r1", "r2"):
        log = RequestLog(str(file), "keep")
        log.write(result(request_id), decode)
        log.close()
        with file.open("a", encoding="utf-8") as stream:
            stream.write(rest)
    written = file.read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["request_id"] for line in written if line != rest] == ["r1", "r2"]


def test_the_rest_of_a_line_that_failed_half_way_is_neither_lost_nor_written_late(tmp_path):
    file = tmp_path / "requests.jsonl"
    log = RequestLog(str(file), "keep")
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limit[1]))
    try:
        for i in range(10):
            log.write(result(f"full{i}", "p" * 3_000), decode)
        wait_until(lambda: log._dropped == 8, 20, "losing eight of ten lines")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    log.write(result("after"), decode)
    log.close()
    found, damaged = [], 0
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:
            damaged += 1
    assert [line["request_id"] for line in found] == ["full0", "full1", "after"]
    assert (found[-1]["lost_before"], damaged) == (8, 1)


def test_all_lost_lines_are_counted_although_two_threads_count(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(request_log._File, "_write", fail)
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for i in range(5):
            log = RequestLog(tmp_path / f"log{i}", "keep")
            for _ in range(1000):
                log.write_feedback("r", "good", None, None)
            log.close()
            assert log._dropped == 1000
    finally:
        sys.setswitchinterval(before)


@pytest.mark.parametrize("moves", [True, False])
def test_a_log_that_was_moved_or_deleted_is_continued_in_a_new_file(tmp_path, moves):
    file = tmp_path / "requests.jsonl"
    log = RequestLog(str(file), "keep")
    log.write(result("first"), decode)
    wait_until(lambda: file.read_bytes().endswith(b"\n"), 20, "the first line")
    if moves:
        file.rename(tmp_path / "moved")
    else:
        file.unlink()
    log.write(result("second"), decode)
    log.close()
    assert [line["request_id"] for line in lines(file)] == ["second"]


def test_a_blocked_disk_drops_lines_and_delays_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(request_log, "MAX_WAITING", 10)
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDWR | os.O_NONBLOCK)  # not read yet, so it fills up
    log = RequestLog(str(pipe), "keep")
    done = threading.Event()

    def write() -> None:
        for _ in range(100):
            log.write(result(prompt="p" * 10_000), decode)
        done.set()

    threading.Thread(target=write, daemon=True).start()
    assert done.wait(20)
    text = b""

    def drained() -> bool:
        nonlocal text
        with suppress(BlockingIOError):
            text += os.read(reader, 1 << 20)
        return log._queue.empty()

    wait_until(drained, 20, "an empty queue")
    log.write(result(), decode)
    log.close()
    text += os.read(reader, 1 << 20)
    written = [json.loads(line) for line in text.splitlines()]
    lost = sum(line.get("lost_before", 0) for line in written)
    assert lost > 0
    assert len(written) + lost == 101
    os.close(reader)
