"""Pretraining on a text; sweeps use `train_base` too."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

from zenml import ArtifactConfig, step
from zenml.enums import ArtifactType

from gpt2core.checkpoint import save_pretrained
from gpt2core.config import PretrainConfig
from gpt2core.demo.base import Pretrained, pretrain_text
from gpt2core.files import directory_sha256
from gpt2core.model import best_device
from gpt2core.types import TrainSummary
from steps.cache import code_of
from steps.config import ModelConfig, TextConfig, TrackingConfig
from steps.materializers import DirectoryMaterializer, output_directory
from steps.metadata import attach_metadata
from steps.training import resumable_training


@step(cache_policy=code_of(__name__), output_materializers={"base": DirectoryMaterializer})
def pretrain(
    documents: list[str],
    text: TextConfig,
    model: ModelConfig,
    pretrain: PretrainConfig,
    seed: int,
    tracking: TrackingConfig,
) -> tuple[
    Annotated[Path, ArtifactConfig(name="base", artifact_type=ArtifactType.MODEL)],
    Annotated[list[dict[str, float]], "history"],
    Annotated[TrainSummary, "train_summary"],
]:
    """Train a tokenizer and a GPT-2 on the documents; return checkpoint, logged values by step, and a summary."""
    with output_directory("base-") as directory:
        base = train_base(documents, text, model, pretrain, seed, tracking, directory)
        save_pretrained(base.model, directory)
    assert base.result is not None
    summary = base.result.summary()
    about = {"sha256": directory_sha256(directory), "corpus_tokens": base.n_tokens}
    attach_metadata(
        "base", {**about, "parameters": sum(p.numel() for p in base.model.parameters()), **summary.to_json()}
    )
    return directory, base.result.history, summary


def train_base(
    documents: list[str],
    text: TextConfig,
    model: ModelConfig,
    pretrain: PretrainConfig,
    seed: int,
    tracking: TrackingConfig,
    directory: Path,
) -> Pretrained:
    """Call `pretrain_text` with checkpoints in the artifact store, progress and tracking."""
    config = model.to_gpt2()
    values = {"model": asdict(config), "pretrain": asdict(pretrain), "text": asdict(text), "seed": seed}
    key = [asdict(config), asdict(pretrain), seed, documents, text.val_fraction]
    with resumable_training("pretrain", pretrain.max_steps, key, values, tracking) as (log, checkpoints):
        fraction, device = text.val_fraction, best_device()
        return pretrain_text(documents, config, pretrain, seed, directory, log, checkpoints.directory, fraction, device)
