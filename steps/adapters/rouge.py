"""ROUGE-L (Lin 2004), by rouge-score."""

import re

from rouge_score.rouge_scorer import RougeScorer
from rouge_score.tokenizers import Tokenizer


class _Words(Tokenizer):
    """Words of any script, and single signs: rouge-score's own tokenizer drops all but a to z and 0 to 9."""

    def tokenize(self, text: str) -> list[str]:
        return re.findall(r"\w+|[^\w\s]", text.casefold())


_SCORER = RougeScorer(["rougeL"], tokenizer=_Words())


def rouge_l(reference: str, answer: str) -> float:
    """F-measure of the longest common subsequence of words, letter case aside; 0 where one of them has no words."""
    return float(_SCORER.score(reference, answer)["rougeL"].fmeasure)
