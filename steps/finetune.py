"""Training of the adapter. It resumes from checkpoints in the artifact store."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

from zenml import ArtifactConfig, step
from zenml.enums import ArtifactType

from gpt2core.checkpoint import CONFIG, read_config, save_adapter
from gpt2core.config import LoraConfig, TrainConfig
from gpt2core.data import Record, encode_records, records_sha256
from gpt2core.distributed import finetune_adapter
from gpt2core.files import directory_sha256, write_files
from gpt2core.tokenizer import load_tokenizer
from gpt2core.training_plan import training_steps
from gpt2core.types import SplitPart, TrainSummary
from steps.adapters.base import open_base, read_base
from steps.adapters.model_card import CARD, adapter_card
from steps.cache import code_of
from steps.config import TrackingConfig, check_rank
from steps.materializers import DirectoryMaterializer, output_directory
from steps.metadata import attach_metadata
from steps.training import resumable_training


@step(cache_policy=code_of(__name__), output_materializers={"adapter": DirectoryMaterializer})
def finetune(
    train_records: list[Record],
    val_records: list[Record],
    base: Path,
    lora: LoraConfig,
    train: TrainConfig,
    tracking: TrackingConfig,
) -> tuple[
    Annotated[Path, ArtifactConfig(name="adapter", artifact_type=ArtifactType.MODEL)],
    Annotated[list[dict[str, float]], "history"],
    Annotated[TrainSummary, "train_summary"],
]:
    """Train a LoRA adapter on the training split; return its directory, the logged values by step, and a summary."""
    base_dir, base_ref = open_base(base), read_base(base)
    config = read_config(base_dir / CONFIG)
    check_rank(lora, config.n_embd)
    tokenizer, n_positions = load_tokenizer(base_dir), config.n_positions
    examples, val_examples = (
        encode_records(records, tokenizer, n_positions) for records in (train_records, val_records)
    )
    train_part, val_part = (
        SplitPart(records_sha256(records), len(records)) for records in (train_records, val_records)
    )
    digests = [base_ref.sha256, train_part.sha256, val_part.sha256]
    _, _, total_steps = training_steps(len(examples), train)
    data = {"train": digests[1], "val": digests[2], "records": len(train_records)}
    values = {"lora": asdict(lora), "train": asdict(train), "base": base_ref.to_json(), "data": data}
    key = [asdict(lora), asdict(train), *digests]
    with resumable_training("finetune", total_steps, key, values, tracking) as (log, checkpoints):
        model, result = finetune_adapter(base_dir, lora, examples, val_examples, train, log, checkpoints.directory)
    summary = result.summary(wandb_run="" if tracking.wandb == "off" else checkpoints.training_id)
    card = adapter_card(base_ref, lora, train, train_part, val_part, summary)
    with output_directory("adapter-") as adapter:
        save_adapter(model, adapter, base=base_ref.to_json())
        write_files(adapter, {CARD: card.encode()})
    attach_metadata("adapter", {"sha256": directory_sha256(adapter), **summary.to_json()})
    return adapter, result.history, summary
