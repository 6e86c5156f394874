"""Shared setup of the training steps: checkpoints in the artifact store, tracking and progress."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from zenml import get_step_context

from gpt2core.train import Log
from steps.adapters.progress import training_progress
from steps.adapters.tracking import track
from steps.checkpoints import Checkpoints, stored_checkpoints
from steps.config import TrackingConfig
from steps.outputs import wandb_directory


@contextmanager
def resumable_training(
    name: str, total_steps: int, key: Any, values: Mapping[str, Any], tracking: TrackingConfig
) -> Iterator[tuple[Log, Checkpoints]]:
    """Context manager: yields the training callback and the directory of the training run's checkpoint.

    Args:
        name: name of the training run in the progress display.
        key: see `stored_checkpoints`.
        values: the configuration that wandb shows.
    """
    run_name = get_step_context().pipeline_run.name
    with (
        stored_checkpoints(key) as checkpoints,
        track(tracking, run_name, checkpoints.training_id, values, wandb_directory()) as log,
        training_progress(name, total_steps, log) as log,
    ):
        yield checkpoints.after(log), checkpoints
