import pytest
from rouge_score.rouge_scorer import RougeScorer
from rouge_score.tokenizers import Tokenizer

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


class Characters(Tokenizer):
    def tokenize(self, text):
        return text.split("|")


@pytest.mark.parametrize(
    ("reference", "answer"),
    [
        ("东|京|是|日|本|的|首|都", "东|京|是|日|本|首|都"),
        ("東|京|タ|ワ|ー|は|赤|い|。", "東|京|は|赤|い"),
        ("か\u3099|き", "き|か"),  # a combining mark
        ("ที่|นี่|ดี", "ที่|ดี"),
        ("ພ|າ|ສ|າ|ລ|າ|ວ", "ພ|າ|ສ|າ"),
        ("ភា|សា|ខ្|មែ|រ", "ភា|ខ្|រ"),
        ("မြ|န်|မာ", "မာ|မြ"),
        ("2024|年| gpt4| |好", "2024|年|好"),
    ],
)
def test_a_character_of_a_script_without_spaces_is_a_word(reference, answer):
    parts = [text.replace("| |", "|").replace("| ", "|") for text in (reference, answer)]
    expected = RougeScorer(["rougeL"], tokenizer=Characters()).score(*parts)["rougeL"].fmeasure
    assert rouge_l(reference.replace("|", ""), answer.replace("|", "")) == pytest.approx(expected)
    assert 0 < expected < 1
