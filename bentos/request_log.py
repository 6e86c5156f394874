"""A log of completions for monitoring, one JSON line each. Writing it never delays a response."""

import atexit
import hashlib
import json
import logging
from collections.abc import Callable
from datetime import UTC, datetime
from logging.handlers import QueueHandler, QueueListener, RotatingFileHandler
from pathlib import Path
from queue import Full, Queue
from typing import Any

from bentos.completion import CompletionResult
from bentos.settings import LogText

MAX_BYTES, BACKUPS = 10_000_000, 5  # of a file before it is rotated; older files that are kept
MAX_WAITING = 1_000  # lines waiting for a slow disk; further ones are dropped and counted

logger = logging.getLogger(__name__)


class RequestLog:
    def __init__(self, file: str | Path, text: LogText = "hash") -> None:
        """
        Args:
            file: the log, which is rotated.
            text: of prompts and completions: their sha256, which shows repetitions; the text itself; or neither.
        """
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        handler = RotatingFileHandler(file, maxBytes=MAX_BYTES, backupCount=BACKUPS, encoding="utf-8")
        handler.setFormatter(logging.Formatter("%(message)s"))
        self._text, self._dropped = text, 0
        self._queue: Queue[logging.LogRecord] = Queue(MAX_WAITING)
        self._handler = QueueHandler(self._queue)
        self._listener: QueueListener | None = QueueListener(self._queue, handler)
        self._listener.start()
        atexit.register(self.close)

    def write(self, result: CompletionResult, decode: Callable[[list[int]], str]) -> None:
        request, first = result.request, result.time_to_first_token
        line: dict[str, Any] = {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "milliseconds": round(1000 * (result.ended_at - result.submitted_at), 1),
            "temperature": request.config.temperature,
            "request_id": request.request_id,
            "model": request.model,
            "adapter_sha256": result.adapter and result.adapter.sha256,
            "finish_reason": result.finish_reason,
            "prompt_tokens": len(request.prompt),
            "completion_tokens": len(result.tokens),
            "first_token_milliseconds": None if first is None else round(1000 * first, 1),
        }
        for name, text in (("prompt", decode(request.prompt)), ("answer", decode(result.tokens))):
            line[f"{name}_characters"] = len(text)
            if self._text == "keep":
                line[name] = text
            elif self._text == "hash":
                line[f"{name}_sha256"] = hashlib.sha256(text.encode()).hexdigest()
        self._enqueue(line)

    def close(self) -> None:
        """Write the waiting lines, and stop."""
        if self._listener is not None:
            self._listener.stop()
            self._listener = None
            atexit.unregister(self.close)

    def _enqueue(self, line: dict[str, Any]) -> None:
        if self._dropped:
            line["lost_before"] = self._dropped
        record = logging.LogRecord(__name__, logging.INFO, "", 0, json.dumps(line, ensure_ascii=False), None, None)
        try:
            self._handler.enqueue(record)
            self._dropped = 0
        except Full:
            self._dropped += 1
            if self._dropped == 1:
                logger.warning("the disk is too slow for the request log; lines are being dropped")
