"""Records the process of a run with the run, so that a later run can recognize runs whose process was killed."""

import os
import socket
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import psutil
from zenml.client import Client
from zenml.enums import ExecutionStatus

from deploy.containers import steps as containers
from gpt2core.types import JsonDataclass
from pipelines.zenml_compat import mark_failed

UNFINISHED = (ExecutionStatus.INITIALIZING, ExecutionStatus.RUNNING)


@dataclass(frozen=True)
class Process(JsonDataclass):
    """A process. The start time distinguishes it from a later process with the same id."""

    host: str  # name and namespace of process ids: containers can have the name of their host
    pid: int
    started: str  # see `_started`

    @classmethod
    def current(cls) -> Self:
        return cls(_host(), os.getpid(), _started(os.getpid()))

    def has_ended(self) -> bool:
        """Whether the process has ended; False for a process of another machine, which is unknown."""
        if self.host != _host():
            return False
        try:
            return _started(self.pid) != self.started
        except (psutil.NoSuchProcess, FileNotFoundError, ProcessLookupError):
            return True


def _host() -> str:
    namespace = Path("/proc/self/ns/pid")  # a link, on Linux
    return f"{socket.gethostname()} {os.readlink(namespace)}" if namespace.is_symlink() else socket.gethostname()


def _started(pid: int) -> str:
    """Return a text that identifies the start of the process.

    On Linux, psutil's time of the start moves with the system clock. Boot and clock ticks since it do not.
    """
    if not sys.platform.startswith("linux"):
        return str(psutil.Process(pid).create_time())
    fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()  # the name before may contain spaces
    return f"{Path('/proc/sys/kernel/random/boot_id').read_text(encoding='ascii').strip()} {int(fields[19])}"


def _was_killed(recorded: object) -> bool:
    try:
        return isinstance(recorded, dict) and Process.from_json(recorded).has_ended()
    except ValueError:  # recorded by an older version of this project
        return False


def fail_killed_runs(pipeline: str) -> None:
    """Mark unfinished runs of the pipeline as failed if their process has ended, and remove their containers."""
    for status in UNFINISHED:
        for run in Client().list_pipeline_runs(pipeline=pipeline, status=status, size=100, hydrate=True).items:
            if _was_killed(run.config.extra.get("process")):
                containers.remove_run(str(run.id))  # first: a stopped step still records its own status
                mark_failed(run, "the process of the run was killed")
