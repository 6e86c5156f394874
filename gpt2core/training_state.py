"""State of a training run, and its checkpoint file."""

import hashlib
import json
import logging
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_safetensors
from torch import Tensor, nn

from gpt2core.files import atomic_write

logger = logging.getLogger(__name__)

CHECKPOINT, PREVIOUS = "checkpoint.safetensors", "checkpoint-previous.safetensors"


@dataclass
class Progress:
    """The training state without tensors: step, counters and history."""

    step: int = 0
    tokens_seen: int = 0
    seconds: float = 0.0
    best_val_loss: float | None = None
    validations_since_best: int = 0
    history: list[dict[str, float]] = field(default_factory=list)  # as in `gpt2core.train.TrainResult`
    # sums since the last entry of the history
    loss: float = 0.0
    labels: int = 0
    tokens: int = 0
    logged_seconds: float = 0.0

    def should_stop_early(self, patience: int | None) -> bool:
        """Return whether the last `patience` validations had no new best loss; False if `patience` is None."""
        return patience is not None and self.validations_since_best >= patience

    def record(self, values: Mapping[str, float]) -> None:
        """Add the values to the history's entry of the current step."""
        if self.history and self.history[-1]["step"] == self.step:
            self.history[-1].update(values)
        else:
            self.history.append({"step": self.step, **values})


