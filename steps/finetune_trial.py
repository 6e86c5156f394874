"""Scores of a sweep's adapters, which the step `finetune` trains, as in a run."""

from pathlib import Path
from typing import Annotated

from zenml import step

from gpt2core.config import GenerationConfig
from gpt2core.data import Record
from gpt2core.trials import Trial, score_adapters
from gpt2core.types import TrainSummary
from steps.adapters.base import open_base, read_base
from steps.cache import code_of


@step(cache_policy=code_of(__name__))
def finetune_trial(
    label: str,
    seed: int,
    base: Path,
    adapters: list[Path],
    val_records: list[Record],
    test_records: list[Record],
    history: list[dict[str, float]],
    train_summary: TrainSummary,
    generation: GenerationConfig,
    samples: int,
) -> Annotated[Trial, "trial"]:
    """Score an adapter of the step `finetune`, and compare the bytes of repeated training runs."""
    return score_adapters(
        label,
        seed,
        open_base(base),
        adapters,
        read_base(base).sha256,
        val_records,
        test_records,
        history,
        train_summary,
        generation,
        samples,
    )
