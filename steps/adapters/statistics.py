"""Confidence intervals of scores and paired comparisons of two models, by scipy and statsmodels.

Records that share a `group` are not independent. If a group has more than one record, every method here therefore works
on whole groups (E. Miller, Adding Error Bars to Evals, arXiv:2411.00640, section 2.2).
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from scipy import stats
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.inter_rater import cohens_kappa
from statsmodels.stats.power import tt_solve_power
from statsmodels.stats.proportion import proportion_confint

from gpt2core.metrics import METRICS
from gpt2core.types import Answer, Difference, Evaluation, Sample

N_RESAMPLES = 9999
MIN_GROUPS = 10  # minimum number of independent groups for a bound of perplexity
POWER = 0.8  # power of the test for the smallest detectable difference
_BATCH = 2**21  # values that one batch of resamples may hold
Values = NDArray[np.float64]


def score(answers: Sequence[Answer], metric: str) -> float:
    """Compute the score of one model, as `gpt2core.metrics.aggregate` does."""
    return float(_score(metric, *_values(answers, metric), axis=-1))


def interval(answers: Sequence[Answer], groups: Sequence[str], metric: str) -> list[float]:
    """Compute the 95 % interval [low, high] of one model's score; [] with one group or an infinite value.

    Uses Wilson's interval for a share of independent records, otherwise the percentile bootstrap over groups. If the
    mean of a score from 0 to 1 is the same in all groups, for example 0, the bootstrap interval has width 0; Wilson's
    interval with one value per group is used instead.

    Args:
        groups: the group of each record; a record with "" is a group of its own.
        metric: a name of `gpt2core.metrics.METRICS`.
    """
    return _interval(*_values(answers, metric), groups, metric)


def _interval(values: Values, weights: Values, groups: Sequence[str], metric: str) -> list[float]:
    if METRICS[metric].is_share and not _repeated(groups):
        return _wilson(values)
    sums = _by_group(np.stack([values, weights]), groups)
    if metric != "perplexity" and sums.shape[1] > 1 and np.ptp(sums[0] / sums[1]) == 0:
        return _wilson(sums[0] / sums[1])
    return _bootstrap(sums, lambda value, weight, axis=-1: _score(metric, value, weight, axis), 0.95, "two-sided")


def intervals(answers: Sequence[Answer], groups: Sequence[str]) -> dict[str, list[float]]:
    """Compute `interval` for each metric."""
    return {metric: interval(answers, groups, metric) for metric in METRICS}


def difference(new: Sequence[Answer], old: Sequence[Answer], groups: Sequence[str], metric: str) -> Difference:
    """Compare the new model's score with the old model's, on the same records in the same order.

    The interval is the paired percentile bootstrap over groups. The p-value (two-sided; null hypothesis: no difference)
    is from McNemar's exact test for shares of independent records, otherwise from the paired permutation test over
    groups.

    Args: see `interval`.
    """
    records = _paired(new, old, metric)
    sums = _by_group(records, groups)

    def statistic(a: Values, n: Values, b: Values, m: Values, axis: int = -1) -> Values:
        return _score(metric, a, n, axis) - _score(metric, b, m, axis)

    if METRICS[metric].is_share and not _repeated(groups):
        table = [[np.sum((records[0] == x) & (records[2] == y)) for y in (1, 0)] for x in (1, 0)]
        p_value, test = float(mcnemar(table, exact=True).pvalue), "exact McNemar"
    else:
        p_value, test = _permutation(sums), "paired permutation"
    n_groups = sums.shape[1]
    shown = metric != "perplexity" and n_groups > 2
    deviation = float(np.std(sums[0] / sums[1] - sums[2] / sums[3], ddof=1)) if shown else 0.0
    return Difference(
        metric=metric,
        difference=float(statistic(*sums)),
        ci95=_bootstrap(sums, statistic, 0.95, "two-sided"),
        p_value=p_value,
        n=len(new),
        test=test,
        detectable=_detectable(deviation, n_groups) if deviation else None,
    )


def differences(new: Sequence[Answer], old: Sequence[Answer], groups: Sequence[str]) -> dict[str, Difference]:
    """Compute `difference` for each metric."""
    return {metric: difference(new, old, groups, metric) for metric in METRICS}


def non_inferiority_bound(
    new: Sequence[Answer], old: Sequence[Answer], groups: Sequence[str], metric: str, alpha: float
) -> float | None:
    """Compute the lower confidence bound (one-sided, level 1 - alpha) of the new model's improvement over the old one.

    A negative bound means that the new model may be worse by this much. None: too few groups, or an infinite loss.

    For scores from 0 to 1, two records are added: one with score 1 of the new and 0 of the old model, and the reverse
    (A. Agresti and Y. Min, Statistics in Medicine 24, 2005). Without them, the bootstrap interval is too narrow if few
    answers differ, and has width 0 if none does. Perplexity has no largest possible loss that could be added, so it has
    no bound with fewer than `MIN_GROUPS` groups.
    """
    sums = _by_group(_paired(new, old, metric), groups)
    if metric == "perplexity":
        if sums.shape[1] < MIN_GROUPS:
            return None
    else:
        sums = np.concatenate([sums, [[1.0, 0.0], [1.0, 1.0], [0.0, 1.0], [1.0, 1.0]]], axis=1)
    sign = 1.0 if METRICS[metric].higher_is_better else -1.0

    def gain(a: Values, n: Values, b: Values, m: Values, axis: int = -1) -> Values:
        return sign * (_score(metric, a, n, axis) - _score(metric, b, m, axis))

    bounds = _bootstrap(sums, gain, 1 - alpha, "greater")
    return bounds[0] if bounds else None


def agreement(judged: Sequence[bool], right: Sequence[bool], groups: Sequence[str]) -> tuple[float, list[float]]:
    """Compute the share of records on which a judge and exact match agree, and its 95 % interval (see `interval`)."""
    same = np.array([a == b for a, b in zip(judged, right, strict=True)], dtype=float)
    return float(same.mean()), _interval(same, np.ones(len(same)), groups, "exact_match")


def kappa(judged: Sequence[bool], right: Sequence[bool]) -> tuple[float | None, list[float]]:
    """Compute Cohen's kappa and its 95 % interval (Fleiss, Cohen and Everitt 1969), for independent records.

    None if the expected agreement is 1, because both give all records the same verdict.
    """
    table = [[sum(a == x and b == y for a, b in zip(judged, right, strict=True)) for y in (0, 1)] for x in (0, 1)]
    if sum(sum(row) > 0 for row in table) < 2 and sum(sum(column) > 0 for column in zip(*table, strict=True)) < 2:
        return None, []
    with np.errstate(divide="ignore", invalid="ignore"):  # for the z value, which is not used
        result = cohens_kappa(table)
    ci95 = [float(result.kappa_low), float(result.kappa_upp)]
    return float(result.kappa), ci95 if np.isfinite(ci95).all() else []


def with_intervals(samples: Sequence[Sample], evaluation: Evaluation) -> Evaluation:
    """Add the 95 % interval of each score of base and tuned model to the evaluation, over all records and by family."""
    groups = [sample.group for sample in samples]
    answers_of = {"base": [sample.base for sample in samples], "tuned": [sample.tuned for sample in samples]}
    families = {}
    for family, scores in evaluation.by_family.items():
        members = [i for i, sample in enumerate(samples) if sample.family == family]
        of = [groups[i] for i in members]
        base, tuned = (interval([answers[i] for i in members], of, "exact_match") for answers in answers_of.values())
        families[family] = replace(scores, base_ci95=base, tuned_ci95=tuned)
    overall = {model: intervals(answers, groups) for model, answers in answers_of.items()}
    return replace(evaluation, intervals=overall, by_family=families)


def _values(answers: Sequence[Answer], metric: str) -> tuple[Values, Values]:
    """Return the value and the weight of each record. The score is sum(values) / sum(weights); see `_score`."""
    if metric == "perplexity":
        tokens = np.array([answer.reference_tokens for answer in answers], dtype=float)
        return np.array([answer.scores.nll for answer in answers]) * tokens, tokens
    if metric == "finished":
        return np.array([float(answer.finished) for answer in answers]), np.ones(len(answers))
    return np.array([getattr(answer.scores, metric) for answer in answers]), np.ones(len(answers))


def _paired(new: Sequence[Answer], old: Sequence[Answer], metric: str) -> Values:
    """Stack new model's values, new model's weights, old model's values, old model's weights: (4, records).

    Perplexities per token of different tokenizers cannot be compared, but the nats of a text can. The nats of both
    models are therefore divided by the new model's number of tokens. For the other metrics, both weights are equal.
    """
    (values, weights), (others, _) = _values(new, metric), _values(old, metric)
    return np.stack([values, weights, others, weights])


def _score(metric: str, value: Values, weight: Values, axis: int) -> Values:
    ratio = value.sum(axis=axis) / weight.sum(axis=axis)
    return np.exp(np.minimum(ratio, 700.0)) if metric == "perplexity" else ratio


def _repeated(groups: Sequence[str]) -> bool:
    named = [group for group in groups if group]
    return len(set(named)) < len(named)


def _by_group(rows: Values, groups: Sequence[str]) -> Values:
    """Sum each row over the records of a group: (rows, records) -> (rows, groups)."""
    keys = {key: i for i, key in enumerate(dict.fromkeys(group or i for i, group in enumerate(groups)))}
    index = [keys[group or i] for i, group in enumerate(groups)]
    sums = np.zeros((len(keys), len(rows)))
    np.add.at(sums, index, rows.T)
    return sums.T


def _wilson(hits: Values) -> list[float]:
    """Compute Wilson's 95 % interval [low, high] of the mean of values from 0 to 1, usually 0 or 1."""
    n, total = hits.sum(), len(hits)
    low, high = proportion_confint(n, total, method="wilson")
    return [float(low) if n else 0.0, float(high) if n < total else 1.0]  # exact where the formula rounds, to 2.8e-17


