"""Intervals and comparisons, against formulas written out here and against simulation."""

import math

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import cohen_kappa_score

from gpt2core.metrics import METRICS, RecordScores
from gpt2core.types import Answer
from steps.adapters.statistics import agreement, difference, interval, kappa, non_inferiority_bound


def answers(values, nll=1.0, tokens=4):
    nlls = [nll] * len(values) if isinstance(nll, float) else nll
    return [
        Answer("", True, RecordScores(float(value), float(value), float(value), float(loss)), tokens)
        for value, loss in zip(values, nlls, strict=True)
    ]


ALONE = [""] * 40
BINARY = [1] * 30 + [0] * 10


def test_the_interval_of_a_share_is_wilsons():
    n, p, z = 40, 0.75, stats.norm.ppf(0.975)
    center, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    expected = [(center - half) / (1 + z * z / n), (center + half) / (1 + z * z / n)]
    assert interval(answers(BINARY), ALONE, "exact_match") == pytest.approx(expected)


def test_the_interval_of_a_share_of_none_or_all_ends_at_it():
    for n in range(5, 40):  # where Wilson's formula rounds, it leaves 2.8e-17 or 1 - 1.1e-16
        assert interval(answers([0] * n), [""] * n, "exact_match")[0] == 0
        assert interval(answers([1] * n), [""] * n, "exact_match")[1] == 1


@pytest.mark.parametrize("metric", ["token_f1", "perplexity"])
def test_the_interval_of_a_mean_is_close_to_the_normal_one(metric):
    values = np.random.default_rng(0).normal(0.5, 0.1, 200)
    low, high = interval(answers(values, list(values)), [""] * 200, metric)
    half = 1.96 * values.std(ddof=1) / math.sqrt(200)
    expected = np.array([values.mean() - half, values.mean() + half])
    assert [low, high] == pytest.approx(np.exp(expected) if metric == "perplexity" else expected, rel=0.01)


def test_records_of_one_group_count_as_one():
    groups = [f"fact {i // 4}" for i in range(160)]
    values = np.repeat(BINARY, 4)
    low, high = interval(answers(values), groups, "exact_match")
    independent = interval(answers(values), [""] * 160, "exact_match")
    clustered = math.sqrt(0.75 * 0.25 / 40)  # 40 groups, all answers of one alike
    assert high - low == pytest.approx(2 * 1.96 * clustered, rel=0.1)
    assert high - low > 1.7 * (independent[1] - independent[0])


@pytest.mark.parametrize("metric", ["exact_match", "token_f1"])
@pytest.mark.parametrize("value", [0, 1])
def test_the_interval_of_groups_that_are_all_alike_has_a_width(value, metric):
    groups = [f"fact {i // 4}" for i in range(160)]
    found = interval(answers([value] * 160), groups, metric)
    assert found == interval(answers([value] * 40), ALONE, "exact_match")
    assert found[1] - found[0] > 0.05


def test_a_difference_is_paired_and_tested_exactly():
    old, new = [0] * 8 + [1] * 32, [1] * 7 + [0] + [1] * 31 + [0]
    found = difference(answers(new), answers(old), ALONE, "exact_match")
    assert found.difference == pytest.approx(6 / 40)
    assert found.p_value == pytest.approx(stats.binomtest(1, 8).pvalue)  # of 8 changed answers, 1 became wrong
    assert (found.n, found.test) == (40, "exact McNemar")
    changes = np.array(new) - np.array(old)
    half = 1.96 * changes.std(ddof=1) / math.sqrt(40)
    assert found.ci95 == pytest.approx([0.15 - half, 0.15 + half], abs=0.03)
    # the power of a t test at the detectable difference is 0.8
    effect = found.detectable / changes.std(ddof=1)
    critical = stats.t.ppf(0.975, 39)
    power = stats.nct.sf(critical, 39, effect * math.sqrt(40)) + stats.nct.cdf(-critical, 39, effect * math.sqrt(40))
    assert power == pytest.approx(0.8, abs=1e-3)


