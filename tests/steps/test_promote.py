from dataclasses import replace

import pytest

from gpt2core.metrics import Scores
from gpt2core.types import Evaluation, TrainSummary
from steps.config import PromoteConfig
from steps.promote import compare

SCORES = Scores(exact_match=0.5, token_f1=0.5, rouge_l=0.5, perplexity=8.0, finished=1.0)


def evaluation(**tuned: float) -> Evaluation:
    return Evaluation(SCORES, replace(SCORES, **tuned), {}, TrainSummary(1.0, None, 10.0, 5.0))


@pytest.mark.parametrize(
    ("metric", "tuned", "margin", "promoted"),
    [
        ("exact_match", 0.6, 0.0, True),
        ("exact_match", 0.5, 0.0, False),
        ("exact_match", 0.6, 0.2, False),
        ("perplexity", 7.0, 0.5, True),
        ("perplexity", 9.0, 0.0, False),
    ],
)
def test_the_tuned_model_must_be_better_by_more_than_the_margin(metric, tuned, margin, promoted):
    config = PromoteConfig(metric=metric, margin=margin)
    better, reason = compare(evaluation(**{metric: tuned}), config)
    assert better is promoted
    assert f"{metric} {tuned:.4f} of the tuned model is " in reason
    assert ("not " in reason) is not promoted