def _bootstrap(sums: Values, statistic: object, confidence: float, alternative: str) -> list[float]:
    """Compute the percentile bootstrap interval [low, high]; [] if there is one group or a value is not finite."""
    if sums.shape[1] < 2 or not np.isfinite(sums).all():
        return []
    result = stats.bootstrap(
        tuple(sums),
        statistic,
        n_resamples=N_RESAMPLES,
        batch=max(1, _BATCH // sums.shape[1]),
        vectorized=True,
        paired=True,
        confidence_level=confidence,
        alternative=alternative,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    return [float(result.low), float(result.high)]


def _permutation(sums: Values) -> float:
    """Compute the p-value of the paired permutation test, which swaps both models' answers group by group."""
    a, _, b, _ = sums
    if len(a) < 2 or np.array_equal(a, b) or not np.isfinite(sums).all():
        return 1.0
    result = stats.permutation_test(
        (a, b),
        lambda x, y, axis: (x - y).sum(axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=N_RESAMPLES,
        batch=max(1, _BATCH // len(a)),
        rng=np.random.default_rng(0),
    )
    return float(result.pvalue)


def _detectable(deviation: float, n: int) -> float:
    """Compute the smallest true mean difference that n independent groups show at alpha 0.05 with a power of 0.8."""
    effect = tt_solve_power(nobs=n, alpha=0.05, power=POWER, alternative="two-sided")
    return float(np.asarray(effect).item()) * deviation
