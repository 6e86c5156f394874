"""Starts a run, after checking everything that can be checked before the first step."""

import logging
from collections.abc import Mapping, Sequence
from inspect import signature
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml
from zenml.models import PipelineRunResponse
from zenml.pipelines.pipeline_definition import Pipeline

from deploy.bento import bentoml_home, check_bentoml_home
from deploy.source import describe_commit
from gpt2core.files import NO_SPACE, free_bytes
from pipelines.artifacts import is_intact
from pipelines.config import read_config, set_values
from pipelines.errors import ConfigError
from pipelines.interrupts import interruptible
from pipelines.notify import notifying_webhook
from pipelines.processes import Process, fail_killed_runs
from pipelines.run_name import check_unused_run_name
from pipelines.stack import check_stack
from pipelines.zenml_compat import (
    INTERRUPTIONS,
    log_failed_steps_once,
    store_directory,
    store_errors_as_one_line,
    verified_cache,
)
from steps.config import BaseConfig, default_learning_rate
from steps.outputs import check_outputs, outputs_dir

logger = logging.getLogger(__name__)


class RunError(Exception):
    """A run that failed or was stopped; the message says why in one line."""


def start(
    pipeline: Pipeline, config_file: str, assignments: Sequence[str] = (), options: Mapping[str, Any] | None = None
) -> PipelineRunResponse | None:
    """Check the configuration, then run the pipeline with it; None if the run was only scheduled.

    Args:
        config_file: a run configuration (YAML).
        assignments: changes of its parameters, in the form `a.b=value`.
        options: other options of `Pipeline.with_options`.

    Raises:
        ConfigError: the configuration, its run_name or the active stack is not usable. Nothing has run.
        RunError: ZenML's database failed, a step failed (ZenML's log of the step has the traceback), or the run was
            stopped.
    """
    config = read_config(config_file, pipeline)
    if assignments:
        set_values(config, assignments, pipeline)
    if {"base", "train"} <= signature(pipeline.entrypoint).parameters.keys() and _finetunes(config):
        _set_learning_rate(config)
    check_unused_run_name(config, config_file)
    try:
        check_outputs()
        check_bentoml_home()
    except (OSError, ValueError) as error:
        raise ConfigError(f"the results cannot be written: {error}") from None
    check_stack(config, config_file)
    # recorded here because a step's container has no git
    record = {"commit": describe_commit().to_json(), "process": Process.current().to_json()}
    try:
        with (
            TemporaryDirectory() as directory,
            interruptible(),
            log_failed_steps_once(),
            store_errors_as_one_line(),
            verified_cache(is_intact),
            notifying_webhook(pipeline.name),
        ):
            checked = Path(directory) / Path(config_file).name
            checked.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
            fail_killed_runs(pipeline.name)
            return pipeline.with_options(config_path=str(checked), extra=record, **(options or {}))()
    except INTERRUPTIONS:
        raise RunError("the run was stopped; the same command continues after the last finished step") from None
    except MemoryError as error:
        raise RunError(f"the run failed: {error}" if str(error) else "there is not enough memory for the run") from None
    except (ValueError, OSError, RuntimeError, ArithmeticError) as error:
        raise RunError(f"the run failed: {error}{_full_disk(error)}") from None


def _full_disk(error: Exception) -> str:
    """Return the free space of all places that a run writes, for a full disk whose error names no file."""
    if not isinstance(error, OSError) or error.errno not in NO_SPACE or error.filename:
        return ""
    places = {"ZenML's store": store_directory(), "results": outputs_dir(), "BentoML's store": bentoml_home()}
    free = ", ".join(f"{free_bytes(path / 'file'):,} for {name} ({path})" for name, path in places.items())
    return f"; bytes free: {free}"


def _finetunes(config: Mapping[str, Any]) -> bool:
    """Whether the run trains an adapter. Sweeps of other kinds than `finetune` do not."""
    return ((config.get("parameters") or {}).get("sweep") or {}).get("kind", "finetune") == "finetune"


def _set_learning_rate(config: dict[str, Any]) -> None:
    """Set the default of train.learning_rate, which depends on the base."""
    parameters = config.get("parameters") or {}
    if "learning_rate" in (parameters.get("train") or {}):
        return
    base = BaseConfig(**{key: value for key, value in (parameters.get("base") or {}).items() if key != "pretrain"})
    rate = default_learning_rate(base)
    logger.info("train.learning_rate: %g, the default for a base with source %s", rate, base.source)
    config["parameters"] = parameters | {"train": (parameters.get("train") or {}) | {"learning_rate": rate}}
