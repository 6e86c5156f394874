"""Scores of single answers, and of all answers of a model."""

import math
from dataclasses import fields

import pytest

from gpt2core.metrics import (
    METRICS,
    RECORD_METRICS,
    RecordScores,
    Scores,
    aggregate,
    exact_match,
    normalize,
    perplexity,
    score_record,
    token_f1,
)


@pytest.mark.parametrize(
    ("answer", "normal"),
    [
        ("  The  Answer.\n", "the answer"),
        ("e.g. this.", "e.g. this"),
        ("...", ".."),
        (" . ", "."),  # not the empty answer
        ("Cafe\u0301", "caf\u00e9"),
        ("Straße", "strasse"),
        ("yes .", "yes"),
        ("东京。", "东京"),
        ("东京．", "东京"),
    ],
)
def test_case_whitespace_and_a_final_period_do_not_count(answer, normal):
    assert normalize(answer) == normal


@pytest.mark.parametrize(
    ("reference", "answer", "match", "f1"),
    [
        ("Paris", "paris.", 1, 1),
        ("Paris", "Paris, France", 0, 0),
        ("the red house", "the house", 0, 0.8),  # precision 1, recall 2/3
        ("a a b", "a b b", 0, 2 / 3),  # each word as often as it occurs in both
        ("a", "", 0, 0),
        ("a b", "c", 0, 0),
        ("东京是日本的首都。", "东京是日本首都", 0, 14 / 15),  # a word is a character
        ("用GPT-2写", "写GPT-2用", 0, 1),
        ("ที่นี่", "ที่", 0, 2 / 3),  # a letter with its vowel sign and tone mark
    ],
)
def test_answers_are_compared_as_a_whole_and_by_words(reference, answer, match, f1):
    assert exact_match(reference, answer) == match
    assert token_f1(reference, answer) == pytest.approx(f1)


def test_perplexity_is_averaged_over_tokens_and_always_finite():
    assert perplexity([(2.0, 1), (0.0, 3)]) == pytest.approx(math.exp(0.5))
    assert math.isfinite(perplexity([(1e6, 1)]))


def test_a_record_is_scored_with_every_metric():
    scores = score_record("the red house", "the house", (3.0, 4), lambda reference, answer: 0.25)
    assert scores == RecordScores(exact_match=0.0, token_f1=pytest.approx(0.8), rouge_l=0.25, nll=0.75)


def test_scores_of_a_model_are_means_over_records_except_perplexity():
    records = [RecordScores(1.0, 1.0, 0.5, 0.1), RecordScores(0.0, 0.5, 0.0, 2.0)]
    scores = aggregate(records, [(0.3, 3), (2.0, 1)], [True, False])
    assert scores == Scores(0.5, 0.75, 0.25, pytest.approx(math.exp(2.3 / 4)), 0.5)


def test_every_score_has_a_heading_and_only_perplexity_is_better_when_lower():
    assert list(METRICS) == [score.name for score in fields(Scores)]
    assert all(metric.heading and metric.description for metric in METRICS.values())
    assert [name for name, metric in METRICS.items() if not metric.higher_is_better] == ["perplexity"]
    assert tuple(score.name for score in fields(RecordScores)) == RECORD_METRICS