@dataclass
class TrainingState:
    """The state from which a run resumes: trainable weights, optimizers, torch's random state and progress."""

    weights: Mapping[str, nn.Parameter]
    optimizers: Sequence[torch.optim.Optimizer]
    device: torch.device
    progress: Progress = field(default_factory=Progress)
    best: dict[str, Tensor] = field(default_factory=dict)  # copy of the weights with the best validation loss

    def __post_init__(self) -> None:
        self._learning_rates = [group["lr"] for group in self._groups()]

    def scale_learning_rates(self, factor: float) -> float:
        """Set every learning rate to its configured value times `factor`; return the first one."""
        for group, learning_rate in zip(self._groups(), self._learning_rates, strict=True):
            group["lr"] = learning_rate * factor
        return float(self._groups()[0]["lr"])

    def keep_best(self, val_loss: float) -> None:
        """Record a validation loss. If it is lower than all before, keep a copy of the weights.

        Raises:
            FloatingPointError: the loss is not finite.
        """
        if not isfinite(val_loss):
            raise FloatingPointError(f"the validation loss is {val_loss} after step {self.progress.step}")
        self.progress.record({"val/loss": val_loss})
        self.progress.validations_since_best += 1
        if self.progress.best_val_loss is None or val_loss < self.progress.best_val_loss:
            self.progress.best_val_loss, self.progress.validations_since_best = val_loss, 0
            self.best = {name: weight.detach().clone() for name, weight in self.weights.items()}

    def restore_best(self) -> None:
        """Set the weights to the copy with the best validation loss, if there was a validation."""
        for name, tensor in self.best.items():
            self.weights[name].data.copy_(tensor)

    def check_finite(self) -> None:
        """Raise FloatingPointError, naming the step, if a weight has NaN or infinite values."""
        finite = torch.stack(
            [torch.stack(weight.detach().aminmax()).isfinite().all() for weight in self.weights.values()]
        )
        for name, is_finite in zip(self.weights, finite.tolist(), strict=True):  # one host read for all weights
            if not is_finite:
                rates = " and ".join(f"{rate:g}" for rate in dict.fromkeys(self._learning_rates))
                raise FloatingPointError(
                    f"weight {name} has NaN or infinite values after step {self.progress.step}; "
                    f"lower the learning rate of {rates}"
                )

    def save(self, directory: Path, fingerprint: str) -> None:
        """Write a checkpoint; the previous one is kept until the next call.

        Args:
            fingerprint: identifies the run's data and config; `resume` accepts only the same fingerprint.
        """
        tensors = {f"weight.{name}": weight.detach() for name, weight in self.weights.items()}
        tensors |= {f"best.{name}": tensor for name, tensor in self.best.items()}
        for i, optimizer in enumerate(self.optimizers):
            for j, state in optimizer.state_dict()["state"].items():
                tensors |= {f"optimiser.{i}.{j}.{key}": value for key, value in state.items()}
        tensors["rng.cpu"] = torch.get_rng_state()
        if self.device.type == "cuda":
            tensors["rng.cuda"] = torch.cuda.get_rng_state(self.device)
        tensors = {key: value.contiguous().cpu() for key, value in tensors.items()}
        # progress is in the same file as the tensors, because one file is written completely or not at all
        metadata = {"fingerprint": fingerprint, "progress": json.dumps(asdict(self.progress))}
        file = directory / CHECKPOINT
        with suppress(FileNotFoundError):  # there is no previous checkpoint, or another process has removed it
            os.replace(file, directory / PREVIOUS)
        atomic_write(file, to_safetensors(tensors, metadata | {"sha256": _digest(tensors, metadata)}))
        logger.debug("checkpoint of step %d in %s", self.progress.step, file)

    def resume(self, directory: Path, fingerprint: str) -> None:
        """Restore the newest undamaged checkpoint of this run in the directory, if there is one.

        Raises:
            ValueError: the undamaged checkpoints all belong to runs with other data, config or trainable weights.
        """
        foreign = None
        files = [file for file in (directory / CHECKPOINT, directory / PREVIOUS) if file.is_file()]
        for i, file in enumerate(files):
            fallback = f"from {files[i + 1].name}" if i + 1 < len(files) else "from the beginning"
            try:
                tensors, metadata = _read(file)
                progress = Progress(**json.loads(metadata["progress"]))
            except (ValueError, TypeError) as error:  # TypeError: the progress has other fields
                logger.warning("%s is damaged (%s); starting %s", file, error, fallback)
                continue
            shapes = {key: tensor.shape for key, tensor in tensors.items()}
            fits = all(shapes.get(f"weight.{name}") == weight.shape for name, weight in self.weights.items())
            if metadata["fingerprint"] == fingerprint and fits:
                self._restore(tensors, progress)
                logger.info("resuming from step %d, %s", progress.step, file)
                return
            foreign = f"{file} belongs to a run with other data, another config or other trainable weights"
            if i + 1 < len(files):
                logger.warning("%s; starting %s", foreign, fallback)
        if foreign is not None:
            raise ValueError(f"{foreign}; pass another checkpoint_dir, or delete it to start from the beginning")

    def _restore(self, tensors: Mapping[str, Tensor], progress: Progress) -> None:
        self.progress = progress
        for name, weight in self.weights.items():
            weight.data.copy_(tensors[f"weight.{name}"])
        self.best = {key.removeprefix("best."): value for key, value in tensors.items() if key.startswith("best.")}
        for i, optimizer in enumerate(self.optimizers):
            state: dict[int, dict[str, Any]] = {}
            for key, value in tensors.items():
                if key.startswith(f"optimiser.{i}."):
                    _, _, j, name = key.split(".")
                    state.setdefault(int(j), {})[name] = value
            optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
        torch.set_rng_state(tensors["rng.cpu"])
        if "rng.cuda" in tensors and self.device.type == "cuda":
            torch.cuda.set_rng_state(tensors["rng.cuda"], self.device)

    def _groups(self) -> list[dict[str, Any]]:
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]


def _read(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read the tensors and metadata of a checkpoint.

    Raises:
        ValueError: the file is damaged: its digest is not the one in its metadata.
    """
    try:
        with safe_open(file, framework="pt") as stored:
            metadata = dict(stored.metadata() or {})
            tensors = {key: stored.get_tensor(key).clone() for key in stored.keys()}
    except SafetensorError as error:
        raise ValueError(str(error)) from None
    if metadata.pop("sha256", None) != _digest(tensors, metadata):
        raise ValueError("its content does not have the sha256 it was written with")
    return tensors, metadata


def _digest(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    content = json.dumps(metadata, sort_keys=True).encode() + to_safetensors(dict(tensors))
    return hashlib.sha256(content).hexdigest()