def test_a_difference_of_means_agrees_with_a_paired_t_test():
    generator = np.random.default_rng(1)
    old = generator.normal(0.5, 0.2, 120)
    new = old + generator.normal(0.02, 0.1, 120)
    found = difference(answers(new, list(new)), answers(old, list(old)), [""] * 120, "token_f1")
    assert found.test == "paired permutation"
    assert found.p_value == pytest.approx(stats.ttest_rel(new, old).pvalue, rel=0.2, abs=0.01)


def test_the_bound_of_a_worse_model_depends_on_the_number_of_records():
    same = answers(BINARY)
    assert non_inferiority_bound(same, same, ALONE, "exact_match", 0.05) == pytest.approx(-0.056, abs=0.02)
    many = answers(BINARY * 10)
    assert non_inferiority_bound(many, many, ALONE * 10, "exact_match", 0.05) > -0.01
    worse = non_inferiority_bound(answers([0] * 40), same, ALONE, "exact_match", 0.05)
    assert worse < -0.75
    # perplexity is better when lower
    assert non_inferiority_bound(answers(BINARY, 0.5), answers(BINARY, 1.0), ALONE, "perplexity", 0.05) > 0


@pytest.mark.parametrize("metric", METRICS)
def test_a_few_equal_answers_do_not_show_that_two_models_are_equal(metric):
    same = answers([0.5, 0.5])
    bound = non_inferiority_bound(same, same, [""] * 2, metric, 0.05)
    assert bound is None if metric == "perplexity" else bound < -0.05
    many = answers(BINARY * 5)
    assert non_inferiority_bound(many, many, ALONE * 5, metric, 0.05) > -0.02


def test_perplexities_of_two_tokenizers_are_compared_per_token_of_the_new_model():
    # Both lose the same nats on each reference, but the old one's tokens are half as long.
    generator = np.random.default_rng(2)
    nats = generator.normal(8.0, 1.0, 40)
    new = answers([0] * 40, list(nats / 4), tokens=4)
    old = answers([0] * 40, list(nats / 8), tokens=8)
    found = difference(new, old, ALONE, "perplexity")
    assert (found.difference, found.p_value) == (pytest.approx(0, abs=1e-9), 1.0)
    assert non_inferiority_bound(new, old, ALONE, "perplexity", 0.05) == pytest.approx(0, abs=1e-9)
    more = nats + generator.normal(2.0, 0.1, 40)
    worse = answers([0] * 40, list(more / 8), tokens=8)
    assert difference(worse, new, ALONE, "perplexity").difference > 0
    assert difference(new, worse, ALONE, "perplexity").difference < 0
    assert non_inferiority_bound(worse, new, ALONE, "perplexity", 0.05) < 0


@pytest.mark.parametrize("metric", METRICS)
def test_data_that_allow_no_interval(metric):
    one = answers([1])
    found = difference(answers([1], 0.5), answers([1], 1.0), [""], metric)
    assert non_inferiority_bound(one, one, [""], "token_f1", 0.05) < -0.3
    assert (found.ci95, found.p_value, found.detectable) == ([], 1.0, None)
    endless = answers([1, 1, 1], [1.0, math.inf, 1.0])
    if metric == "perplexity":
        assert difference(endless, endless, [""] * 3, metric).ci95 == []
        assert non_inferiority_bound(endless, endless, [""] * 3, metric, 0.05) is None


@pytest.mark.parametrize("judged", [[1, 1, 0, 0, 1, 0, 1, 1], [1] * 8, [1, 0, 1, 0, 0, 0, 0, 0]])
def test_kappa_is_that_of_scikit_learn(judged):
    right = [1, 1, 1, 0, 0, 0, 1, 1]
    value, ci95 = kappa([bool(each) for each in judged], [bool(each) for each in right])
    assert value == pytest.approx(cohen_kappa_score(judged, right), abs=1e-12)
    assert not ci95 or ci95[0] <= value <= ci95[1]


def test_kappa_is_unknown_where_both_say_the_same_of_all():
    assert kappa([True, True], [True, True]) == (None, [])


def test_agreement_is_a_share_of_records_and_of_groups():
    share, alone = agreement([True] * 40, [True] * 30 + [False] * 10, ALONE)
    _, grouped = agreement([True] * 40, [True] * 30 + [False] * 10, [str(i // 10) for i in range(40)])
    assert share == 0.75
    assert alone == interval(answers(BINARY), ALONE, "exact_match")
    assert grouped[0] < alone[0] < share
