from dataclasses import asdict
from pathlib import Path
from tempfile import mkdtemp
from typing import Annotated

from zenml import ArtifactConfig, get_step_context, step
from zenml.enums import ArtifactType

from gpt2core.checkpoint import CONFIG, directory_sha256, read_config, save_adapter
from gpt2core.config import LoraConfig, TrainConfig
from gpt2core.data import encode_records, records_sha256
from gpt2core.distributed import finetune_adapter
from gpt2core.tokenizer import load_tokenizer
from gpt2core.train import training_steps
from steps.adapters.base import describe_base, open_base
from steps.adapters.progress import progress
from steps.adapters.tracking import track
from steps.cache import code_of
from steps.checkpoints import kept_checkpoints
from steps.config import TrackingConfig
from steps.metadata import describe
from steps.outputs import wandb_directory

Records = list[dict[str, str]]


@step(cache_policy=code_of(__name__))
def finetune(
    train_records: Records,
    val_records: Records,
    base: Path,
    lora: LoraConfig,
    train: TrainConfig,
    tracking: TrackingConfig,
) -> tuple[
    Annotated[Path, ArtifactConfig(name="adapter", artifact_type=ArtifactType.MODEL)],
    Annotated[list[dict[str, float]], "history"],
    Annotated[dict[str, float | None], "train_metrics"],
]:
    """Train a LoRA adapter on the train split; return its directory, the curves, and what they end in."""
    base_dir = open_base(base)
    tokenizer, n_positions = load_tokenizer(base_dir), read_config(base_dir / CONFIG).n_positions
    examples, val_examples = (
        encode_records(records, tokenizer, n_positions) for records in (train_records, val_records)
    )
    run_name = get_step_context().pipeline_run.name
    about = describe_base(base)
    digests = [about["sha256"], records_sha256(train_records), records_sha256(val_records)]
    _, _, total_steps = training_steps(len(examples), train)
    with (
        track(tracking.wandb, tracking.project, run_name, asdict(lora) | asdict(train), wandb_directory()) as log,
        progress("finetune", total_steps, log) as log,
        kept_checkpoints([asdict(lora), asdict(train), *digests], log) as (checkpoints, log),
    ):
        model, result = finetune_adapter(base_dir, lora, examples, val_examples, train, log, checkpoints)
    adapter = save_adapter(model, Path(mkdtemp(prefix="adapter-")), base=about)
    last = {name: value for entry in result.history for name, value in entry.items()}
    metrics = {
        "loss": last["train/loss"],
        "val_loss": result.best_val_loss,
        "tokens_seen": last["train/tokens_seen"],
        "tokens_per_second": result.tokens_per_second,
    }
    describe("adapter", {"sha256": directory_sha256(adapter), **metrics})
    return adapter, result.history, metrics
