"""What finetuning changed, as a page: our own summary (jinja2, everything escaped), Evidently's report, and curves."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd
import plotly.graph_objects as go
from evidently import DataDefinition, Dataset, Report
from evidently.descriptors import Contains, RegExp, TextLength, WordCount
from evidently.metrics import RowCount
from evidently.presets import ValueStats
from plotly.subplots import make_subplots

from gpt2core.checkpoint import atomic_write
from gpt2core.metrics import METRICS
from gpt2core.prompt import RESPONSE

SCORES = ("exact_match", "token_f1", "rouge_l", "nll")  # of each row
DESCRIPTORS = ("characters", "words", "prompt_leaked", "repeats_itself")  # of each answer
REPEATS = r"(?s)\b(\w+)\b(?:\W+\1\b){3}"  # a word four times in a row
N_EXAMPLES = 5
_ENVIRONMENT = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined
)


def write_report(
    rows: Sequence[Mapping[str, Any]], metrics: Mapping[str, Any], directory: Path, title: str
) -> tuple[Path, Path]:
    """Write report.html, which loads nothing from elsewhere, and report.json: {"metrics", "evidently"}.

    Args:
        rows, metrics: as `to_json` of `gpt2core.evaluate.compare_answers`' samples and evaluation.
    """
    right, wrong = ([row for row in rows if row["tuned_exact_match"] == one] for one in (1.0, 0.0))
    best = sorted(right, key=lambda row: (row["base_token_f1"], -row["base_nll"]))
    worst = sorted(wrong, key=lambda row: (row["tuned_token_f1"], -row["tuned_nll"]))
    evidently_page, evidently_json = _evidently(rows)
    page = _ENVIRONMENT.get_template("report.html.j2").render(
        title=title,
        rows=rows,
        metrics=metrics,
        headings=METRICS,
        best=best[:N_EXAMPLES],
        worst=worst[:N_EXAMPLES],
        evidently=evidently_page,
    )
    data = json.dumps(_finite({"metrics": metrics, "evidently": evidently_json}), indent=2, allow_nan=False) + "\n"
    atomic_write(directory / "report.html", page.encode())
    atomic_write(directory / "report.json", data.encode())
    return directory / "report.html", directory / "report.json"


def _evidently(rows: Sequence[Mapping[str, Any]]) -> tuple[str, Any]:
    """Evidently's page and data: how scores and lengths are spread, tuned (current) beside base (reference)."""
    definition = DataDefinition(numerical_columns=list(SCORES), text_columns=["answer"])
    descriptors = [
        TextLength("answer", alias="characters"),
        WordCount("answer", alias="words"),
        Contains("answer", items=[RESPONSE], alias="prompt_leaked"),
        RegExp("answer", reg_exp=REPEATS, alias="repeats_itself"),
    ]
    tuned, base = (
        Dataset.from_pandas(_frame(rows, side), data_definition=definition, descriptors=descriptors)
        for side in ("tuned", "base")
    )
    report = Report([RowCount(), *(ValueStats(column=name) for name in (*SCORES, *DESCRIPTORS))])
    run = report.run(tuned, base, name="tuned (current) beside base (reference)")
    return run.get_html_str(as_iframe=False), json.loads(run.json())


def _frame(rows: Sequence[Mapping[str, Any]], side: str) -> pd.DataFrame:
    scores = {name: [float(row[f"{side}_{name}"]) for row in rows] for name in SCORES}
    frame = pd.DataFrame({"answer": [row[side] for row in rows], **scores})
    return frame.replace([math.inf, -math.inf], math.nan)


def _finite(value: Any) -> Any:
    """The same with null where JSON has no number."""
    if isinstance(value, Mapping):
        return {str(key): _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_curves(history: Sequence[Mapping[str, float]], directory: Path, title: str) -> Path:
    """Write curves.html, self-contained: losses, learning rate, gradient norm and tokens/s against optimiser steps."""
    panels = {
        "loss, nats a token": ("train/loss", "val/loss"),
        "learning rate": ("train/learning_rate",),
        "gradient norm": ("train/grad_norm",),
        "tokens a second": ("train/tokens_per_second",),
    }
    figure = make_subplots(rows=len(panels), shared_xaxes=True, vertical_spacing=0.05, subplot_titles=list(panels))
    for row, names in enumerate(panels.values(), start=1):
        for name in names:
            points = [(entry["step"], entry[name]) for entry in history if name in entry]
            steps, values = zip(*points, strict=True) if points else ((), ())
            figure.add_trace(go.Scatter(x=steps, y=values, name=name, mode="lines+markers"), row=row, col=1)
    figure.update_xaxes(title_text="optimiser step", row=len(panels))
    figure.update_layout(title_text=jinja2.filters.escape(title), height=1000, legend_orientation="h")
    file = directory / "curves.html"
    atomic_write(file, figure.to_html(include_plotlyjs=True).encode())
    return file
