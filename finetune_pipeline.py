"""The module that `zenml pipeline run finetune_pipeline` imports."""

from typing import Any

import click
from zenml.logger import init_logging

from pipelines.colors import set_colors
from pipelines.errors import ConfigError
from pipelines.finetune_pipeline import finetune_pipeline
from pipelines.start import RunError, start
from pipelines.zenml_compat import PipelineSource, replace_module

DEFAULT_CONFIG = "configs/local.yaml"


def run(config_path: str | None, options: dict[str, Any]) -> None:
    set_colors()
    init_logging()  # again: `zenml` has set it up
    try:
        start(finetune_pipeline, config_path or DEFAULT_CONFIG, options=options)
    except (ConfigError, RunError) as error:
        raise click.ClickException(str(error)) from None


replace_module(__name__, PipelineSource(finetune_pipeline, run))
