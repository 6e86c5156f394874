import math

import pytest

from gpt2core.metrics import exact_match, exact_match_by_family, normalise, perplexity, token_f1


@pytest.mark.parametrize(
    ("answer", "normal"),
    [
        ("  The  Answer.\n", "the answer"),
        ("Fe", "fe"),
        ("e.g. this.", "e.g. this"),
        ("...", ".."),
        ("Straße", "strasse"),
        ("", ""),
        ("yes .", "yes"),
    ],
)
def test_case_spaces_and_a_final_point_do_not_count(answer, normal):
    assert normalise(answer) == normal


@pytest.mark.parametrize(
    ("reference", "answer", "match", "f1"),
    [
        ("Paris", "paris.", 1, 1),
        ("Paris", "Paris, France", 0, 0),
        ("the red house", "the house", 0, 0.8),  # precision 1, recall 2/3
        ("a a b", "a b b", 0, 2 / 3),  # each word as often as it occurs in both
        ("a", "", 0, 0),
        ("a b", "c", 0, 0),
    ],
)
def test_answers_are_compared_whole_and_by_words(reference, answer, match, f1):
    assert exact_match(reference, answer) == match
    assert token_f1(reference, answer) == pytest.approx(f1)


def test_perplexity_is_over_tokens_not_over_examples():
    assert perplexity([(2.0, 1), (0.0, 3)]) == pytest.approx(math.exp(0.5))


def test_perplexity_of_a_hopeless_model_is_a_number():
    assert math.isfinite(perplexity([(1e6, 1)]))


def test_families_are_counted_in_order_of_name_and_rows_without_one_are_left_out():
    rows = [
        {"family": family, "base_exact_match": base, "tuned_exact_match": tuned}
        for family, base, tuned in [("b", 0.0, 1.0), ("a", 1.0, 1.0), ("b", 0.0, 0.0), ("", 0.0, 1.0)]
    ]
    assert exact_match_by_family(rows) == {
        "a": {"records": 1, "base": 1.0, "tuned": 1.0},
        "b": {"records": 2, "base": 0.0, "tuned": 0.5},
    }
    assert list(exact_match_by_family(rows)) == ["a", "b"]
