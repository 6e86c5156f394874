"""The HTML page that compares runs (jinja2, autoescaped, with plotly's curves)."""

from dataclasses import dataclass
from pathlib import Path

import plotly.graph_objects as go
from markupsafe import escape

from gpt2core.checkpoint import atomic_write
from gpt2core.metrics import METRICS
from gpt2core.types import Difference, Sample
from steps.adapters.pages import render


@dataclass(frozen=True)
class ComparedRun:
    """A run's values, and its tuned model's answers to the test records that all compared runs share."""

    name: str
    values: dict[str, str]  # configuration and data, by dotted key
    samples: list[Sample]
    scores: dict[str, tuple[float, list[float]]]  # score and 95 % interval, by metric
    history: list[dict[str, float]]


@dataclass(frozen=True)
class Compared:
    """The first run compared with the others."""

    runs: list[ComparedRun]
    changed_values: dict[str, list[str]]  # keys in which the runs differ: the value of each
    differences: list[dict[str, Difference]]  # of each further run to the first, by metric
    changed_answers: list[list[Sample]]  # by record: all runs' samples, if not all are right or all wrong


def write_comparison(compared: Compared, file: Path) -> Path:
    """Write the page, which is self-contained."""
    figure = go.Figure()
    for run in compared.runs:
        for key, dash in (("train/loss", "dot"), ("val/loss", "solid")):
            points = [(entry["step"], entry[key]) for entry in run.history if key in entry]
            if points:
                steps, values = zip(*points, strict=True)
                name = escape(f"{run.name}, {key}")
                figure.add_trace(go.Scatter(x=steps, y=values, name=name, line_dash=dash))
    figure.update_layout(xaxis_title="optimizer step", yaxis_title="loss, nats per token", legend_orientation="h")
    page = render(
        "comparison.html.j2",
        compared=compared,
        metrics=METRICS,
        curves=figure.to_html(full_html=False, include_plotlyjs=True),
    )
    atomic_write(file, page.encode())
    return file
