"""`make bench`: compare this project with its peers in one run."""

import json
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click
import jinja2
from transformers.utils import logging

from benchmarks.groups import GROUPS, prepare
from benchmarks.measure import Row, machine, versions, watch_machine
from gpt2core.config import PRESETS

ROOT = Path(__file__).parent.parent
TEMPLATE = Path(__file__).parent / "performance.md.j2"


@click.command()
@click.option("--only", default=",".join(GROUPS), show_default=True, help="Comma-separated groups.")
@click.option("--runs", default=3, show_default=True, type=click.IntRange(1))
@click.option("--model", "preset", default="gpt2", show_default=True, type=click.Choice(list(PRESETS)))
@click.option("--medium", default="gpt2-medium", show_default=True, type=click.Choice(list(PRESETS)))
@click.option("--new-tokens", default=64, show_default=True, type=click.IntRange(1))
@click.option("--train-steps", default=6, show_default=True, type=click.IntRange(1))
@click.option("--config", default="configs/local.yaml", show_default=True, help="Configuration of the pipeline run.")
@click.option("--out", default=ROOT, type=click.Path(path_type=Path), help="Folder for benchmarks/results and docs.")
def main(
    only: str, runs: int, preset: str, medium: str, new_tokens: int, train_steps: int, config: str, out: Path
) -> None:
    """Measure, print the table, write benchmarks/results/latest.json and docs/performance.md."""
    names = [name.strip() for name in only.split(",") if name.strip()]
    unknown = sorted(set(names) - set(GROUPS))
    if unknown or not names:
        raise click.BadParameter(f"{only!r}: choose from {', '.join(GROUPS)}", param_hint="--only")
    logging.disable_progress_bar()
    about: dict[str, Any] = machine()
    rows: list[Row] = []
    with watch_machine(about), TemporaryDirectory() as scratch:
        for name in names:
            command = f"python -m benchmarks.run --only {name} --runs {runs} --model {preset} --medium {medium}"
            command += f" --new-tokens {new_tokens} --train-steps {train_steps} --config {config}"
            directory = Path(scratch) / name
            setting = prepare(directory, preset, medium, runs, new_tokens, train_steps, config, command)
            rows += GROUPS[name](setting)
            click.echo(f"{name}: done", err=True)
    result = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "model": preset,
        "machine": about,
        "versions": versions(),
        "rows": [row.as_json() for row in rows],
    }
    click.echo(render_table(result["rows"]))
    click.echo(f"{about['processor']} ({', '.join(about['flags'])}), {about['threads']} threads; {idle(about)}")
    _write(out / "benchmarks" / "results" / "latest.json", json.dumps(result, indent=2) + "\n")
    template = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True).from_string(
        TEMPLATE.read_text(encoding="utf-8")
    )
    page = template.render(result, table=render_table(result["rows"]), idle=idle(about))
    _write(out / "docs" / "performance.md", page)


def render_table(rows: Any) -> str:
    """Format the rows as a Markdown table that is also readable in a terminal."""
    head = ["name", "ours", "peer", "ratio", "unit", "limit", "share of limit", "spread"]
    cells = [
        [
            row["name"],
            *(_number(row[key]) for key in ("ours", "peer", "ratio")),
            row["unit"],
            _number(row["limit"]),
            _percent(row["share_of_limit"]),
            _percent(row["spread"]),
        ]
        for row in rows
    ]
    widths = [max(len(line[i]) for line in [head, *cells]) for i in range(len(head))]
    lines = [head, ["-" * width for width in widths], *cells]
    return "\n".join("| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |" for line in lines)


def idle(about: dict[str, Any]) -> str:
    share = about["others_cpu_share"]
    if share is None:
        return f"load before {about['load_before']}; the CPU time of other processes is unknown on this system"
    state = "idle" if share < 0.05 else "NOT idle"
    return f"machine {state}: load before {about['load_before']}, other processes used {share:.1%} of the cores"


def _number(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.0%}"


def _write(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
