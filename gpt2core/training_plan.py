"""What each step of finetuning and of pretraining computes: its batches, its validation, its optimizers."""

import hashlib
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from gpt2core.batching import Batch, pack, uses_varlen
from gpt2core.config import LoraConfig, PretrainConfig, TrainConfig
from gpt2core.data import Example
from gpt2core.lora import lora_layers
from gpt2core.losses import token_losses
from gpt2core.model import GPT2
from gpt2core.optimizers import finetuning_optimizers, pretraining_optimizers
from gpt2core.process_group import rank_and_size, summed
from gpt2core.training_mode import base_dtype, trains_only_lora

# fields that a resumed run may change: they do not affect the result of a step
_MAY_DIFFER = ("epochs", "max_steps", "patience", "devices", "gradient_checkpointing")


class Plan(ABC):
    """The constants of a training run. Steps are optimizer steps."""

    config: TrainConfig | PretrainConfig
    total_steps: int
    validate_every: int  # steps
    checkpoint_every: int  # steps
    patience: int | None = None  # validations without a new best loss after which training stops
    use_graphs = False  # batches are padded for `StepGraphs`

    @abstractmethod
    def optimizers(self, weights: Mapping[str, nn.Parameter]) -> list[torch.optim.Optimizer]: ...

    @abstractmethod
    def batches(self, step: int) -> list[Batch]:
        """Return the batches of a step, on the device. In a process group, each process gets its share."""

    @abstractmethod
    def describe(self, step: int) -> str:
        """Describe the data of a step, for messages."""

    @abstractmethod
    def fingerprint(self) -> str:
        """Return a digest of data and config, by which a checkpoint is recognized."""

    def validate(self) -> float | None:
        """Return the validation loss, in nats per token; None without validation examples."""
        return None

    def is_due(self, step: int, every: int) -> bool:
        return step >= self.total_steps or step % every == 0


class FinetuningPlan(Plan):
    """Epochs over the examples, shuffled by seed and epoch; `patience` can end them early."""

    config: TrainConfig

    def __init__(
        self, model: GPT2, train: Sequence[Example], val: Sequence[Example], config: TrainConfig, saves: bool
    ) -> None:
        """`saves`: checkpoints are written."""
        self._model, self._train, self._val, self.config = model, train, val, config
        self._n_batches, self._steps_per_epoch, self.total_steps = training_steps(len(train), config)
        self.validate_every = config.validate_every_epochs * self._steps_per_epoch if val else self.total_steps
        self.checkpoint_every = config.checkpoint_every_epochs * self._steps_per_epoch if saves else self.total_steps
        self.patience = config.patience
        self._rank, self._world_size = rank_and_size()
        self._lora = next((layer.config for _, layer in lora_layers(model)), None)
        self._device = model.wte.weight.device
        # dropout differs between examples, so a shared prefix cannot be computed once for all of them
        self._share_prefix = self._lora is None or not self._lora.dropout
        self._use_varlen = uses_varlen(self._device, base_dtype(config), model.config.head_width)
        # graphs have not been tested with dropout, where the prefix is not shared
        is_simple = trains_only_lora(model) and self._share_prefix and not config.gradient_checkpointing
        self.use_graphs = self._use_varlen and is_simple

    def optimizers(self, weights: Mapping[str, nn.Parameter]) -> list[torch.optim.Optimizer]:
        return finetuning_optimizers(weights, self.config, self._lora)

    def batches(self, step: int) -> list[Batch]:
        shares = [part[self._rank :: self._world_size] for part in self._indices(step)]
        options = self.config.loss_on, self._device, self._share_prefix, self._use_varlen, self.use_graphs
        return [pack([self._train[i] for i in share], *options) for share in shares if share]

    def describe(self, step: int) -> str:
        return f"training records {', '.join(str(i + 1) for part in self._indices(step) for i in part)}"

    def fingerprint(self) -> str:
        data = [[*example.input_ids, example.prompt_length] for example in (*self._train, *self._val)]
        return _digest(self.config, data, self._lora)

    def validate(self) -> float | None:
        if not self._val:
            return None
        config, limit = self.config, self.config.limit_val_batches
        examples = self._val[: None if limit is None else limit * config.batch_size][self._rank :: self._world_size]
        sums = token_losses(self._model, examples, config.batch_size, config.loss_on)
        loss, count = summed(sum(loss for loss, _ in sums), sum(count for _, count in sums))
        return loss / count

    def _indices(self, step: int) -> list[list[int]]:
        """Return the indices of the training examples of each batch of a step."""
        epoch, step_in_epoch = divmod(step, self._steps_per_epoch)
        order = torch.randperm(len(self._train), generator=_generator(self.config.seed, epoch)).tolist()
        size, n_parts = self.config.batch_size, self.config.gradient_accumulation_steps
        parts = range(step_in_epoch * n_parts, min((step_in_epoch + 1) * n_parts, self._n_batches))
        return [order[part * size : (part + 1) * size] for part in parts]


