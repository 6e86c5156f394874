"""Run a pipeline with values from a configuration file and the command line."""

from pathlib import Path
from tempfile import TemporaryDirectory

import click
import yaml

ROOT = Path(__file__).parent


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Instruction data in; a served, measured, traceable GPT-2 out."""


@main.command()
@click.option("--config", default="configs/local.yaml", show_default=True, help="A file of configs/.")
@click.option("--set", "values", multiple=True, metavar="KEY=VALUE", help="E.g. --set lora.rank=16; may be repeated.")
@click.option("--no-cache", is_flag=True, help="Run every step, also those whose result is known.")
def finetune(config: str, values: tuple[str, ...], no_cache: bool) -> None:
    """Data to Bento: split, pretrain or fetch the base, finetune, evaluate, report, promote, package, deploy."""
    from pipelines.config import ConfigError, read_config, set_value  # zenml takes seconds to import; --help should not
    from pipelines.finetune_pipeline import finetune_pipeline

    try:
        values_by_key = read_config(config, finetune_pipeline)
        for assignment in values:
            set_value(values_by_key, assignment, finetune_pipeline)
    except ConfigError as error:
        raise click.ClickException(str(error)) from None
    if no_cache:
        values_by_key["enable_cache"] = False
    with TemporaryDirectory() as directory:
        merged = Path(directory) / Path(config).name
        merged.write_text(yaml.safe_dump(values_by_key))
        run = finetune_pipeline.with_options(config_path=str(merged))()
    if run is not None:  # None: only scheduled
        click.echo(f"{run.name}: {run.status.value}; results in outputs/latest")


if __name__ == "__main__":
    main()
