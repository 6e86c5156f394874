"""ctrl-C and SIGTERM end a run, whatever the main thread is doing when they come."""

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from pipelines.zenml_compat import INTERRUPTIONS

SECONDS = 2.0  # until an interruption that nothing handles is repeated


@contextmanager
def interruptible() -> Iterator[None]:
    """Raise KeyboardInterrupt on SIGTERM and SIGINT, and again if it is lost.

    Python drops what a signal handler raises within a destructor or a weak reference's callback ("Exception ignored
    in"): the run went on as if nothing had happened. Only the main thread can set a signal handler; elsewhere this does
    nothing.
    """
    ended = threading.Event()

    def interrupt(number: int, frame: FrameType | None) -> None:
        threading.Thread(target=repeat, args=(number,), daemon=True).start()
        raise KeyboardInterrupt

    def repeat(number: int) -> None:
        # Where an exception is on its way, the steps' cleanup is running: it must not be interrupted.
        while not ended.wait(SECONDS):
            if not _is_interrupted(main):
                signal.pthread_kill(main, number)
                return

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    main = threading.get_ident()
    numbers = [each for each in (signal.SIGTERM, signal.SIGINT) if signal.getsignal(each) is not signal.SIG_IGN]
    before = {number: signal.signal(number, interrupt) for number in numbers}
    try:
        yield
    finally:
        ended.set()
        for number, handler in before.items():
            signal.signal(number, handler)


def _is_interrupted(thread: int) -> bool:
    """Whether the thread handles an interruption, or an error that came of one."""
    current = sys._current_exceptions().get(thread)
    error: BaseException | None = current[1] if isinstance(current, tuple) else current  # Python 3.11 has a tuple
    while error is not None and not isinstance(error, INTERRUPTIONS):
        error = error.__context__
    return error is not None
