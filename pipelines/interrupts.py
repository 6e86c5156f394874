"""Makes Ctrl-C, SIGTERM and SIGHUP (a closed terminal) end a run in any state of the main thread."""

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from deploy.signals import handling_signals
from pipelines.zenml_compat import INTERRUPTIONS

SECONDS = 2.0  # seconds until an interruption that was lost is repeated


@contextmanager
def interruptible() -> Iterator[None]:
    """Context manager: raise KeyboardInterrupt on signals (see `handling_signals`), and again if it is lost.

    Python ignores exceptions that a signal handler raises within a destructor or a weak reference's callback
    ("Exception ignored in"), so the run would continue.
    """
    ended = threading.Event()
    main = threading.get_ident()

    def interrupt(number: int, frame: FrameType | None, previous: Any) -> None:
        threading.Thread(target=repeat, args=(number,), daemon=True).start()
        raise KeyboardInterrupt

    def repeat(number: int) -> None:
        # If an exception is already propagating, the steps' cleanup is running, and must not be interrupted.
        while not ended.wait(SECONDS):
            if not _is_interrupted(main):
                signal.pthread_kill(main, number)
                return

    with handling_signals(interrupt):
        try:
            yield
        finally:
            ended.set()


def _is_interrupted(thread: int) -> bool:
    """Whether the thread is handling an interruption, or an error caused by one."""
    current = sys._current_exceptions().get(thread)
    error: BaseException | None = current[1] if isinstance(current, tuple) else current  # Python 3.11 has a tuple
    while error is not None and not isinstance(error, INTERRUPTIONS):
        error = error.__context__
    return error is not None
