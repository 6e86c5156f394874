"""What was asked and answered, one JSON line each, for monitoring. Off unless a file is named; never waited for."""

import atexit
import hashlib
import json
import logging
from datetime import UTC, datetime
from logging.handlers import QueueHandler, QueueListener, RotatingFileHandler
from pathlib import Path
from queue import Full, Queue
from typing import Any, Literal, get_args

Text = Literal["hash", "keep", "drop"]
MAX_BYTES, BACKUPS = 10_000_000, 5  # of a file before the next; and how many older ones are kept
MAX_WAITING = 1_000  # lines that a slow disk may owe; further ones are lost, and counted

logger = logging.getLogger(__name__)


class RequestLog:
    def __init__(self, file: str, text: str = "hash") -> None:
        """
        Args:
            file: where to, rotated; "": nowhere.
            text: of prompts and answers: their sha256, which tells repetitions; the text itself; or neither.
        """
        if text not in get_args(Text):
            raise ValueError(f"GPT2_REQUEST_LOG_TEXT is {text!r}; it must be one of {', '.join(get_args(Text))}")
        self._text, self._lost = text, 0
        self._queue: Queue[logging.LogRecord] | None = None
        if file:
            Path(file).parent.mkdir(parents=True, exist_ok=True)
            handler = RotatingFileHandler(file, maxBytes=MAX_BYTES, backupCount=BACKUPS, encoding="utf-8")
            handler.setFormatter(logging.Formatter("%(message)s"))
            self._queue = Queue(MAX_WAITING)
            self._handler = QueueHandler(self._queue)
            self._listener = QueueListener(self._queue, handler)
            self._listener.start()
            atexit.register(self.close)

    @property
    def wanted(self) -> bool:
        return self._queue is not None

    def write(self, prompt: str, answer: str, **values: Any) -> None:
        """Add a line; only where one is `wanted`."""
        line: dict[str, Any] = {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), **values}
        for name, text in (("prompt", prompt), ("answer", answer)):
            line[f"{name}_characters"] = len(text)
            if self._text == "keep":
                line[name] = text
            elif self._text == "hash":
                line[f"{name}_sha256"] = hashlib.sha256(text.encode()).hexdigest()
        if self._lost:
            line["lost_before"] = self._lost
        record = logging.LogRecord(__name__, logging.INFO, "", 0, json.dumps(line, ensure_ascii=False), None, None)
        try:
            self._handler.enqueue(record)
            self._lost = 0
        except Full:
            self._lost += 1
            if self._lost == 1:
                logger.warning("the request log is not written fast enough; lines are being lost")

    def close(self) -> None:
        """Write what is waiting, and end."""
        if self._queue is not None:
            self._listener.stop()
            self._queue = None
            atexit.unregister(self.close)
