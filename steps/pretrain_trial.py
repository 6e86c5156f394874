"""A trial of a sweep that pretrains a model and discards its weights."""

from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Annotated

from zenml import step

from gpt2core.config import PretrainConfig
from gpt2core.demo.base import encode_documents, split_tokens
from gpt2core.evaluate import complete, text_loss
from gpt2core.resources import machine
from gpt2core.trials import Trial
from steps.cache import code_of
from steps.config import ModelConfig, TextConfig, TrackingConfig
from steps.pretrain import train_base


@step(cache_policy=code_of(__name__))
def pretrain_trial(
    label: str,
    seed: int,
    documents: list[str],
    text: TextConfig,
    model: ModelConfig,
    pretrain: PretrainConfig,
    tracking: TrackingConfig,
) -> Annotated[Trial, "trial"]:
    """Pretrain as in the step `pretrain`, and keep only the scores. A diverged training run is also a result."""
    start = perf_counter()
    with TemporaryDirectory() as directory:
        try:
            base = train_base(documents, text, model, pretrain, seed, tracking, Path(directory))
        except FloatingPointError:
            diverged = {"val_loss": None, "train_loss": None, "seconds": perf_counter() - start}
            return Trial(label, seed, machine(), diverged, sample="(diverged)")
    seconds = perf_counter() - start
    assert base.result is not None
    _, held_out = split_tokens(encode_documents(documents, base.tokenizer), text.val_fraction)
    curve = [[entry["step"], entry["train/loss"]] for entry in base.result.history]
    metrics: dict[str, float | None]
    metrics = {"val_loss": text_loss(base.model, held_out), "train_loss": curve[-1][1], "seconds": seconds}
    return Trial(label, seed, machine(), metrics, curve, "\n".join(complete(base.model, base.tokenizer, text.prompts)))
