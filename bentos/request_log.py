"""The request log: one JSON line per completion and per feedback. Writing it never delays a response."""

import atexit
import hashlib
import json
import logging
import os
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from logging.handlers import QueueHandler, QueueListener, RotatingFileHandler
from pathlib import Path
from queue import Full, Queue
from threading import Lock
from typing import Any

from bentos.canary import Comparison
from bentos.completion import CompletionResult
from bentos.settings import LogText
from gpt2core.types import LoggedCompletion, LoggedFeedback, LoggedShadow

MAX_BYTES, BACKUPS = 10_000_000, 5  # size at which the file is rotated; number of older files that are kept
MAX_WAITING = 1_000  # lines that may wait for a slow disk; further lines are dropped and counted

logger = logging.getLogger(__name__)


class RequestLog:
    """JSON lines of completions and feedback. A thread writes them, so that a slow disk never delays a response."""

    def __init__(self, file: str | Path, text: LogText = "hash") -> None:
        """
        Args:
            file: the log, which is rotated.
            text: how prompts and completions are logged: as sha256 (repetitions stay visible), as text, or not at all.
        """
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        handler = _File(file, self._on_write)
        handler.setFormatter(logging.Formatter("%(message)s"))
        self._text, self._dropped, self._is_failing = text, 0, False
        self._lock = Lock()  # of _dropped, which the writing thread changes too
        self._queue: Queue[logging.LogRecord] = Queue(MAX_WAITING)
        self._handler = QueueHandler(self._queue)
        self._listener: QueueListener | None = QueueListener(self._queue, handler)
        self._listener.start()
        atexit.register(self.close)

    @property
    def keeps_text(self) -> bool:
        return self._text == "keep"

    def write(self, result: CompletionResult, decode: Callable[[list[int]], str]) -> None:
        request, first = result.request, result.time_to_first_token
        texts = {"prompt": decode(request.prompt), "answer": decode(result.answer)}
        line = LoggedCompletion(
            time=_now(),
            milliseconds=round(1000 * (result.ended_at - result.submitted_at), 1),
            temperature=request.config.temperature,
            request_id=request.request_id,
            model=request.model,
            adapter_sha256=None if result.adapter is None else result.adapter.sha256,
            finish_reason=result.finish_reason,
            prompt_tokens=len(request.prompt),
            completion_tokens=len(result.tokens),
            first_token_milliseconds=None if first is None else round(1000 * first, 1),
            prompt_characters=len(texts["prompt"]),
            answer_characters=len(texts["answer"]),
            **self._logged(texts),
        )
        self._enqueue(line.to_json())

    def write_shadow(self, comparison: Comparison, answer: str) -> None:
        shadow, logprob = comparison.shadow, comparison.mean_logprob
        line = LoggedShadow(
            time=_now(),
            request_id=shadow.request.request_id,
            shadow=shadow.request.model,
            adapter_sha256=None if shadow.adapter is None else shadow.adapter.sha256,
            finish_reason=shadow.finish_reason,
            milliseconds=round(1000 * (shadow.ended_at - shadow.submitted_at), 1),
            completion_tokens=len(shadow.tokens),
            agreed=comparison.agreed,
            token_f1=round(comparison.token_f1, 4),
            mean_logprob=None if logprob is None else round(logprob, 4),
            **self._logged({"answer": answer}),
        )
        self._enqueue(line.to_json())

    def write_feedback(self, request_id: str, rating: str, correction: str | None, comment: str | None) -> bool:
        """Log feedback on a completion; False if the disk is full, or too slow, and the line was dropped.

        The texts are logged unchanged: the caller must reject them unless `keeps_text`.
        """
        return self._enqueue(LoggedFeedback(_now(), request_id, rating, correction, comment).to_json()) and (
            not self._is_failing
        )

    def close(self) -> None:
        """Write the waiting lines, and stop."""
        if self._listener is not None:
            self._listener.stop()
            self._listener = None
            atexit.unregister(self.close)

    def _logged(self, texts: Mapping[str, str]) -> dict[str, str]:
        if self._text == "keep":
            return dict(texts)
        if self._text == "drop":
            return {}
        return {f"{name}_sha256": hashlib.sha256(text.encode()).hexdigest() for name, text in texts.items()}

    def _enqueue(self, line: dict[str, Any]) -> bool:
        with self._lock:
            dropped, self._dropped = self._dropped, 0
        if dropped:
            line["lost_before"] = dropped
        record = logging.LogRecord(__name__, logging.INFO, "", 0, json.dumps(line, ensure_ascii=False), None, None)
        record.__dict__["n_lines"] = 1 + dropped
        try:
            self._handler.enqueue(record)
            return True
        except Full:
            with self._lock:
                self._dropped += 1 + dropped
            if not dropped:
                logger.warning("the disk is too slow for the request log; lines are being dropped")
            return False

    def _on_write(self, n_lines: int, error: BaseException | None) -> None:
        """Callback of the writing thread after each line; `n_lines` is the number of lost lines, 0 on success."""
        if n_lines and not self._is_failing:
            logger.warning("the request log cannot be written; lines are being dropped: %s", error)
        with self._lock:
            self._dropped += n_lines
        self._is_failing = n_lines > 0


class _File(RotatingFileHandler):
    """Reports lines that cannot be written; `logging` itself would print a traceback and the line with its texts.

    A line is written at once or lost: a buffer would write it later, although it was reported. If only a part of it was
    written, by this process or one that was killed, the next one starts on a new line.
    """

    def __init__(self, file: str | Path, report: Callable[[int, BaseException | None], None]) -> None:
        super().__init__(file, maxBytes=MAX_BYTES, backupCount=BACKUPS)
        self._report = report

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._reopen_if_moved()
            # a pipe has no position, which Python 3.13 asks for
            if (self.stream is None or self.stream.seekable()) and self.shouldRollover(record):
                self.doRollover()
            self._write(self.format(record).encode() + b"\n")
        except Exception as error:
            self._report(record.__dict__["n_lines"], error)
        else:
            self._report(0, None)

    def _reopen_if_moved(self) -> None:
        """Continue in a new file if the file was moved or deleted, for example by logrotate."""
        file, stream = Path(self.baseFilename), self.stream
        if stream is not None and not (file.exists() and os.path.samestat(file.stat(), os.fstat(stream.fileno()))):
            stream.close()
            self.stream = self._open()

    def _open(self) -> Any:
        file = Path(self.baseFilename)
        self._is_cut = file.is_file() and _last_byte(file) not in (b"", b"\n")
        return file.open("ab", buffering=0)

    def _write(self, line: bytes) -> None:
        stream: Any = self.stream  # FileIO, as `_open` returns it
        rest = b"\n" + line if self._is_cut else line
        while rest:
            written = stream.write(rest)
            self._is_cut = not rest[:written].endswith(b"\n")
            rest = rest[written:]


def _last_byte(file: Path) -> bytes:
    with file.open("rb") as stream:
        stream.seek(max(0, file.stat().st_size - 1))
        return stream.read(1)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
