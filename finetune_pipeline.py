"""What `zenml pipeline run finetune_pipeline` imports: the pipeline, with its configuration checked before it runs."""

import sys

import click

from pipelines.config import ConfigError, read_config
from pipelines.finetune_pipeline import finetune_pipeline
from pipelines.stack import check_stack

DEFAULT_CONFIG = "configs/local.yaml"

_context = click.get_current_context(silent=True)
if _context is not None:  # run by zenml's command line; an import by anything else gets the plain pipeline
    _file = _context.params.get("config_path")
    try:
        check_stack(read_config(_file or DEFAULT_CONFIG, finetune_pipeline), _file or DEFAULT_CONFIG)
    except ConfigError as error:
        raise click.ClickException(str(error)) from None
    if not _file:
        finetune_pipeline = finetune_pipeline.with_options(config_path=DEFAULT_CONFIG)
sys.modules[__name__] = finetune_pipeline  # type: ignore[assignment]
