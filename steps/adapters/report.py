"""The report page: a summary of ours (jinja2, autoescaped), Evidently's report, and the training curves."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal

import jinja2
import pandas as pd
import plotly.graph_objects as go
from evidently import DataDefinition, Dataset, Report
from evidently.descriptors import Contains, RegExp, TextLength, WordCount
from evidently.metrics import RowCount
from evidently.presets import ValueStats
from plotly.subplots import make_subplots

from gpt2core.checkpoint import atomic_write
from gpt2core.metrics import METRICS, RecordScores
from gpt2core.prompt import RESPONSE
from gpt2core.types import Evaluation, Sample

SCORES = tuple(score.name for score in fields(RecordScores))  # of each sample
DESCRIPTORS = ("characters", "words", "prompt_leaked", "repeats_itself")  # of each answer
REPEATS = r"(?s)\b(\w+)\b(?:\W+\1\b){3}"  # a word four times in a row
N_EXAMPLES = 5
_ENVIRONMENT = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined
)


def write_report(samples: Sequence[Sample], evaluation: Evaluation, directory: Path, title: str) -> tuple[Path, Path]:
    """Write report.html, which loads nothing from elsewhere, and report.json: {"metrics", "evidently"}."""
    right, wrong = ([s for s in samples if s.tuned_scores.exact_match == score] for score in (1.0, 0.0))
    best = sorted(right, key=lambda sample: (sample.base_scores.token_f1, -sample.base_scores.nll))
    worst = sorted(wrong, key=lambda sample: (sample.tuned_scores.token_f1, -sample.tuned_scores.nll))
    evidently_page, evidently_json = _evidently(samples)
    page = _ENVIRONMENT.get_template("report.html.j2").render(
        title=title,
        samples=samples,
        evaluation=evaluation,
        metrics=METRICS,
        best=best[:N_EXAMPLES],
        worst=worst[:N_EXAMPLES],
        evidently=evidently_page,
    )
    data = (
        json.dumps(_finite({"metrics": evaluation.to_json(), "evidently": evidently_json}), indent=2, allow_nan=False)
        + "\n"
    )
    atomic_write(directory / "report.html", page.encode())
    atomic_write(directory / "report.json", data.encode())
    return directory / "report.html", directory / "report.json"


def _evidently(samples: Sequence[Sample]) -> tuple[str, Any]:
    """Evidently's page and data: distributions of scores and lengths, tuned (current) against base (reference)."""
    definition = DataDefinition(numerical_columns=list(SCORES), text_columns=["answer"])
    descriptors = [
        TextLength("answer", alias="characters"),
        WordCount("answer", alias="words"),
        Contains("answer", items=[RESPONSE], alias="prompt_leaked"),
        RegExp("answer", reg_exp=REPEATS, alias="repeats_itself"),
    ]
    tuned, base = (
        Dataset.from_pandas(frame, data_definition=definition, descriptors=descriptors)
        for frame in (_frame(samples, "tuned"), _frame(samples, "base"))
    )
    report = Report([RowCount(), *(ValueStats(column=name) for name in (*SCORES, *DESCRIPTORS))])
    run = report.run(tuned, base, name="tuned (current) beside base (reference)")
    return run.get_html_str(as_iframe=False), json.loads(run.json())


def _frame(samples: Sequence[Sample], model: Literal["base", "tuned"]) -> pd.DataFrame:
    answers = [sample.base if model == "base" else sample.tuned for sample in samples]
    scores = [sample.base_scores if model == "base" else sample.tuned_scores for sample in samples]
    frame = pd.DataFrame({"answer": answers, **{name: [getattr(each, name) for each in scores] for name in SCORES}})
    return frame.replace([math.inf, -math.inf], math.nan)


def _finite(value: Any) -> Any:
    """The value with null in place of NaN and infinity, which JSON does not have."""
    if isinstance(value, Mapping):
        return {str(key): _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_curves(history: Sequence[Mapping[str, float]], directory: Path, title: str) -> Path:
    """Write curves.html, self-contained: losses, learning rate, gradient norm and throughput by optimiser step."""
    panels = {
        "loss, nats per token": ("train/loss", "val/loss"),
        "learning rate": ("train/learning_rate",),
        "gradient norm": ("train/grad_norm",),
        "tokens/s": ("train/tokens_per_second",),
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
