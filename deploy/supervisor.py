"""Run a command that ends when its parent process ends: `python supervisor.py COMMAND ARGUMENT...`.

Standard input is a pipe from that process. SIGTERM is forwarded to the command. When the pipe is closed, because the
parent closed it or died, the command and all its descendants are killed. A process group would not be enough, because
BentoML 1.4 starts each worker in its own session.
"""

import os
import signal
import subprocess
import sys
from contextlib import suppress
from threading import Lock, Thread

import psutil

_KILLING = Lock()


def main(command: list[str]) -> int:
    """Run the command; return its exit code, or 128 + n if signal n ended it, as a shell does."""
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL)  # noqa: S603 (no shell)
    signal.signal(signal.SIGTERM, lambda *_: child.terminate())
    Thread(target=_kill_after_parent, daemon=True).start()
    code = child.wait()
    with _KILLING:  # wait: if this process ended now, the killing thread would stop and descendants would survive
        return code if code >= 0 else 128 - code


def _kill_after_parent() -> None:
    os.read(sys.stdin.fileno(), 1)  # returns when the parent's end of the pipe is closed
    with _KILLING:
        for process in psutil.Process().children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                process.kill()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
