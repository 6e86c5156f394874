"""The command line. Each command imports what it needs, so that --help does not wait seconds for zenml."""

import gc
import logging
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

try:
    import click
except ModuleNotFoundError:
    sys.exit("Error: this Python lacks the project's packages; run `make install`, then `source .venv/bin/activate`")

from pipelines.colors import set_colors

if TYPE_CHECKING:
    from zenml.models import PipelineRunResponse


class Finite(click.FloatRange):
    """A click.FloatRange that rejects nan and infinity."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number = super().convert(value, param, ctx)
        if not isfinite(number):
            self.fail(f"{number} is not a finite number.", param, ctx)
        return number


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Finetune GPT-2 on instruction data; evaluate, package, deploy and monitor the result."""
    set_colors()


def run_options(default: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Return a decorator that adds the options of the commands that run a pipeline.

    Args:
        default: path of the default configuration, relative to the checkout.
    """
    path = os.path.relpath(Path(__file__).parent / default)

    def add(command: Callable[..., None]) -> Callable[..., None]:
        for option in (
            click.option("--no-cache", is_flag=True, help="Run every step, also those in ZenML's cache."),
            click.option(
                "--set",
                "values",
                multiple=True,
                metavar="KEY=VALUE",
                help="Set a parameter, e.g. seed=1; VALUE is YAML; repeatable.",
            ),
            click.option("--config", default=path, show_default=default, help="A run configuration (YAML)."),
        ):
            command = option(command)
        return command

    return add


@main.command()
@run_options("configs/local.yaml")
def finetune(config: str, values: tuple[str, ...], no_cache: bool) -> None:
    """Split the data, prepare the base, finetune, evaluate, compare, report, package, promote, deploy."""
    run = _start("finetune_pipeline", config, values, no_cache)
    if run is not None:
        from steps.outputs import outputs_dir

        click.echo(f"{run.name}: {run.status.value}; results in {outputs_dir() / 'latest'}")


@main.command()
@run_options("configs/monitor.yaml")
@click.option("--exit-code", is_flag=True, help="Exit with 3 if traffic has drifted, for scripts.")
def monitor(config: str, values: tuple[str, ...], no_cache: bool, exit_code: bool) -> None:
    """Compare the service's request log with the run that is served; report and alert if traffic has drifted."""
    run = _start("monitor_pipeline", config, values, no_cache)
    if run is not None:
        from steps.monitor import report_directory

        drift = run.steps["detect_drift"].outputs["drift"][0].load()
        click.echo(f"{drift.verdict}\n{report_directory(run.name) / 'drift.html'}")
        if exit_code and drift.drifted:
            raise SystemExit(3)


@main.command()
@run_options("configs/pretrain.yaml")
def pretrain(config: str, values: tuple[str, ...], no_cache: bool) -> None:
    """Pretrain a GPT-2 on a text; the result can be the base of `finetune`."""
    run = _start("pretrain_pipeline", config, values, no_cache)
    if run is not None:
        from steps.outputs import outputs_dir

        name = shlex.quote(f"base.name={outputs_dir() / run.name / 'base'}")
        click.echo(f"{run.name}: {run.status.value}; use it with --set base.source=hub --set {name}")


@main.command()
@run_options("configs/experiments/rank_sweep.yaml")
def sweep(config: str, values: tuple[str, ...], no_cache: bool) -> None:
    """Train and score every variant of the sweep with every seed, and compare them."""
    name = re.sub(r"[^\w.-]+", "_", Path(config).stem)
    run = _start("sweep_pipeline", config, (f"sweep.name={name!r}", *values), no_cache)
    if run is not None:
        [table], [directory] = (run.steps["compare_trials"].outputs[name] for name in ("table", "directory"))
        click.echo(f"{table.load()}{run.name}: {run.status.value}; results in {directory.load()}")


@main.command()
@click.argument("instruction", required=False)
@click.option("--input", default="", help="Text that the instruction refers to.")
@click.option("--file", help="Read instructions (and inputs) from a .jsonl or .json file instead.")
@click.option("--run", "name", default="latest", show_default=True, help="A run's name, latest, staging or production.")
@click.option("--adapter", help="Directory of another adapter (this project's or PEFT's format) for the run's base.")
@click.option("--accept-other-base", is_flag=True, help="Use the adapter although it was trained on another base.")
@click.option("--max-new-tokens", type=int, help="Maximum length of an answer.")
@click.option("--temperature", type=float, help="0 (default): greedy.")
@click.option("--top-k", type=int, help="Sample from this many most likely tokens only.")
@click.option("--top-p", type=float, help="Sample from the most likely tokens of this total probability only.")
@click.option("--seed", type=int, help="Makes sampled answers reproducible.")
def ask(
    instruction: str | None,
    input: str,
    file: str | None,
    name: str,
    adapter: str | None,
    accept_other_base: bool,
    **sampling: float | None,
) -> None:
    """Answer INSTRUCTION, or a file of instructions, with the model of a finished run; no server needed."""
    if (instruction is None) == (file is None):
        raise click.UsageError("pass either INSTRUCTION or --file")
    if file is not None and input:
        raise click.UsageError("--input goes with INSTRUCTION; in a file, each record has its own")
    _check_stages(name)
    from commands.ask import TunedModel, read_questions

    with _errors_as_one_line():
        if file is None:
            for text in TunedModel(name, sampling, adapter, accept_other_base).stream(instruction or "", input):
                click.echo(text, nl=False)
            click.echo()
        else:
            questions = read_questions(file)
            for line in TunedModel(name, sampling, adapter, accept_other_base).answer(questions):
                click.echo(line)


@main.command()
@click.option("--format", "kind", type=click.Choice(["peft", "hf", "gguf"]), required=True, help="Format of the files.")
@click.option("--out", required=True, help="A new or empty directory.")
@click.option("--run", "name", default="latest", show_default=True, help="A run's name, latest, staging or production.")
@click.option("--quantize", type=click.Choice(["f16", "q8_0"]), help="Type of matrices in a GGUF file; default f32.")
@click.option("--dtype", type=click.Choice(["fp16", "bf16"]), help="Type of the weights of hf; default fp32.")
@click.option(
    "--multi-turn",
    type=click.Choice(["last", "history"]),
    help="Earlier turns in the chat template: ignored (last, the default), or used as input (history).",
)
def export(kind: str, out: str, name: str, quantize: str | None, dtype: str | None, multi_turn: str | None) -> None:
    """Export the model of a finished run.

    peft: the adapter, for PEFT. hf: the base with the adapter merged, and the tokenizer, for transformers, vLLM and
    others. gguf: the merged model as one file for llama.cpp, and the adapter as another.
    """
    if quantize is not None and kind != "gguf":
        raise click.UsageError("--quantize goes with --format gguf")
    if dtype is not None and kind != "hf":
        raise click.UsageError("--dtype goes with --format hf")
    if multi_turn is not None and kind == "peft":
        raise click.UsageError("--multi-turn goes with --format hf or gguf: peft has no chat template")
    _check_stages(name)
    from commands.export import export as write

    with _errors_as_one_line():
        files = write(kind, Path(out), name, quantize or "f32", multi_turn == "history", dtype or "fp32")
        click.echo("\n".join(map(str, files)))


@main.command()
@click.option("--from-feedback", "log", required=True, metavar="LOG", help="The request log (GPT2_REQUEST_LOG).")
@click.option("--out", type=Path, required=True, help="A .jsonl file; its existing records are kept.")
def records(log: str, out: Path) -> None:
    """Turn users' corrections into instruction records, for --set data.source=file."""
    from commands.records import collect
    from steps.traffic import summary

    with _errors_as_one_line():
        collected = collect(log, out)
    if collected.problems:
        click.echo(f"not used:\n{summary(collected.problems)}", err=True)
    click.echo(f"{out}: {collected.records} records, {collected.changed} of them new or changed")


@main.command()
@click.argument("name")
def lineage(name: str) -> None:
    """Print the lineage of NAME as a tree, from data to deployment.

    NAME is a run's name or id, latest, staging or production, a model version (gpt2-instruct/3), a Bento's tag, or the
    start of the sha256 of a data part or an adapter, as shown in lineage.json, at /metadata and in a pod's annotations.
    """
    _open_store()
    _check_stages(name)
    from commands.lineage.trace import trace
    from commands.stage_link import linked_run

    with _errors_as_one_line():
        click.echo(trace(linked_run(name)))


@main.command()
@click.argument("names", nargs=-1, required=True)
def compare(names: tuple[str, ...]) -> None:
    """Compare two or more finished runs: configuration, scores with intervals, changed answers, curves.

    NAMES are names or ids of runs, latest, staging or production. Differences are relative to the first run.
    """
    if len(names) < 2:
        raise click.UsageError("pass at least two runs; `ls outputs` shows their names")
    _open_store()
    _check_stages(*names)
    from commands.compare import compare as compare_runs

    with _errors_as_one_line():
        table, page = compare_runs(names)
    click.echo(f"{table}\n\n{page}")


@main.command()
@click.argument("name")
@click.option("--key", type=Path, help="A public key (PEM, Ed25519): also require a signature by `run.py sign`.")
def verify(name: str, key: Path | None) -> None:
    """Check the integrity of NAME: compare weights, code, lineage and records with their recorded sha256.

    NAME is a directory of outputs/, a Bento's tag, or a pod of the current context's namespace gpt2-instruct.
    """
    _open_store()
    from commands.verify import verify as check

    with _errors_as_one_line():
        click.echo("\n".join(check(name, key)))


@main.command()
@click.argument("directory", type=Path)
@click.option("--key", type=Path, required=True, help="A private key (PEM, Ed25519, without a password).")
def sign(directory: Path, key: Path) -> None:
    """Verify DIRECTORY (of outputs/), then sign its lineage for `run.py verify --key`."""
    _open_store()
    from commands.verify import sign as sign_lineage

    with _errors_as_one_line():
        click.echo(sign_lineage(directory, key))


@main.command()
def rollback() -> None:
    """Roll back the last deployment to the version before it."""
    from pipelines.interrupts import interruptible
    from steps.deploy import rollback as roll_back

    with _errors_as_one_line(), interruptible():
        outcome = roll_back()
    click.echo("\n".join(f"{name}: {value}" for name, value in outcome.to_json().items() if value))


@main.command()
@click.argument("action", type=click.Choice(["start", "status", "promote", "abort", "decide"]))
@click.argument("name", required=False)
@click.option("--url", default="http://localhost:3000", show_default=True, help="URL of one running service.")
@click.option("--path", default="", help="start: directory of the adapter to load, below GPT2_ADAPTERS_DIR.")
@click.option("--share", type=Finite(0, 1), default=0.1, show_default=True, help="start: share of requests.")
@click.option("--shadow", is_flag=True, help="start: the canary only repeats requests; clients do not see its answers.")
@click.option(
    "--max-failures",
    type=Finite(0, 1),
    default=0.01,
    show_default=True,
    help="decide: allowed increase of failed completions.",
)
@click.option(
    "--max-slowdown",
    type=Finite(0),
    default=0.2,
    show_default=True,
    help="decide: allowed increase of the mean duration.",
)
def canary(
    action: str,
    name: str | None,
    url: str,
    path: str,
    share: float,
    shadow: bool,
    max_failures: float,
    max_slowdown: float,
) -> None:
    """Manage a canary, an adapter that gets a share of a running service's requests. Requires GPT2_ADMIN_TOKEN.

    \b
    start NAME  start the canary NAME, or change its share
    status      show the completions of both versions
    promote     send all requests to the canary
    abort       send no requests to the canary, and unload it
    decide      promote or abort if the completions are sufficient evidence
    """
    if (action == "start") == (name is None):
        raise click.UsageError("start needs NAME, the name of the adapter; the other actions take none")
    from commands.canary import Service, decide, describe

    service = Service(url)
    with _errors_as_one_line():
        if action == "decide":
            action, reason = decide(service.status(), max_failures, max_slowdown)
            click.echo(f"{action}: {reason}")
        if action == "start":
            status = service.start(name or "", path, share, shadow)
        else:
            status = {"promote": service.promote, "abort": service.abort}.get(action, service.status)()
    click.echo(describe(status))


@main.command()
@click.argument("directory", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("names", nargs=-1, metavar="NAME=PATH...")
@click.option("--canary", metavar="NAME=SHARE", help="Send this share of the requests for gpt2-instruct to NAME.")
@click.option("--shadow", is_flag=True, help="The canary only repeats requests; clients do not see its answers.")
def adapters(directory: Path, names: tuple[str, ...], canary: str | None, shadow: bool) -> None:
    """Write DIRECTORY/adapters.json: the adapters that services with GPT2_FOLLOW_ADAPTERS=true serve.

    Each PATH is a directory below DIRECTORY. The file contains their current digests.
    """
    from bentos.shared_adapters import publish

    pairs = dict(pair.split("=", 1) for pair in names if re.fullmatch("[^=]+=.+", pair))
    share = re.fullmatch(r"([^=]+)=(\d*\.?\d+)", canary or "")
    if len(pairs) < len(names) or (canary and share is None):
        raise click.UsageError("pass adapters as NAME=PATH with distinct names, and the canary as NAME=SHARE")
    with _errors_as_one_line():
        manifest = publish(directory, pairs, None if share is None else (share[1], float(share[2])), shadow)
    for name, adapter in manifest.adapters.items():
        click.echo(f"{name}: {adapter.sha256}")


@main.command()
@click.argument("which", type=click.Choice(["service", "steps"]))
def image(which: str) -> None:
    """Build the container image of the newest run's service or of the pipeline's steps; print its tag.

    The environment variables BASE_IMAGE, BUILD_IMAGE, TORCH_INDEX and BUILD_NETWORK configure the build.
    """
    from deploy.containers import images
    from gpt2core.files import atomic_write
    from steps.outputs import shared_path

    logging.basicConfig(format="%(message)s")
    logging.getLogger(images.__name__).setLevel(logging.DEBUG)
    newest = shared_path("latest") / "bento.txt"
    if which == "service" and not newest.is_file():
        raise click.ClickException("there is no Bento yet; build one with: make run")
    with _errors_as_one_line():
        if which == "steps":
            built = images.build_steps()
        else:
            built = images.build_service(newest.read_text(encoding="utf-8").strip())
    sbom = shared_path("images") / f"{built.reference.replace(':', '-')}.cdx.json"
    atomic_write(sbom, built.sbom)
    click.echo(f"SBOM: {sbom}\n{built.reference}")


def _start(name: str, config: str, values: tuple[str, ...], no_cache: bool) -> "PipelineRunResponse | None":
    """Run the pipeline with this name; report errors in one line."""
    _open_store()
    from pipelines.errors import ConfigError
    from pipelines.start import RunError, start

    pipeline = getattr(import_module(f"pipelines.{name}"), name)
    with _errors_as_one_line(ConfigError, RunError):
        return start(pipeline, config, values, {"enable_cache": False} if no_cache else {})


@contextmanager
def _errors_as_one_line(*errors: type[Exception]) -> Iterator[None]:
    """Context manager: report these errors, and wrong input or a damaged file, in one line."""
    reported: tuple[type[Exception], ...] = (ValueError, OSError, RuntimeError, *errors)
    try:
        yield
    except BrokenPipeError:  # the reader, such as `head`, has ended: click ends the command without a message
        raise
    except reported as error:
        raise click.ClickException(str(error)) from None


def _open_store() -> None:
    """Open ZenML's store before importing steps, which opens it too, but reports errors in hundreds of lines."""
    if not os.path.isabs(os.path.expanduser("~")):  # libraries would make a directory named ~
        raise click.ClickException("this user has no home directory; set the environment variable HOME to a directory")
    with _errors_as_one_line(KeyError):  # which ZenML raises for wrong values of its environment variables
        from pipelines.zenml_compat import open_store

        open_store()


def _check_stages(*names: str) -> None:
    """Check the names that are stages. Loads ZenML only if there is such a name."""
    stages = {"staging", "production"}.intersection(names)
    if not stages:
        return
    _open_store()
    from commands.stage_link import check_stage_link

    with _errors_as_one_line():
        for stage in sorted(stages):
            check_stage_link(stage)


def _replace_closed_streams() -> None:
    """Connect closed standard streams (`>&-`) to /dev/null: libraries write to them, and their next file would be 1."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            null = open(os.devnull, "w" if number else "r", encoding="utf-8")  # noqa: SIM115
            os.dup2(null.fileno(), number)
            os.set_inheritable(number, True)
            setattr(sys, name, null)


if __name__ == "__main__":
    _replace_closed_streams()
    logging.raiseExceptions = (
        False  # no traceback for each log line if the reader of the log, such as `head`, has ended
    )
    try:
        main()
    except MemoryError:
        sys.exit("Error: there is not enough memory")
    finally:
        gc.freeze()  # Python's last garbage collection takes 3 s with torch and ZenML loaded
