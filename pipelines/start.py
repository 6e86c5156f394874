"""The start of a run: everything that is known before the first step is checked and recorded here."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml
from zenml.models import PipelineRunResponse
from zenml.pipelines.pipeline_definition import Pipeline

from deploy.source import describe_commit
from pipelines.config import read_config, set_values
from pipelines.stack import check_stack
from pipelines.zenml_compat import no_step_tracebacks


class RunError(Exception):
    """A run that failed; the message is that of the failed step."""


def start(
    pipeline: Pipeline, config_file: str, assignments: Sequence[str] = (), options: Mapping[str, Any] | None = None
) -> PipelineRunResponse | None:
    """Check the configuration, then run the pipeline with it; None if the run was only scheduled.

    Args:
        config_file: a run configuration (YAML).
        assignments: `a.b=value`, changes to its parameters.
        options: further options of `Pipeline.with_options`.

    Raises:
        ConfigError: the configuration or the active stack is not usable; nothing has run.
        RunError: a step failed. Its traceback is in ZenML's logs of the step.
    """
    config = read_config(config_file, pipeline)
    if assignments:
        set_values(config, assignments, pipeline)
    check_stack(config, config_file)
    with TemporaryDirectory() as directory:
        checked = Path(directory) / Path(config_file).name
        checked.write_text(yaml.safe_dump(config))
        commit = {"commit": describe_commit().to_json()}  # here, because a step's container has no git
        configured = pipeline.with_options(config_path=str(checked), extra=commit, **(options or {}))
        try:
            with no_step_tracebacks():
                return configured()
        except (ValueError, OSError, RuntimeError, ArithmeticError) as error:
            raise RunError(f"the run failed: {error}") from None
