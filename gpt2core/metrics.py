"""Metrics of generated answers. Evaluation, report, promotion and dashboard metadata all read `METRICS`.

To add a metric, add a field with its `Metric` to `Scores` (and to `RecordScores`, if it has a value per record), and
compute it in `score_record` and `aggregate`.
"""

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import Field, dataclass, field, fields
from types import MappingProxyType
from typing import Any

# Unicode's blocks of scripts without spaces between words, from the first to the last character
_BLOCKS = (
    *("\u0e00-\u0eff", "\u1000-\u109f", "\ua9e0-\ua9ff", "\uaa60-\uaa7f", "\u1780-\u17ff"),  # Thai, Lao, Myanmar, Khmer
    *(
        "\u3005-\u3007",
        "\u3040-\u30ff",
        "\u31f0-\u31ff",
        "\uff66-\uff9f",
        "\U0001b000-\U0001b16f",
    ),  # kana
    *("\u3400-\u4dbf", "\u4e00-\u9fff", "\uf900-\ufaff", "\U00020000-\U0003ffff"),  # Han
)
_UNSPACED = "".join(_BLOCKS)
_MARKS = "".join(
    chr(code)
    for block in _BLOCKS[:7]  # the others have no combining marks
    for code in range(ord(block[0]), ord(block[-1]) + 1)
    if unicodedata.category(chr(code)).startswith("M")
)
# Regular expressions for words: in scripts without spaces, a character with its combining marks is a word.
CHARACTER = rf"[{_UNSPACED}][{_MARKS}]*"
LETTERS = rf"[^\W{_UNSPACED}]+"  # letters and digits of other scripts
_WORD = re.compile(rf"{CHARACTER}|[^\s{_UNSPACED}]+")


@dataclass(frozen=True)
class Metric:
    """How a score is shown and compared."""

    heading: str
    description: str
    higher_is_better: bool = True
    is_share: bool = False  # 0 or 1 for each record, so Wilson's interval and McNemar's test apply


def _metric(heading: str, description: str, **options: bool) -> Any:
    return field(metadata={"metric": Metric(heading, description, **options)})


@dataclass(frozen=True)
class Scores:
    """One model's scores on a set of records: means over the records, but perplexity over all reference tokens."""

    exact_match: float = _metric("Exact match", "share of answers equal to the reference", is_share=True)
    token_f1: float = _metric("Token F1", "words in common with the reference, mean")
    rouge_l: float = _metric("ROUGE-L", "longest common subsequence with the reference, mean")
    perplexity: float = _metric("Perplexity", "of the reference answers, per token", higher_is_better=False)
    finished: float = _metric("Finished", "share ended by end of text", is_share=True)


@dataclass(frozen=True)
class RecordScores:
    """One model's scores on one record."""

    exact_match: float
    token_f1: float
    rouge_l: float
    nll: float  # mean negative log-likelihood of the reference, in nats per token


def _metric_of(score: "Field[Any]") -> Metric:
    metric = score.metadata["metric"]
    assert isinstance(metric, Metric)
    return metric


METRICS: Mapping[str, Metric] = MappingProxyType({score.name: _metric_of(score) for score in fields(Scores)})
RECORD_METRICS: tuple[str, ...] = tuple(score.name for score in fields(RecordScores))


def score_record(
    reference: str, answer: str, loss: tuple[float, int], rouge_l: Callable[[str, str], float]
) -> RecordScores:
    """Compute the scores of one answer.

    Args:
        loss: summed negative log-likelihood of the reference in nats, and its number of tokens.
        rouge_l: function (reference, answer) -> ROUGE-L. It is an argument because this package does not depend on a
            ROUGE library.
    """
    return RecordScores(
        exact_match=exact_match(reference, answer),
        token_f1=token_f1(reference, answer),
        rouge_l=rouge_l(reference, answer),
        nll=loss[0] / loss[1],
    )


def aggregate(records: Sequence[RecordScores], losses: Sequence[tuple[float, int]], finished: Sequence[bool]) -> Scores:
    """Aggregate the scores of a model's answers.

    Args:
        losses: argument `loss` of `score_record` for each record.
        finished: whether end of text ended the answer, for each record.
    """
    return Scores(
        exact_match=mean([record.exact_match for record in records]),
        token_f1=mean([record.token_f1 for record in records]),
        rouge_l=mean([record.rouge_l for record in records]),
        perplexity=perplexity(losses),
        finished=mean([float(value) for value in finished]),
    )


def normalize(answer: str) -> str:
    """Normalize an answer for comparison.

    Removes differences in letter case, whitespace, a final period (also `。` and `．`), and the composition of accents
    (Unicode's NFC). An answer that is only a period stays.
    """
    text = " ".join(unicodedata.normalize("NFC", answer).casefold().split())
    return (text[:-1] if text.endswith((".", "。", "．")) else text).rstrip() or text


def exact_match(reference: str, answer: str) -> float:
    """Return 1.0 if both are equal after `normalize`, else 0.0."""
    return float(normalize(reference) == normalize(answer))


def token_f1(reference: str, answer: str) -> float:
    """Compute the harmonic mean of precision and recall over words, with multiplicity (SQuAD, arXiv:1606.05250).

    Words are separated by spaces. In scripts without spaces, such as Han, a character is a word.
    """
    expected, given = (_WORD.findall(normalize(text)) for text in (reference, answer))
    if not expected or not given:
        return float(expected == given)
    common = (Counter(expected) & Counter(given)).total()
    return 2 * common / (len(expected) + len(given))


def perplexity(losses: Sequence[tuple[float, int]]) -> float:
    """Compute exp(mean loss per token) from (summed loss in nats, number of tokens) of each example."""
    return math.exp(min(sum(loss for loss, _ in losses) / sum(count for _, count in losses), 700.0))  # e**710 overflows


def mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
