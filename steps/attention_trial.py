"""A trial of a sweep without training: one attention layer on its own."""

from typing import Annotated

from zenml import step

from gpt2core import trials
from gpt2core.config import AttentionConfig
from gpt2core.trials import Trial
from steps.cache import code_of


@step(cache_policy=code_of(__name__))
def attention_trial(label: str, seed: int, attention: AttentionConfig) -> Annotated[Trial, "trial"]:
    """Measure memory and time of one attention layer."""
    return trials.attention_trial(label, seed, attention)
