"""Scores of answers, on plain lists. Lays out no report."""

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any


def normalise(answer: str) -> str:
    """The one rule by which answers are compared: letter case, runs of spaces and a final point do not count."""
    return " ".join(answer.casefold().split()).removesuffix(".").rstrip()


def exact_match(reference: str, answer: str) -> float:
    """1.0 if the two say the same by `normalise`, else 0.0."""
    return float(normalise(reference) == normalise(answer))


def token_f1(reference: str, answer: str) -> float:
    """Harmonic mean of precision and recall over words, counted as often as they occur (SQuAD, arXiv:1606.05250)."""
    wanted, given = normalise(reference).split(), normalise(answer).split()
    if not wanted or not given:
        return float(wanted == given)
    common = (Counter(wanted) & Counter(given)).total()
    return 2 * common / (len(wanted) + len(given))


def perplexity(losses: Sequence[tuple[float, int]]) -> float:
    """exp of the mean loss a token, from (summed loss in nats, tokens) of each example."""
    return math.exp(min(sum(loss for loss, _ in losses) / sum(count for _, count in losses), 700.0))  # e**710 overflows


def mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def exact_match_by_family(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """For each family, in order of name: number of records, and exact match of base and tuned."""
    families: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for row in rows:
        if row["family"]:
            families[row["family"]].append(row)
    return {
        family: {
            "records": len(members),
            "base": mean([row["base_exact_match"] for row in members]),
            "tuned": mean([row["tuned_exact_match"] for row in members]),
        }
        for family, members in sorted(families.items())
    }
