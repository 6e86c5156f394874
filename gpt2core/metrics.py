"""Metrics of generated answers. Each score is one field of `Scores`; its heading and direction stand beside it.

To add a metric: add the field here and compute it in `gpt2core/evaluate.py`. Evaluation, report, promotion gate and
dashboard metadata read `METRICS`.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import Field, dataclass, field, fields
from types import MappingProxyType
from typing import Any


@dataclass(frozen=True)
class Metric:
    """How a score is shown and compared."""

    heading: str
    description: str
    higher_is_better: bool = True


def _metric(*values: Any) -> Any:
    return field(metadata={"metric": Metric(*values)})


@dataclass(frozen=True)
class Scores:
    """One model's scores on a set of records: means over the records, except perplexity (over all reference tokens)."""

    exact_match: float = _metric("Exact match", "share of answers equal to the reference")
    token_f1: float = _metric("Token F1", "words in common with the reference, mean")
    rouge_l: float = _metric("ROUGE-L", "longest common subsequence with the reference, mean")
    perplexity: float = _metric("Perplexity", "of the reference answers, per token", False)
    finished: float = _metric("Finished", "share ended by end of text")


@dataclass(frozen=True)
class RecordScores:
    """One model's scores on one record; `nll` is the mean negative log-likelihood of the reference, nats per token."""

    exact_match: float
    token_f1: float
    rouge_l: float
    nll: float


def _metric_of(score: "Field[Any]") -> Metric:
    metric = score.metadata["metric"]
    assert isinstance(metric, Metric)
    return metric


METRICS: Mapping[str, Metric] = MappingProxyType({score.name: _metric_of(score) for score in fields(Scores)})


def normalise(answer: str) -> str:
    """The form in which answers are compared: letter case, runs of whitespace and a final period do not count."""
    return " ".join(answer.casefold().split()).removesuffix(".").rstrip()


def exact_match(reference: str, answer: str) -> float:
    """1.0 if both are equal after `normalise`, else 0.0."""
    return float(normalise(reference) == normalise(answer))


def token_f1(reference: str, answer: str) -> float:
    """Harmonic mean of precision and recall over words, with multiplicity (SQuAD, arXiv:1606.05250)."""
    wanted, given = normalise(reference).split(), normalise(answer).split()
    if not wanted or not given:
        return float(wanted == given)
    common = (Counter(wanted) & Counter(given)).total()
    return 2 * common / (len(wanted) + len(given))


def perplexity(losses: Sequence[tuple[float, int]]) -> float:
    """exp of the mean loss per token, from (summed loss in nats, tokens) of each example."""
    return math.exp(min(sum(loss for loss, _ in losses) / sum(count for _, count in losses), 700.0))  # e**710 overflows


def mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
