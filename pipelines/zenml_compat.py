"""Workarounds for ZenML 0.98.0, each with its reason. Tested in tests/pipelines/test_zenml_compat.py."""

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from zenml.pipelines.pipeline_definition import Pipeline


class PipelineSource(Pipeline):
    """A pipeline that `zenml pipeline run` starts through `run` instead of directly.

    The command calls `with_options(config_path=...)` on what it imports, then the result, with no hook in between to
    check the file: ZenML ignores most misspelt keys.
    """

    def __init__(self, pipeline: Pipeline, run: Callable[[str | None, dict[str, Any]], None]) -> None:
        """
        Args:
            run: called with the config path (None: not given) and the other options of the command.
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
def no_step_tracebacks() -> Iterator[None]:
    """Log a failed step as one line.

    The local orchestrator logs the exception with its traceback and raises it too, so the user would see it twice.
    """
    logger = logging.getLogger("zenml.orchestrators.local.local_orchestrator")
    logger.addFilter(_drop_traceback)
    try:
        yield
    finally:
        logger.removeFilter(_drop_traceback)


def _drop_traceback(record: logging.LogRecord) -> bool:
    record.exc_info = None
    return True
