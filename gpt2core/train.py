"""Finetuning and pretraining: one loop, which a killed run resumes byte for byte. Metrics leave by a callback."""

import hashlib
import json
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_safetensors
from torch import Tensor, nn

from gpt2core.checkpoint import atomic_write
from gpt2core.config import Precision, PretrainConfig, TrainConfig
from gpt2core.data import IGNORED, SHARED, Batch, Example, batches, pack
from gpt2core.lora import lora_layers
from gpt2core.model import GPT2

logger = logging.getLogger(__name__)

Log = Callable[[int, Mapping[str, float]], None]
CHECKPOINT = "checkpoint.safetensors"


@dataclass(frozen=True)
class TrainResult:
    """What a run leaves besides the weights.

    history: one entry for each logged step and each validation: `step` (optimiser steps done), and of `train/loss`,
        `train/learning_rate`, `train/grad_norm`, `train/tokens_seen`, `train/tokens_per_second` (mean since the entry
        before), `val/loss` those known at that step. Losses are nats a token.
    best_val_loss: None where there were no validation examples.
    tokens_per_second: tokens without padding, over the time spent in training steps. A beginning that the examples of
        a batch share is computed once, and counted for each.
    """

    history: list[dict[str, float]]
    best_val_loss: float | None
    tokens_per_second: float


def finetune(
    model: GPT2,
    train: Sequence[Example],
    val: Sequence[Example],
    config: TrainConfig,
    log: Log | None = None,
    checkpoint_dir: str | Path | None = None,
) -> TrainResult:
    """Train the weights that require gradients (after `add_lora`, the adapter alone), in place, with AdamW.

    At the end the model holds the weights of the best validation loss, or the last ones if `val` is empty. Frozen
    weights end as they began, whatever the precision. A checkpoint found in `checkpoint_dir` is resumed from, and the
    end is byte for byte that of a run that was never stopped, on the same kind of machine with as many threads; epochs
    and max_steps may have grown since.

    In a process group (`torch.distributed`) every process calls this with the same arguments and an equal model. Each
    takes its share of every batch, gradients are summed, and all end with the same weights; `batch_size` is that of
    all together. Rank 0 alone logs and writes checkpoints, which all read.

    Raises:
        ValueError: no examples, nothing to train, a merged adapter, or a checkpoint of other data or another config.
        FloatingPointError: the loss is no longer finite.
    """
    if not train:
        raise ValueError("there are no training examples")
    n_batches, steps_per_epoch, total_steps = training_steps(len(train), config)
    device = model.wte.weight.device
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    # dropout draws for each example, so what they share would not be computed alike
    share = not any(layer.config.dropout for _, layer in lora_layers(model))

    def batches_of(step: int) -> list[Batch]:
        epoch, place = divmod(step, steps_per_epoch)
        order = torch.randperm(len(train), generator=_generator(config.seed, epoch)).tolist()
        chosen = list(batches(train, config.batch_size, order))[:n_batches]
        first = place * config.gradient_accumulation_steps
        parts = chosen[first : first + config.gradient_accumulation_steps]
        return [pack(own, config.loss_on, device, share) for part in parts if (own := part[rank::world_size])]

    def validate() -> float:
        n = None if config.limit_val_batches is None else config.limit_val_batches * config.batch_size
        sums = token_losses(model, val[:n][rank::world_size], config.batch_size, config.loss_on)
        loss, count = _summed(sum(loss for loss, _ in sums), sum(count for _, count in sums))
        return loss / count

    loop = _Loop(
        model=model,
        config=config,
        optimisers=lambda weights: [
            torch.optim.AdamW(
                weights.values(),
                lr=config.learning_rate,
                betas=config.betas,
                weight_decay=config.weight_decay,
                fused=True,
            )
        ],
        batches_of=batches_of,
        total_steps=total_steps,
        validate=validate if val else None,
        validate_every=config.validate_every_epochs * steps_per_epoch,
        checkpoint_every=config.checkpoint_every_epochs * steps_per_epoch,
        log=log,
        fingerprint=_fingerprint(config, [[*example.input_ids, example.prompt_length] for example in (*train, *val)]),
    )
    return loop.run(checkpoint_dir)


