"""Results of a sweep: results.json, a Markdown table, a plot by matplotlib, and a page with all of them."""

import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import date
from io import StringIO
from pathlib import Path

from markupsafe import Markup
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from gpt2core.files import atomic_write, json_bytes
from gpt2core.trials import Trial
from steps.adapters.pages import render
from steps.config import TRIAL_METRICS, SweepConfig


def write_sweep(trials: Sequence[Trial], sweep: SweepConfig, directory: Path) -> None:
    """Write results.json (every trial), table.md, plot.svg and report.html, which is self-contained."""
    by_label: dict[str, list[Trial]] = {}
    for trial in trials:
        by_label.setdefault(trial.label, []).append(trial)
    rows = {label: [_spread(runs, metric) for metric in sweep.metrics] for label, runs in by_label.items()}
    plot = _plot(by_label, sweep.metrics[0])
    machines = sorted({trial.machine for trial in trials})
    about = {"date": date.today().isoformat(), "machine": ", ".join(machines), **asdict(sweep)}
    results = {label: [trial.to_json() for trial in runs] for label, runs in by_label.items()}
    page = render(
        "sweep.html.j2",
        sweep=sweep,
        rows=rows,
        meanings=TRIAL_METRICS[sweep.kind],
        plot=Markup(plot[plot.index("<svg") :]),  # noqa: S704 - drawn by matplotlib, which escapes its texts
        samples=[trial for trial in trials if trial.sample],
        machines=machines,
    )
    atomic_write(directory / "results.json", json_bytes({**about, "results": results}))
    atomic_write(directory / "table.md", _table(sweep, rows).encode())
    atomic_write(directory / "plot.svg", plot.encode())
    atomic_write(directory / "report.html", page.encode())


def _spread(trials: Sequence[Trial], metric: str) -> str:
    """Format mean ± standard deviation over the seeds, or the only value."""
    measured = [value for trial in trials if (value := trial.metrics[metric]) is not None]
    if not measured:
        return "none"
    spread = f" ± {_rounded(statistics.stdev(measured), 2)}" if len(measured) > 1 else ""
    missing = f" ({len(trials) - len(measured)} of {len(trials)} without)" if len(measured) < len(trials) else ""
    return f"{_rounded(statistics.mean(measured), 4)}{spread}{missing}"


def _rounded(value: float, digits: int) -> str:
    """The value with this many significant digits, but with all digits before the decimal point."""
    return f"{value:.{digits}g}" if abs(value) < 10**digits else f"{value:.0f}"


def _table(sweep: SweepConfig, rows: Mapping[str, Sequence[str]]) -> str:
    lines = [f"| {_cell(sweep.variable)} | {' | '.join(sweep.metrics)} |", "|---" * (len(sweep.metrics) + 1) + "|"]
    lines += [f"| {_cell(label)} | {' | '.join(cells)} |" for label, cells in rows.items()]
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    """Escape a text for a cell of a Markdown table."""
    return re.sub(r"([\\|])", r"\\\1", " ".join(text.splitlines()))


def _plot(trials: Mapping[str, Sequence[Trial]], metric: str) -> str:
    """Plot losses by step (one line per seed; if trials have them) and the metric by variant (one point per seed)."""
    figure = Figure(figsize=(9, 3.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    curves: dict[str, Line2D] = {}  # the first curve of each variant, for the legend
    for i, (label, runs) in enumerate(trials.items()):
        for trial in runs:
            if trial.curve:
                steps, losses = zip(*trial.curve, strict=True)
                [curve] = left.plot(steps, losses, color=f"C{i % 10}", linewidth=1)
                curves.setdefault(label, curve)
            if (value := trial.metrics[metric]) is not None:
                right.plot(value, i, "o", color=f"C{i % 10}", alpha=0.6)
    if curves:
        # Set the texts afterwards: legend() would parse $ as mathtext and ignore labels that start with _
        legend = left.legend(list(curves.values()), [""] * len(curves), fontsize="x-small")
        for text, label in zip(legend.get_texts(), curves, strict=True):
            text.set(text=label, parse_math=False)
        left.set(xlabel="step", ylabel="loss (nats per token)")
    else:
        figure.delaxes(left)
    right.set_yticks(range(len(trials)), list(trials), fontsize="x-small", parse_math=False)
    right.invert_yaxis()  # the first variant is at the top, as in the table
    right.set_xlabel(metric)
    svg = StringIO()
    figure.savefig(svg, format="svg")
    return svg.getvalue()
