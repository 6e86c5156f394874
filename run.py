"""Run a pipeline with values from a configuration file and the command line."""

import logging
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click
import yaml


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Instruction data in; a served, measured, traceable GPT-2 out."""


@main.command()
@click.option("--config", default="configs/local.yaml", show_default=True, help="A file of configs/.")
@click.option("--set", "values", multiple=True, metavar="KEY=VALUE", help="E.g. --set lora.rank=16; may be repeated.")
@click.option("--no-cache", is_flag=True, help="Run every step, also those whose result is known.")
def finetune(config: str, values: tuple[str, ...], no_cache: bool) -> None:
    """Data to Bento: split, pretrain or fetch the base, finetune, evaluate, report, promote, package, deploy."""
    # here, since zenml takes seconds to import and --help should not
    from pipelines.config import ConfigError, read_config, set_values
    from pipelines.finetune_pipeline import finetune_pipeline
    from pipelines.stack import check_stack

    try:
        values_by_key = read_config(config, finetune_pipeline)
        if values:
            set_values(values_by_key, values, finetune_pipeline)
        check_stack(values_by_key, config)
    except ConfigError as error:
        raise click.ClickException(str(error)) from None
    if no_cache:
        values_by_key["enable_cache"] = False
    with TemporaryDirectory() as directory:
        merged = Path(directory) / Path(config).name
        merged.write_text(yaml.safe_dump(values_by_key))
        run = _run(finetune_pipeline.with_options(config_path=str(merged)))
    if run is not None:  # None: only scheduled
        click.echo(f"{run.name}: {run.status.value}; results in outputs/latest")


@main.command()
@click.argument("instruction", required=False)
@click.option("--input", default="", help="What the instruction is about, if it is not part of it.")
@click.option("--file", help="Questions instead: .jsonl or .json, of objects with an instruction and maybe an input.")
@click.option("--run", "name", default="latest", show_default=True, help="A folder of outputs/.")
@click.option("--max-new-tokens", type=int, help="Of an answer.")
@click.option("--temperature", type=float, help="0, the default, is greedy.")
@click.option("--seed", type=int, help="Makes sampled answers repeatable.")
def ask(instruction: str | None, input: str, file: str | None, name: str, **sampling: float | None) -> None:
    """Answer INSTRUCTION, or a file of them as JSON lines, by a finished run's model, without a server."""
    if (instruction is None) == (file is None):
        raise click.UsageError("one of INSTRUCTION and --file is wanted")
    if file is not None and input:
        raise click.UsageError("--input goes with INSTRUCTION; in a file each question has its own")
    from steps.ask import Asker, read_questions

    try:
        if file is None:
            for text in Asker(name, sampling).stream(instruction or "", input):
                click.echo(text, nl=False)
            click.echo()
        else:
            questions = read_questions(file)
            for line in Asker(name, sampling).answer(questions):
                click.echo(line)
    except (ValueError, OSError, RuntimeError) as error:
        raise click.ClickException(str(error)) from None


@main.command()
@click.argument("name")
def lineage(name: str) -> None:
    """Print what NAME belongs to, from data to pod.

    NAME is a run's name or id, a model version (gpt2-instruct/3), a Bento's tag, or the start of the sha256 of a data
    split or an adapter: as in lineage.json, at /metadata, and in a pod's annotations.
    """
    from steps.lineage import LineageError, trace

    try:
        click.echo(trace(name))
    except LineageError as error:
        raise click.ClickException(str(error)) from None


@main.command()
def rollback() -> None:
    """Bring back the service that answered before the last deployment."""
    from steps.deploy import rollback as bring_back

    try:
        outcome = bring_back()
    except RuntimeError as error:
        raise click.ClickException(str(error)) from None
    click.echo("\n".join(f"{name}: {value}" for name, value in outcome.to_json().items() if value))


@main.command()
@click.argument("which", type=click.Choice(["service", "steps"]))
def image(which: str) -> None:
    """Build the image of the newest run's service, or of the pipeline's steps; print its tag.

    BASE_IMAGE, BUILD_IMAGE, TORCH_INDEX and BUILD_NETWORK of the environment choose what it is made from.
    """
    from deploy import bento
    from deploy.containers import images
    from deploy.containers.client import EngineError
    from gpt2core.checkpoint import atomic_write
    from steps.outputs import outputs_dir

    logging.basicConfig(format="%(message)s")
    logging.getLogger(images.__name__).setLevel(logging.DEBUG)
    newest = outputs_dir() / "latest" / "bento.txt"
    if which == "service" and not newest.is_file():
        raise click.ClickException("there is no Bento yet; make run builds one")
    try:
        built = images.build_steps() if which == "steps" else images.build_service(newest.read_text().strip())
    except (bento.BentoError, EngineError) as error:
        raise click.ClickException(str(error)) from None
    sbom = outputs_dir() / "images" / f"{built.reference.replace(':', '-')}.cdx.json"
    atomic_write(sbom, built.sbom)
    click.echo(f"SBOM: {sbom}\n{built.reference}")


def _run(pipeline: Any) -> Any:
    """Run it; what a step cannot go on with is one line here, and its traceback is in ZenML's record of the step."""
    orchestrator = logging.getLogger("zenml.orchestrators.local.local_orchestrator")
    orchestrator.addFilter(_without_traceback)
    try:
        return pipeline()
    except (ValueError, OSError, RuntimeError, ArithmeticError) as error:
        raise click.ClickException(f"the run failed: {error}") from None
    finally:
        orchestrator.removeFilter(_without_traceback)


def _without_traceback(record: logging.LogRecord) -> bool:
    record.exc_info = None
    return True


if __name__ == "__main__":
    main()
