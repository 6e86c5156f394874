"""ROUGE-L (Lin 2004), by rouge-score."""

import re

from rouge_score.rouge_scorer import RougeScorer
from rouge_score.tokenizers import Tokenizer

from gpt2core.metrics import CHARACTER, LETTERS

_WORD = re.compile(rf"{CHARACTER}|{LETTERS}|[^\w\s]")


class _Words(Tokenizer):
    """Tokenizes words of any script and punctuation. rouge-score's default tokenizer keeps only a-z and 0-9.

    In scripts without spaces between words, a character is a word.
    """

    def tokenize(self, text: str) -> list[str]:
        return _WORD.findall(text.casefold())


_SCORER = RougeScorer(["rougeL"], tokenizer=_Words())


def rouge_l(reference: str, answer: str) -> float:
    """Compute the F-measure of the longest common subsequence of words, ignoring case; 0 if a text has no words."""
    return float(_SCORER.score(reference, answer)["rougeL"].fmeasure)
