"""Signal handlers for the duration of a block."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import current_thread, main_thread
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)  # Ctrl-C is SIGINT, a closed terminal SIGHUP


@contextmanager
def handling_signals(handle: Callable[[int, FrameType | None, Any], None]) -> Iterator[None]:
    """Context manager: call `handle` with number, frame and previous handler on `SIGNALS`, except ignored ones (nohup).

    Only the main thread can set signal handlers; in other threads this does nothing.
    """
    previous: dict[int, Any] = {}
    if current_thread() is main_thread():
        for number in SIGNALS:
            if (handler := signal.getsignal(number)) is not signal.SIG_IGN:
                previous[number] = handler
                signal.signal(number, lambda number, frame: handle(number, frame, previous[number]))
    try:
        yield
    finally:
        for restored, handler in previous.items():
            signal.signal(restored, handler)
