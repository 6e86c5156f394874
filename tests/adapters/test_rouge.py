import pytest

from steps.adapters.rouge import rouge_l


@pytest.mark.parametrize(
    ("reference", "answer", "score"),
    [
        ("the cat sat", "the cat sat", 1.0),
        ("The cat sat.", "the CAT sat.", 1.0),
        ("a b c d", "a c", 2 / 3),  # precision 1, recall 1/2
        ("a b c d", "d c b a", 0.25),  # order matters
        ("a b", "c d", 0.0),
        ("a", "", 0.0),
        ("", "", 0.0),
        ("東京", "東京", 1.0),
        ("Straße", "STRASSE", 1.0),
        ("+", "+", 1.0),
        ("1 + 2", "1 - 2", 2 / 3),
    ],
)
def test_it_is_the_f_measure_of_the_longest_common_subsequence_of_words(reference, answer, score):
    assert rouge_l(reference, answer) == pytest.approx(score)
