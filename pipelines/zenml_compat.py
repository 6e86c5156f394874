"""Workarounds for ZenML 0.98.0, each with its reason. Tested in tests/pipelines/test_zenml_compat.py."""

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock
from sqlalchemy.exc import SQLAlchemyError
from zenml.client import Client
from zenml.enums import ExecutionStatus
from zenml.exceptions import RunInterruptedException
from zenml.models import (
    ArtifactVersionResponse,
    PipelineRunResponse,
    PipelineRunUpdate,
    StepRunResponse,
    StepRunUpdate,
)
from zenml.orchestrators import cache_utils
from zenml.pipelines.pipeline_definition import Pipeline
from zenml.utils.io_utils import get_global_config_directory
from zenml.utils.time_utils import utc_now

from gpt2core.files import free_bytes, naming_file

logger = logging.getLogger(__name__)
# Exceptions that interrupt a step: of Python's handler of Ctrl-C, and of ZenML's handler of SIGINT and SIGTERM
INTERRUPTIONS = (KeyboardInterrupt, RunInterruptedException)


class StoreError(RuntimeError):
    """ZenML's database cannot be read or written. The message has one line and says where the database is."""


@contextmanager
def store_errors_as_one_line() -> Iterator[None]:
    """Context manager: convert errors of ZenML's database to StoreError. They would print a hundred lines."""
    try:
        yield
    except SQLAlchemyError as error:
        reason = str(getattr(error, "orig", None) or error).splitlines()[0]
        if "disk is full" in reason:
            advice = f"free some space there ({free_bytes(store_directory() / 'zenml.db'):,} bytes free)"
        else:
            advice = (
                "end other commands that use it. If it is damaged, restore it or move that directory away: the next "
                "run makes a new one"
            )
        raise StoreError(f"ZenML's database below {store_directory()} failed: {reason}; {advice}") from None


def store_directory() -> Path:
    """Return the directory of ZenML's database and, on the default stack, its artifacts."""
    return Path(get_global_config_directory())


def open_store() -> None:
    """Open ZenML's store. The first use creates its database, so only one process at a time opens it.

    If two processes create the same tables, one of them fails with "The database has never been migrated".

    Raises:
        StoreError: the database is damaged or locked, or its directory or the project's .zen cannot be written.
        KeyError: the active project or stack does not exist.
    """
    directory = store_directory()
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with FileLock(directory / "first-use.lock"), store_errors_as_one_line(), naming_file(directory):
            client = Client()
            _ = client.zen_store, client.active_project, client.active_stack_model
    except OSError as error:
        if error.filename is None or Path(error.filename).is_relative_to(directory):
            problem = f"ZenML's store in {directory} cannot be written: {error}; free some space, allow writing there"
            raise StoreError(f"{problem}, or set ZENML_CONFIG_PATH to another directory") from None
        problem = f"ZenML cannot write to the project: {error}"
        raise StoreError(f"{problem}; run a copy of the project that you may write to") from None


class PipelineSource(Pipeline):
    """A pipeline that `zenml pipeline run` starts through `run` instead of directly.

    The command calls `with_options(config_path=...)` of the imported object, and then the result. There is no hook in
    between to check the file, and ZenML ignores most misspelled keys.
    """

    def __init__(self, pipeline: Pipeline, run: Callable[[str | None, dict[str, Any]], None]) -> None:
        """
        Args:
            run: called with the config path (None if it was not given) and the other options of the command.
        """
        super().__init__(name=pipeline.name, entrypoint=pipeline.entrypoint)
        self._start = run

    def with_options(  # type: ignore[override]
        self, config_path: str | None = None, **options: Any
    ) -> Callable[[], None]:
        return lambda: self._start(config_path, options)


def replace_module(name: str, source: PipelineSource) -> None:
    """Make `import name` return the pipeline source.

    `zenml pipeline run NAME` without a dot imports the module NAME and requires it to be the pipeline itself.
    """
    sys.modules[name] = source  # type: ignore[assignment]


@contextmanager
def log_failed_steps_once() -> Iterator[None]:
    """Context manager: log a failed step in one line, and an interruption of a step or before it not at all.

    The local orchestrator logs the exception with its traceback and also raises it, so the user would see it twice.
    """
    orchestrator, launcher = (
        logging.getLogger(f"zenml.orchestrators.{name}") for name in ("local.local_orchestrator", "step_launcher")
    )
    orchestrator.addFilter(_drop_traceback)
    launcher.addFilter(_is_no_interruption)
    try:
        yield
    finally:
        orchestrator.removeFilter(_drop_traceback)
        launcher.removeFilter(_is_no_interruption)


def _drop_traceback(record: logging.LogRecord) -> bool:
    logged = _is_no_interruption(record)
    record.exc_info = None
    return logged


def _is_no_interruption(record: logging.LogRecord) -> bool:
    values = (*(record.args if isinstance(record.args, tuple) else ()), *(record.exc_info or ()))
    return not any(isinstance(value, INTERRUPTIONS) for value in values)


@contextmanager
def verified_cache(is_intact: Callable[[str, ArtifactVersionResponse], bool]) -> Iterator[None]:
    """Context manager: use a cached step only if all its artifacts are intact, and run it again otherwise.

    ZenML does not check the artifacts of cached steps. With a damaged artifact, every run would fail in a later step.

    Args:
        is_intact: function of the name of an output and its artifact.
    """
    find = cache_utils.get_cached_step_run

    def find_intact(cache_key: str) -> StepRunResponse | None:
        step_run = find(cache_key)
        if step_run is None:
            return None
        for name, versions in step_run.outputs.items():
            for version in versions:
                if not is_intact(name, version):
                    message = "step %s runs again: its cached artifact %s (%s) is missing or damaged"
                    logger.warning(message, step_run.name, name, version.uri)
                    return None
        return step_run

    cache_utils.get_cached_step_run = find_intact
    try:
        yield
    finally:
        cache_utils.get_cached_step_run = find


def mark_failed(run: PipelineRunResponse, reason: str) -> None:
    """Set a run and its unfinished steps to failed. ZenML leaves them "running" if their process was killed."""
    store = Client().zen_store
    for step in run.steps.values():
        if not step.status.is_finished:
            store.update_run_step(step.id, StepRunUpdate(status=ExecutionStatus.FAILED, end_time=utc_now()))
    store.update_run(run.id, PipelineRunUpdate(status=ExecutionStatus.FAILED, status_reason=reason))
