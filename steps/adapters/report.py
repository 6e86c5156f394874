"""The report page: a summary from report.html.j2 (autoescaped), Evidently's report, and the training curves."""

import itertools
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

import pandas as pd
import plotly.graph_objects as go
from evidently import DataDefinition, Dataset, Report
from evidently.descriptors import Contains, RegExp, TextLength, WordCount
from evidently.metrics import RowCount
from evidently.presets import ValueStats
from markupsafe import Markup, escape
from plotly.subplots import make_subplots

from gpt2core.files import atomic_write
from gpt2core.metrics import METRICS, RECORD_METRICS, mean
from gpt2core.prompt import RESPONSE
from gpt2core.types import Answer, Comparison, Evaluation, Sample
from steps.adapters.data_check import DataCheck
from steps.adapters.pages import render
from steps.adapters.statistics import interval

DESCRIPTORS = ("characters", "words", "prompt_leaked", "repeats_itself")  # Evidently's descriptors of each answer
REPEATS = r"(?s)\b(\w+)\b(?:\W+\1\b){3}"  # matches a word four times in a row
N_EXAMPLES = 5
# The panels of curves.html: heading -> key of the training history -> name of the line
CURVES = {
    "loss, nats per token": {"train/loss": "training loss", "val/loss": "validation loss"},
    "learning rate": {"train/learning_rate": "learning rate"},
    "gradient norm": {"train/grad_norm": "gradient norm"},
    "tokens/s": {"train/tokens_per_second": "tokens/s"},
    "utilization, share of all CPUs or of the GPU's time": {
        "system/cpu_utilization": "CPU utilization",
        "system/gpu_utilization": "GPU utilization",
    },
    "memory, MiB": {"system/memory_mib": "memory of the process", "system/gpu_memory_mib": "GPU memory"},
}


def write_report(
    samples: Sequence[Sample],
    evaluation: Evaluation,
    comparison: Comparison,
    data: DataCheck,
    directory: Path,
    title: str,
) -> tuple[Path, Path]:
    """Write report.html, which is self-contained, and report.json.

    report.json is {"metrics", "comparison", "data", "evidently"}.
    """
    wrong = [sample for sample in samples if not sample.tuned.scores.exact_match]
    worst = sorted(wrong, key=lambda sample: (sample.tuned.scores.token_f1, -sample.tuned.scores.nll))
    evidently_page, evidently_json = _evidently(samples)
    page = render(
        "report.html.j2",
        title=title,
        samples=samples,
        evaluation=evaluation,
        comparison=comparison,
        data=data,
        metrics=METRICS,
        flips=_flips(samples),
        families=[_Slice(name, **asdict(scores)) for name, scores in evaluation.by_family.items()],
        slices=_length_slices(samples),
        calibration=_calibration(samples),
        problems=_problems(samples),
        worst=worst[:N_EXAMPLES],
        word_diff=word_diff,
        evidently=evidently_page,
    )
    content = {
        "metrics": evaluation.to_json(),
        "comparison": comparison.to_json(),
        "data": data.to_json(),
        "evidently": evidently_json,
    }
    text = json.dumps(_finite(content), indent=2, allow_nan=False) + "\n"
    atomic_write(directory / "report.html", page.encode())
    atomic_write(directory / "report.json", text.encode())
    return directory / "report.html", directory / "report.json"


def word_diff(reference: str, answer: str) -> Markup:
    """Render the answer as HTML, with words of only the reference in <del> and words of only the answer in <ins>."""
    old, new = (re.findall(r"\s*\S+", text) for text in (reference, answer))
    parts = []
    for kind, i, j, k, m in SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
        removed, added = escape("".join(old[i:j])), escape("".join(new[k:m]))
        if kind == "equal":
            parts.append(added)
            continue
        parts += [Markup("<del>{}</del>").format(removed)] if removed else []
        parts += [Markup("<ins>{}</ins>").format(added)] if added else []
    return Markup("").join(parts)


@dataclass(frozen=True)
class _Slice:
    """A subset of the records, with the shares of correct answers of base and tuned model and their 95 % intervals."""

    name: str
    records: int
    base: float
    base_ci95: list[float]
    tuned: float
    tuned_ci95: list[float]


