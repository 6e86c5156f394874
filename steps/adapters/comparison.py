"""The HTML page that compares runs (jinja2, autoescaped, with plotly's curves)."""

from dataclasses import dataclass
from pathlib import Path

import plotly.graph_objects as go
from markupsafe import escape

from gpt2core.files import atomic_write
from gpt2core.metrics import METRICS
from gpt2core.types import Difference, Sample
from steps.adapters.pages import render


@dataclass(frozen=True)
class ComparedRun:
    """A run's configuration, and the tuned model's answers to the test records that all compared runs share."""

    name: str
    values: dict[str, str]  # configuration and data, by dotted key
    samples: list[Sample]
    scores: dict[str, tuple[float, list[float]]]  # score and 95 % interval, by metric
    history: list[dict[str, float]]


@dataclass(frozen=True)
class Compared:
    """The comparison of the first run with the others."""

    runs: list[ComparedRun]
    changed_values: dict[str, list[str]]  # key in which the runs differ -> the value of each run
    differences: list[dict[str, Difference]]  # for each other run: metric -> difference to the first run
    changed_answers: list[list[Sample]]  # for each record that some but not all runs answer correctly: all samples


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
