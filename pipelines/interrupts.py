"""Makes Ctrl-C, SIGTERM and SIGHUP (a closed terminal) end a run, whatever the main thread is doing."""

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from pipelines.zenml_compat import INTERRUPTIONS

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
SECONDS = 2.0  # seconds until an interruption that was lost is repeated


@contextmanager
def interruptible() -> Iterator[None]:
    """Context manager: raise KeyboardInterrupt on `SIGNALS` except ignored ones (nohup), and again if it is lost.

    Python ignores exceptions that a signal handler raises within a destructor or a weak reference's callback
    ("Exception ignored in"), so the run would continue. Only the main thread can set a signal handler; in other threads
    this does nothing.
    """
    ended = threading.Event()

    def interrupt(number: int, frame: FrameType | None) -> None:
        threading.Thread(target=repeat, args=(number,), daemon=True).start()
        raise KeyboardInterrupt

    def repeat(number: int) -> None:
        # If an exception is already propagating, the steps' cleanup is running, and must not be interrupted.
        while not ended.wait(SECONDS):
            if not _is_interrupted(main):
                signal.pthread_kill(main, number)
                return

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    main = threading.get_ident()
    numbers = [each for each in SIGNALS if signal.getsignal(each) is not signal.SIG_IGN]
    before = {number: signal.signal(number, interrupt) for number in numbers}
    try:
        yield
    finally:
        ended.set()
        for number, handler in before.items():
            signal.signal(number, handler)


def _is_interrupted(thread: int) -> bool:
    """Whether the thread is handling an interruption, or an error caused by one."""
    current = sys._current_exceptions().get(thread)
    error: BaseException | None = current[1] if isinstance(current, tuple) else current  # Python 3.11 has a tuple
    while error is not None and not isinstance(error, INTERRUPTIONS):
        error = error.__context__
    return error is not None