def _length_slices(samples: Sequence[Sample]) -> list[_Slice]:
    """Compute exact match for short, medium and long reference answers (a third of the records each)."""
    order = sorted(samples, key=lambda sample: len(sample.output))
    slices = []
    for part in (order[i * len(order) // 3 : (i + 1) * len(order) // 3] for i in range(3)):
        if part:
            groups = [sample.group for sample in part]
            sides = [[sample.base for sample in part], [sample.tuned for sample in part]]
            shares = [mean([answer.scores.exact_match for answer in answers]) for answers in sides]
            base, tuned = (interval(answers, groups, "exact_match") for answers in sides)
            name = f"{len(part[0].output)} to {len(part[-1].output)} characters"
            slices.append(_Slice(name, len(part), shares[0], base, shares[1], tuned))
    return slices


def _flips(samples: Sequence[Sample]) -> dict[str, list[Sample]]:
    """Select the samples whose answer became correct or wrong, by heading."""

    def changed(side: str, was: float) -> list[Sample]:
        answered = [(sample, answer) for sample in samples if (answer := getattr(sample, side)) is not None]
        return [s for s, answer in answered if answer.scores.exact_match == was != s.tuned.scores.exact_match]

    return {
        "Base correct, tuned model wrong": changed("base", 1.0),
        "Champion correct, tuned model wrong": changed("champion", 1.0),
        "Champion wrong, tuned model correct": changed("champion", 0.0),
        "Base wrong, tuned model correct": changed("base", 0.0),
    }


def _calibration(samples: Sequence[Sample]) -> list[tuple[str, int, float, float]]:
    """Group tuned answers by confidence: range, number of answers, mean confidence, share of correct answers."""
    answers = [sample.tuned for sample in samples]
    known = [(answer.confidence, answer.scores.exact_match) for answer in answers if answer.confidence is not None]
    rows = []
    for low, high in itertools.pairwise((0.0, 0.5, 0.8, 0.9, 0.95, 1.0)):
        if part := [(confidence, right) for confidence, right in known if low <= confidence < high + (high == 1)]:
            mean_confidence, share = (mean(values) for values in zip(*part, strict=True))
            rows.append((f"{low:g} to {high:g}", len(part), mean_confidence, share))
    return rows


def _problems(samples: Sequence[Sample]) -> dict[str, tuple[int, int]]:
    """Count the answers of base and tuned model that have a visible problem, by its name."""
    checks: dict[str, Callable[[str], bool]] = {
        "repeat the prompt's headings": lambda text: RESPONSE in text,
        "repeat a word four times": lambda text: re.search(REPEATS, text) is not None,
        "are empty": lambda text: not text,
    }
    found = {
        name: (sum(check(s.base.text) for s in samples), sum(check(s.tuned.text) for s in samples))
        for name, check in checks.items()
    }
    return found | {
        "were cut at the length limit": (
            sum(not s.base.finished for s in samples),
            sum(not s.tuned.finished for s in samples),
        )
    }


def _evidently(samples: Sequence[Sample]) -> tuple[str, Any]:
    """Return Evidently's page and data: distributions of scores and lengths, tuned (current) and base (reference)."""
    definition = DataDefinition(numerical_columns=list(RECORD_METRICS), text_columns=["answer"])
    descriptors = [
        TextLength("answer", alias="characters"),
        WordCount("answer", alias="words"),
        Contains("answer", items=[RESPONSE], alias="prompt_leaked"),
        RegExp("answer", reg_exp=REPEATS, alias="repeats_itself"),
    ]
    tuned, base = (
        Dataset.from_pandas(frame, data_definition=definition, descriptors=descriptors)
        for frame in (_frame([sample.tuned for sample in samples]), _frame([sample.base for sample in samples]))
    )
    report = Report([RowCount(), *(ValueStats(column=name) for name in (*RECORD_METRICS, *DESCRIPTORS))])
    run = report.run(tuned, base, name="tuned (current) vs. base (reference)")
    return run.get_html_str(as_iframe=False), json.loads(run.json())


def _frame(answers: Sequence[Answer]) -> pd.DataFrame:
    columns = {name: [getattr(answer.scores, name) for answer in answers] for name in RECORD_METRICS}
    frame = pd.DataFrame({"answer": [answer.text for answer in answers], **columns})
    return frame.replace([math.inf, -math.inf], math.nan)


def _finite(value: Any) -> Any:
    """Replace NaN and infinity by None, because JSON does not have them."""
    if isinstance(value, Mapping):
        return {str(key): _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_curves(history: Sequence[Mapping[str, float]], directory: Path, title: str) -> Path:
    """Write a self-contained curves.html: losses, optimization, throughput and machine usage by optimizer step.

    The heading of a panel with one line names it. The legend names the lines of the other panels.
    """
    logged = {key for entry in history for key in entry}
    panels = {
        heading: names
        for heading, names in CURVES.items()
        if names.keys() & logged or not any(key.startswith("system/") for key in names)
    }
    figure = make_subplots(rows=len(panels), shared_xaxes=True, vertical_spacing=0.04, subplot_titles=list(panels))
    for row, names in enumerate(panels.values(), start=1):
        for key, name in names.items():
            points = [(entry["step"], entry[key]) for entry in history if key in entry]
            if not points and key.startswith("system/"):
                continue  # a machine without a GPU does not log GPU values
            steps, values = zip(*points, strict=True) if points else ((), ())
            line = go.Scatter(x=steps, y=values, name=name, mode="lines+markers", showlegend=len(names) > 1)
            figure.add_trace(line, row=row, col=1)
    validated = [entry for entry in history if math.isfinite(entry.get("val/loss", math.nan))]
    if validated:
        best = min(validated, key=lambda entry: entry["val/loss"])
        marker = {"symbol": "star", "size": 14}
        figure.add_trace(
            go.Scatter(
                x=[best["step"]], y=[best["val/loss"]], name="best validation loss", mode="markers", marker=marker
            ),
            row=1,
            col=1,
        )
    figure.update_xaxes(title_text="optimizer step", row=len(panels))
    figure.update_layout(title_text=escape(title), height=240 * len(panels), legend_orientation="h")
    file = directory / "curves.html"
    atomic_write(file, figure.to_html(include_plotlyjs=True).encode())
    return file
