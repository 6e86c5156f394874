"""Drift of live traffic relative to the served run: the signals, and Evidently's report of the distributions.

The reference is the run's own evaluation: the prompts of the test split and the tuned model's answers to them.
For vocabulary and similarity, the traffic and the test split are both compared with the training prompts. Questions
about new subjects alone are therefore not drift: the test split too has subjects that no training prompt has.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from evidently import DataDefinition, Dataset, Report
from evidently.metrics import RowCount, ValueDrift
from evidently.presets import ValueStats
from scipy.stats import wasserstein_distance

from gpt2core.data import Record
from gpt2core.prompt import format_prompt, split_prompt
from gpt2core.types import JsonDataclass, LoggedCompletion, Sample
from steps.adapters.pages import render
from steps.adapters.similarity import TextIndex
from steps.config import MonitorConfig

TEMPLATE_CHARACTERS = len(format_prompt(".")) - 1  # number of characters that the prompt template adds
NUMBERS = ("prompt_characters", "answer_characters", "unknown_words", "similarity", "seconds")


@dataclass(frozen=True)
class Signal(JsonDataclass):
    """A comparison of traffic and reference."""

    name: str
    reference: float | None  # value of the reference; None: the reference has no such value
    live: float | None  # value of the traffic; None: it is unknown, and `note` says why
    change: float | None  # value that is compared with `limit`; None: `live` is unknown
    limit: float
    drifted: bool
    note: str  # meaning of the values, and the reason if they are unknown


@dataclass(frozen=True)
class Drift(JsonDataclass):
    """The result of monitoring."""

    drifted: bool
    verdict: str  # a sentence
    run: str
    adapter_sha256: str
    requests: int  # number of requests that were compared
    first: str  # time of the oldest of these requests, ISO 8601; "" if there is none
    last: str  # time of the newest of these requests, ISO 8601; "" if there is none
    signals: list[Signal]
    finish_reasons: dict[str, int]
    ratings: dict[str, int]
    unreadable: int  # number of lines of the log that cannot be read
    lost: int  # number of lines that the service could not write


def measure(
    completions: Sequence[LoggedCompletion],
    ratings: Counter[str],
    train: Sequence[Record],
    samples: Sequence[Sample],
    config: MonitorConfig,
) -> tuple[list[Signal], str]:
    """Compute the signals, and Evidently's page.

    Args:
        completions: at least two completions of the tuned model.
        ratings: the number of good and bad ratings.
        train, samples: training records and test samples of the served run.
    """
    training_prompts = _TrainingPrompts(train)
    prompts = [None if completion.prompt is None else _question(completion.prompt) for completion in completions]
    live = pd.DataFrame(
        {
            "prompt_characters": [max(0, c.prompt_characters - TEMPLATE_CHARACTERS) for c in completions],
            "answer_characters": [completion.answer_characters for completion in completions],
            "finish_reason": [completion.finish_reason for completion in completions],
            "seconds": [completion.milliseconds / 1000 for completion in completions],
            **training_prompts.compare(prompts),
        }
    )
    reference = pd.DataFrame(
        {
            "prompt_characters": [
                len(format_prompt(sample.instruction, sample.input)) - TEMPLATE_CHARACTERS for sample in samples
            ],
            "answer_characters": [len(sample.tuned.text) for sample in samples],
            "finish_reason": ["stop" if sample.tuned.finished else "length" for sample in samples],
            "seconds": [np.nan] * len(samples),
            **training_prompts.compare([f"{sample.instruction}\n{sample.input}" for sample in samples]),
        }
    )
    return _signals(live, reference, ratings, config), _evidently(live, reference)


def write_drift(drift: Drift, evidently: str) -> str:
    """Render a self-contained page. `evidently` is "" if nothing was compared."""
    return render("drift.html.j2", drift=drift, evidently=evidently)


def _question(prompt: str) -> str:
    return "\n".join(split_prompt(prompt) or (prompt, ""))


class _TrainingPrompts:
    """The prompts of the training split."""

    def __init__(self, train: Sequence[Record]) -> None:
        texts = [f"{record['instruction']}\n{record.get('input', '')}" for record in train]
        self._words = {word for text in texts for word in _words(text)}
        self._index = TextIndex(texts)

    def compare(self, texts: Sequence[str | None]) -> dict[str, list[float]]:
        """Compute each text's share of unknown words and similarity to the nearest training prompt; NaN for None."""
        distinct = list(dict.fromkeys(text for text in texts if text is not None))
        if not distinct:
            return {name: [np.nan] * len(texts) for name in ("unknown_words", "similarity")}
        similarity = dict(zip(distinct, self._index.nearest(distinct)[0], strict=True))
        unknown = {text: np.mean([word not in self._words for word in _words(text)] or [False]) for text in distinct}
        return {
            name: [np.nan if text is None else float(values[text]) for text in texts]
            for name, values in (("unknown_words", unknown), ("similarity", similarity))
        }


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def _signals(live: pd.DataFrame, reference: pd.DataFrame, ratings: Counter[str], config: MonitorConfig) -> list[Signal]:
    before, now = reference.mean(numeric_only=True), live.mean(numeric_only=True)
    rows: list[tuple[str, float | None, float, float, float, str]] = []  # name, reference, live, change, limit, note
    for name, column in (("prompt length", "prompt_characters"), ("answer length", "answer_characters")):
        change = wasserstein_distance(reference[column], live[column]) / max(1.0, before[column])
        note = "characters; change: Wasserstein distance of the lengths, relative to their mean"
        rows.append((name, before[column], now[column], change, config.max_length_change, note))
    unknown, similarity = "share of words that are in no training prompt", "similarity to the nearest training prompt"
    rise, loss = now["unknown_words"] - before["unknown_words"], before["similarity"] - now["similarity"]
    rows += [
        ("unknown words", before["unknown_words"], now["unknown_words"], rise, config.max_unknown_words, unknown),
        ("similarity", before["similarity"], now["similarity"], loss, config.max_similarity_loss, similarity),
    ]
    cut, cut_now = (float((frame["finish_reason"] != "stop").mean()) for frame in (reference, live))
    note = "share of answers without end of text"
    rows.append(("unfinished answers", cut, cut_now, cut_now - cut, config.max_unfinished, note))
    p95 = live["seconds"].quantile(0.95)
    rows.append(("latency", None, p95, p95, config.max_p95_seconds, "95th percentile of request duration, in seconds"))
    n = ratings.total()
    bad = ratings["bad"] / n if n >= config.min_ratings else np.nan
    rows.append(("ratings", None, bad, bad, config.max_bad_ratings, f"share of bad ratings among {n}"))
    return [_signal(*row) for row in rows]


def _signal(name: str, reference: float | None, live: float, change: float, limit: float, note: str) -> Signal:
    before = None if reference is None else float(reference)
    if np.isnan(change):
        why = "too few" if name == "ratings" else "the log has no prompts; GPT2_REQUEST_LOG_TEXT=keep keeps them"
        return Signal(name, before, None, None, limit, False, f"{note}; not compared: {why}")
    return Signal(name, before, float(live), float(change), limit, bool(change > limit), note)


def _evidently(live: pd.DataFrame, reference: pd.DataFrame) -> str:
    columns = [name for name in NUMBERS if live[name].notna().any() and reference[name].notna().any()]
    definition = DataDefinition(numerical_columns=columns, categorical_columns=["finish_reason"])
    metrics: list[Any] = [RowCount()]
    for name in (*columns, "finish_reason"):
        metrics += [ValueDrift(column=name), ValueStats(column=name)]
    frames = (frame[[*columns, "finish_reason"]].dropna() for frame in (live, reference))
    current, before = (
        Dataset.from_pandas(frame.reset_index(drop=True), data_definition=definition) for frame in frames
    )
    run = Report(metrics).run(current, before, name="live traffic (current) vs. the evaluation (reference)")
    return str(run.get_html_str(as_iframe=False))
