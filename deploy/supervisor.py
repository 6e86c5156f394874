"""Run a command that ends when its parent process ends: `python supervisor.py COMMAND ARGUMENT...`.

Standard input is a pipe from that process. SIGTERM is forwarded to the command. When the pipe is closed, because the
parent closed it or died, the command and all its descendants are killed. When the command ends, the descendants that it
leaves are killed too. A process group would not be enough, because BentoML 1.4 starts each worker in its own session.
"""

import ctypes
import os
import signal
import subprocess
import sys
from contextlib import suppress
from threading import Lock, Thread

import psutil

PR_SET_CHILD_SUBREAPER = 36  # Linux: descendants whose parent has died become children of this process

_KILLING = Lock()


def main(command: list[str]) -> int:
    """Run the command; return its exit code, or 128 + n if signal n ended it, as a shell does."""
    with suppress(AttributeError):  # other systems have no prctl
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL)  # noqa: S603 (no shell)
    signal.signal(signal.SIGTERM, lambda *_: child.terminate())
    Thread(target=_kill_after_parent, daemon=True).start()
    code = child.wait()
    _kill_descendants()
    return code if code >= 0 else 128 - code


def _kill_after_parent() -> None:
    os.read(sys.stdin.fileno(), 1)  # returns when the parent's end of the pipe is closed
    _kill_descendants()


def _kill_descendants() -> None:
    with _KILLING:  # `main` waits here: if this process ended, the other thread would stop, and descendants survive
        for process in psutil.Process().children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                process.kill()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
