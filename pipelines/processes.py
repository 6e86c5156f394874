"""Records the process of a run with the run, so that a later run can recognize runs whose process was killed."""

import os
import socket
from dataclasses import dataclass
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

    host: str
    pid: int
    started: float  # seconds since the epoch

    @classmethod
    def current(cls) -> Self:
        return cls(socket.gethostname(), os.getpid(), psutil.Process().create_time())

    def has_ended(self) -> bool:
        """Whether the process has ended; False for a process of another machine, which is unknown."""
        if self.host != socket.gethostname():
            return False
        try:
            return abs(psutil.Process(self.pid).create_time() - self.started) > 1
        except psutil.NoSuchProcess:
            return True


def fail_killed_runs(pipeline: str) -> None:
    """Mark unfinished runs of the pipeline as failed if their process has ended, and remove their containers."""
    for status in UNFINISHED:
        for run in Client().list_pipeline_runs(pipeline=pipeline, status=status, size=100, hydrate=True).items:
            recorded = run.config.extra.get("process")
            if isinstance(recorded, dict) and Process.from_json(recorded).has_ended():
                containers.remove_run(str(run.id))  # first: a stopped step still records its own status
                mark_failed(run, "the process of the run was killed")