def training_steps(n_examples: int, config: TrainConfig) -> tuple[int, int, int]:
    """Batches an epoch, optimiser steps an epoch, and optimiser steps in all, that `finetune` takes."""
    n_batches = math.ceil(n_examples / config.batch_size)
    if config.limit_train_batches is not None:
        n_batches = min(n_batches, config.limit_train_batches)
    per_epoch = math.ceil(n_batches / config.gradient_accumulation_steps)
    total = config.epochs * per_epoch
    return n_batches, per_epoch, total if config.max_steps is None else min(total, config.max_steps)


def pretrain(
    model: GPT2,
    tokens: Tensor,
    config: PretrainConfig,
    log: Log | None = None,
    checkpoint_dir: str | Path | None = None,
) -> TrainResult:
    """Train all weights, in place, to predict each next one of tokens (N,): documents with end of text between them.

    Muon (Jordan et al. 2024) orthogonalises the update of every matrix within the blocks; AdamW does the embeddings,
    biases and gains. Each pass cuts the text anew, from a random offset, into shuffled sequences of n_positions.

    Raises:
        ValueError: fewer tokens than one batch takes; otherwise as `finetune`.
    """
    T, device = model.config.n_positions, model.wte.weight.device
    per_step = config.batch_size * config.gradient_accumulation_steps
    steps_per_pass = (len(tokens) - T - 1) // T // per_step
    if steps_per_pass < 1:
        raise ValueError(
            f"{len(tokens)} tokens are too few for a step of {per_step} sequences of {T}; lower batch_size"
        )

    def batches_of(step: int) -> list[Batch]:
        this_pass, place = divmod(step, steps_per_pass)
        generator = _generator(config.seed, this_pass)
        offset = int(torch.randint(T, (1,), generator=generator))
        order = torch.randperm((len(tokens) - offset - 1) // T, generator=generator)
        parts = order[place * per_step : (place + 1) * per_step].split(config.batch_size)
        index = [offset + part[:, None] * T + torch.arange(T + 1) for part in parts]  # each (B, T + 1)
        return [Batch(tokens[i[:, :-1]].to(device), tokens[i[:, 1:]].to(device), i[:, 1:].numel()) for i in index]

    def optimisers(weights: Mapping[str, nn.Parameter]) -> list[torch.optim.Optimizer]:
        matrices = [weight for name, weight in weights.items() if name.startswith("h.") and weight.dim() == 2]
        others = [weight for name, weight in weights.items() if not (name.startswith("h.") and weight.dim() == 2)]
        muon = torch.optim.Muon(
            matrices, lr=config.learning_rate, momentum=config.momentum, weight_decay=config.weight_decay
        )
        adamw = torch.optim.AdamW(
            others, lr=config.adamw_learning_rate, betas=config.betas, weight_decay=0.0, fused=True
        )
        return [muon, adamw]

    loop = _Loop(
        model=model,
        config=config,
        optimisers=optimisers,
        batches_of=batches_of,
        total_steps=config.max_steps,
        validate=None,
        validate_every=config.max_steps,
        checkpoint_every=config.checkpoint_every_steps,
        log=log,
        fingerprint=_fingerprint(config, tokens.tolist()),
    )
    return loop.run(checkpoint_dir)


@torch.no_grad()
def token_losses(model: GPT2, examples: Sequence[Example], batch_size: int, loss_on: str) -> list[tuple[float, int]]:
    """(Summed negative log-likelihood in nats, number of tokens it counts) of each example, without dropout."""
    device, training = model.wte.weight.device, model.training
    model.eval()
    sums: list[tuple[float, int]] = []
    for part in batches(examples, batch_size):
        batch = pack(part, loss_on, device)
        losses, wanted = _losses(model, batch)
        assert batch.example is not None
        rows = batch.example[wanted]  # which example each loss belongs to
        per_row = torch.zeros(len(part), dtype=torch.float64, device=device).index_add_(0, rows, losses.double())
        sums += zip(per_row.tolist(), rows.bincount(minlength=len(part)).tolist(), strict=True)
    model.train(training)
    return sums


def _losses(model: GPT2, batch: Batch) -> tuple[Tensor, Tensor]:
    """Cross-entropy (N) at the N labelled positions, in fp32, and where those are: (G, T). The head sees only them."""
    wanted = batch.labels != IGNORED
    mask = None if batch.positions is None or batch.example is None else _packing_mask(batch.example)
    logits = model.head(model.hidden(batch.input_ids, mask, positions=batch.positions)[wanted])  # (N, V)
    return F.cross_entropy(logits.float(), batch.labels[wanted], reduction="none"), wanted


def _packing_mask(example: Tensor) -> Tensor:
    """True where a token may look, (G, T, T): back at its own example's and at the shared ones."""
    T = example.shape[1]
    back = torch.ones(T, T, dtype=torch.bool, device=example.device).tril()
    return back & ((example[:, :, None] == example[:, None]) | (example[:, None] == SHARED))


def learning_rate_factor(step: int, total_steps: int, config: TrainConfig | PretrainConfig) -> float:
    """Warm-up, plateau, linear fall (arXiv:2404.06395): the share of the learning rate that step 0, 1, … takes."""
    if step < config.warmup_steps:
        return (step + 1) / (config.warmup_steps + 1)
    decay_steps = config.decay_fraction * total_steps
    left = (total_steps - step) / decay_steps if decay_steps else 1.0
    return config.final_lr_ratio + (1 - config.final_lr_ratio) * min(1.0, left)


@dataclass
class _Progress:
    """What changes from step to step, besides tensors."""

    step: int = 0
    tokens_seen: int = 0
    seconds: float = 0.0
    best_val_loss: float | None = None
    history: list[dict[str, float]] = field(default_factory=list)
    # since the last entry of the history
    loss: float = 0.0
    labels: int = 0
    tokens: int = 0
    logged_seconds: float = 0.0


@dataclass
class _Loop:
    model: GPT2
    config: TrainConfig | PretrainConfig
    optimisers: Callable[[Mapping[str, nn.Parameter]], list[torch.optim.Optimizer]]
    batches_of: Callable[[int], list[Batch]]  # the batches of an optimiser step
    total_steps: int
    validate: Callable[[], float] | None
    validate_every: int  # steps
    checkpoint_every: int  # steps
    log: Log | None
    fingerprint: str

    def run(self, checkpoint_dir: str | Path | None) -> TrainResult:
        if any(layer.merged for _, layer in lora_layers(self.model)):
            raise ValueError("the model's adapter is merged, so its weights are not in use; unmerge_lora(model) first")
        weights = {name: weight for name, weight in self.model.named_parameters() if weight.requires_grad}
        if not weights:
            raise ValueError("no weight of the model requires gradients; add_lora(model, LoraConfig()) first")
        self.weights = weights
        self.device = self.model.wte.weight.device
        self.best: dict[str, Tensor] = {}
        self.progress = _Progress()
        file = None if checkpoint_dir is None else Path(checkpoint_dir) / CHECKPOINT
        cuda = [self.device] if self.device.type == "cuda" else []
        with _training(self.model, self.config.precision), torch.random.fork_rng(cuda):
            torch.manual_seed(self.config.seed)  # dropout's; the order of the data has generators of its own
            self.optimiser_list = self.optimisers(weights)
            self.learning_rates = [group["lr"] for optimiser in self.optimiser_list for group in optimiser.param_groups]
            if file is not None and file.is_file():
                self._load(file)
            while self.progress.step < self.total_steps:
                self._step()
                last = self.progress.step >= self.total_steps
                if self.validate is not None and (last or self.progress.step % self.validate_every == 0):
                    self._validate(self.validate())
                if file is not None and _is_first() and (last or self.progress.step % self.checkpoint_every == 0):
                    self._save(file)
            for name, tensor in self.best.items():
                weights[name].data.copy_(tensor)
        speed = self.progress.tokens_seen / self.progress.seconds if self.progress.seconds else 0.0
        return TrainResult(self.progress.history, self.progress.best_val_loss, speed)

    def _step(self) -> None:
        start = perf_counter()
        progress, config = self.progress, self.config
        factor = learning_rate_factor(progress.step, self.total_steps, config)
        groups = [group for optimiser in self.optimiser_list for group in optimiser.param_groups]
        for group, learning_rate in zip(groups, self.learning_rates, strict=True):
            group["lr"] = learning_rate * factor
        parts = self.batches_of(progress.step)
        own_labels = sum(int((part.labels != IGNORED).sum()) for part in parts)
        n_labels, n_tokens = map(int, _summed(own_labels, sum(part.n_tokens for part in parts)))
        step_loss = torch.zeros((), device=self.device)
        for part in parts:
            with self._autocast():
                loss = _losses(self.model, part)[0].sum()
            (loss / n_labels).backward()
            step_loss += loss.detach()
        _sum_gradients([*self.weights.values()])
        norm = torch.nn.utils.clip_grad_norm_(self.weights.values(), config.max_grad_norm or math.inf)
        for optimiser in self.optimiser_list:
            optimiser.step()
            optimiser.zero_grad()

        progress.step += 1
        progress.loss += _summed(float(step_loss))[0]
        progress.labels += n_labels
        progress.tokens += n_tokens
        progress.tokens_seen += n_tokens
        progress.seconds += perf_counter() - start
        if not math.isfinite(progress.loss):
            raise FloatingPointError(
                f"the loss is {progress.loss} at step {progress.step}; lower learning_rate={config.learning_rate}, "
                "raise warmup_steps, or use another precision"
            )
        if progress.step % config.log_every_steps == 0 or progress.step == self.total_steps:
            self._record(
                {
                    "train/loss": progress.loss / progress.labels,
                    "train/learning_rate": self.learning_rates[0] * factor,
                    "train/grad_norm": float(norm),
                    "train/tokens_seen": progress.tokens_seen,
                    "train/tokens_per_second": progress.tokens / (progress.seconds - progress.logged_seconds),
                }
            )
            progress.loss, progress.labels, progress.tokens = 0.0, 0, 0
            progress.logged_seconds = progress.seconds

    def _validate(self, val_loss: float) -> None:
        self._record({"val/loss": val_loss})
        if self.progress.best_val_loss is None or val_loss < self.progress.best_val_loss:
            self.progress.best_val_loss = val_loss
            self.best = {name: weight.detach().clone() for name, weight in self.weights.items()}

    def _record(self, values: dict[str, float]) -> None:
        step = self.progress.step
        if self.progress.history and self.progress.history[-1]["step"] == step:
            self.progress.history[-1].update(values)
        else:
            self.progress.history.append({"step": step, **values})
        if self.log is not None and _is_first():
            self.log(step, values)

    def _autocast(self) -> torch.autocast:
        """Needed only where fp32 weights of the base itself are trained; an adapter casts itself."""
        full = any("lora_" not in name for name in self.weights)
        return torch.autocast(self.device.type, torch.bfloat16, enabled=full and self.config.precision == "bf16-mixed")

    def _save(self, file: Path) -> None:
        tensors = {f"weight.{name}": weight.detach() for name, weight in self.weights.items()}
        tensors |= {f"best.{name}": tensor for name, tensor in self.best.items()}
        for i, optimiser in enumerate(self.optimiser_list):
            for j, state in optimiser.state_dict()["state"].items():
                tensors |= {f"optimiser.{i}.{j}.{key}": value for key, value in state.items()}
        tensors["rng.cpu"] = torch.get_rng_state()
        if self.device.type == "cuda":
            tensors["rng.cuda"] = torch.cuda.get_rng_state(self.device)
        # one file, so that it is there whole or not at all
        about = {"fingerprint": self.fingerprint, "progress": json.dumps(asdict(self.progress))}
        atomic_write(file, to_safetensors({key: value.contiguous().cpu() for key, value in tensors.items()}, about))
        logger.debug("checkpoint of step %d of %d in %s", self.progress.step, self.total_steps, file)

    def _load(self, file: Path) -> None:
        try:
            with safe_open(file, framework="pt", device=str(self.device)) as stored:
                about = stored.metadata() or {}
                tensors = {key: stored.get_tensor(key) for key in stored.keys()}
        except SafetensorError as error:
            raise ValueError(f"{file} is damaged ({error}); delete it to start from the beginning") from None
        if about.get("fingerprint") != self.fingerprint or {f"weight.{name}" for name in self.weights} - tensors.keys():
            raise ValueError(
                f"{file} is of a run with other data, another config or other trainable weights; "
                "give another checkpoint_dir, or delete it to start from the beginning"
            )
        self.progress = _Progress(**json.loads(about["progress"]))
        for name, weight in self.weights.items():
            weight.data.copy_(tensors[f"weight.{name}"])
        self.best = {key.removeprefix("best."): value for key, value in tensors.items() if key.startswith("best.")}
        for i, optimiser in enumerate(self.optimiser_list):
            state: dict[int, dict[str, Any]] = {}
            for key, value in tensors.items():
                if key.startswith(f"optimiser.{i}."):
                    _, _, j, name = key.split(".")
                    state.setdefault(int(j), {})[name] = value
            optimiser.load_state_dict({"state": state, "param_groups": optimiser.state_dict()["param_groups"]})
        torch.set_rng_state(tensors["rng.cpu"].cpu())
        if "rng.cuda" in tensors and self.device.type == "cuda":
            torch.cuda.set_rng_state(tensors["rng.cuda"].cpu(), self.device)
        logger.info("resuming from step %d of %d in %s", self.progress.step, self.total_steps, file)


def _summed(*values: float) -> list[float]:
    """The values, summed over the processes of the group."""
    if not dist.is_initialized():
        return list(values)
    total = torch.tensor(values, dtype=torch.float64, device="cuda" if dist.get_backend() == "nccl" else "cpu")
    dist.all_reduce(total)
    return total.tolist()


def _sum_gradients(weights: Sequence[nn.Parameter]) -> None:
    if not dist.is_initialized():
        return
    for weight in weights:
        if weight.grad is None:  # this process had no example of the batch
            weight.grad = torch.zeros_like(weight)
    flat = torch.cat([weight.grad.flatten() for weight in weights if weight.grad is not None])
    dist.all_reduce(flat)
    for weight, part in zip(weights, flat.split([weight.numel() for weight in weights]), strict=True):
        weight.grad = part.view_as(weight)


def _is_first() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


@contextmanager
def _training(model: GPT2, precision: Precision) -> Iterator[None]:
    """Train mode, and weights in the dtypes that the precision asks for.

    Afterwards modes and dtypes are what they were, and frozen weights hold the very values they held.
    """
    modes = [(module, module.training) for module in model.modules()]
    frozen = torch.float32 if precision == "fp32" else torch.bfloat16
    trained = torch.bfloat16 if precision == "bf16-true" else torch.float32
    before = [(parameter, parameter.data) for parameter in model.parameters()]
    for parameter, data in before:
        parameter.grad = None
        parameter.data = data.to(trained if parameter.requires_grad else frozen)
    model.train()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
        for parameter, data in before:
            parameter.grad = None
            parameter.data = parameter.data.to(data.dtype) if parameter.requires_grad else data


def _generator(seed: int, epoch: int) -> torch.Generator:
    """One for each epoch, so that the place in the data is the step's number and nothing else."""
    digest = hashlib.sha256(f"{seed} {epoch}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))


def _fingerprint(config: TrainConfig | PretrainConfig, data: Sequence[Any]) -> str:
    """Of all that a resumed run must share with the one before; how long and on how many to train may change."""
    values = {key: value for key, value in asdict(config).items() if key not in ("epochs", "max_steps", "devices")}
    return hashlib.sha256(json.dumps([values, data]).encode()).hexdigest()