class PretrainingPlan(Plan):
    """A fixed number of steps over a stream of tokens, cut into sequences of the context length."""

    config: PretrainConfig

    def __init__(self, model: GPT2, tokens: Tensor, config: PretrainConfig, saves: bool) -> None:
        """`tokens`: (N,), see `pretrain`. `saves`: checkpoints are written.

        Raises:
            ValueError: there are fewer tokens than one step needs.
        """
        self._tokens, self.config, self._device = tokens, config, model.wte.weight.device
        self._length = model.config.n_positions
        self._per_step = config.batch_size * config.gradient_accumulation_steps  # sequences
        self.total_steps = self.validate_every = config.max_steps
        self.checkpoint_every = config.checkpoint_every_steps if saves else config.max_steps
        sequences = (len(tokens) - self._length - 1) // self._length
        self._steps_per_pass = sequences // self._per_step
        if self._steps_per_pass < 1:
            hint = f"lower batch_size or gradient_accumulation_steps to a product of at most {sequences}"
            if sequences < 1:  # too few even for a step of one sequence
                hint = "use a longer text, or a lower model.n_positions"
            needed = f"a step of {self._per_step} sequences of {self._length}"
            raise ValueError(f"{len(tokens)} tokens are too few for {needed}; {hint}")

    def optimizers(self, weights: Mapping[str, nn.Parameter]) -> list[torch.optim.Optimizer]:
        return pretraining_optimizers(weights, self.config)

    def batches(self, step: int) -> list[Batch]:
        """Each pass over the text starts at another random offset, and its sequences are in random order."""
        this_pass, step_in_pass = divmod(step, self._steps_per_pass)
        generator, T = _generator(self.config.seed, this_pass), self._length
        offset = int(torch.randint(T, (1,), generator=generator))
        order = torch.randperm((len(self._tokens) - offset - 1) // T, generator=generator)
        sequences = order[step_in_pass * self._per_step : (step_in_pass + 1) * self._per_step]
        index = [offset + part[:, None] * T + torch.arange(T + 1) for part in sequences.split(self.config.batch_size)]
        texts = [self._tokens[i] for i in index]  # each (B, T + 1)
        return [Batch(text[:, :-1], text[:, 1:], text[:, 1:].numel()).to(self._device) for text in texts]

    def describe(self, step: int) -> str:
        return f"pass {step // self._steps_per_pass + 1} over the text"

    def fingerprint(self) -> str:
        return _digest(self.config, self._tokens.tolist())


def training_steps(n_examples: int, config: TrainConfig) -> tuple[int, int, int]:
    """Return batches per epoch, optimizer steps per epoch, and the total number of optimizer steps of `finetune`."""
    n_batches = math.ceil(n_examples / config.batch_size)
    if config.limit_train_batches is not None:
        n_batches = min(n_batches, config.limit_train_batches)
    per_epoch = math.ceil(n_batches / config.gradient_accumulation_steps)
    total = config.epochs * per_epoch
    return n_batches, per_epoch, total if config.max_steps is None else min(total, config.max_steps)


def _generator(seed: int, epoch: int) -> torch.Generator:
    """Return the generator of an epoch. With one generator per epoch, a step's data depends only on its number."""
    digest = hashlib.sha256(f"{seed} {epoch}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))


def _digest(config: TrainConfig | PretrainConfig, data: Sequence[Any], lora: LoraConfig | None = None) -> str:
    """Return the digest of config and data, which must be equal in a resumed run, without the fields `_MAY_DIFFER`."""
    values = {key: value for key, value in asdict(config).items() if key not in _MAY_DIFFER}
    return hashlib.sha256(json.dumps([values, data, lora and asdict(lora)]).encode()).hexdigest()
