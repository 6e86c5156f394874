"""Checks a configured `run_name` before anything runs."""

import os
from collections.abc import Mapping
from typing import Any

from zenml.client import Client
from zenml.utils.string_utils import format_name_template

from pipelines.errors import ConfigError
from steps.outputs import check_run_name, outputs_dir

ADVICE = "use another name, or one with {date} and {time}, which ZenML replaces"


def check_unused_run_name(config: Mapping[str, Any], source: str) -> None:
    """Raise ConfigError if `run_name` is not a valid directory name, or if a run or a file in outputs/ has this name.

    Args:
        source: origin of the configuration, for the message.
    """
    template = config.get("run_name")
    if not template:
        return
    try:
        name = format_name_template(template, config.get("substitutions"))
        check_run_name(name)
    # KeyError, IndexError, AttributeError: a wrong placeholder; ValueError: a wrong placeholder or name
    except (KeyError, IndexError, AttributeError, ValueError) as error:
        reason = str(error) if isinstance(error, ValueError) else "only {date}, {time} and `substitutions` are replaced"
        raise ConfigError(f"{source}: run_name is {template!r}: {reason}") from None
    if Client().list_pipeline_runs(name=f"equals:{name}", size=1).total:
        raise ConfigError(f"{source}: run_name is {template!r}, but a run in ZenML's store has this name; {ADVICE}")
    if os.path.lexists(outputs_dir() / name):
        raise ConfigError(f"{source}: run_name is {template!r}, but {outputs_dir() / name} exists; {ADVICE}")
