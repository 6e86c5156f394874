"""The training loop of finetuning and pretraining. It resumes an interrupted run with byte-identical results."""

import hashlib
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gpt2core.batching import Batch, pack, uses_varlen
from gpt2core.config import LoraConfig, PretrainConfig, TrainConfig
from gpt2core.data import Example, check_examples
from gpt2core.kernels import has_bf16
from gpt2core.linear import Linear, PrepackedWeight
from gpt2core.lora import lora_layers
from gpt2core.losses import token_losses
from gpt2core.model import GPT2
from gpt2core.optimizers import finetuning_optimizers, learning_rate_factor, pretraining_optimizers
from gpt2core.resources import ResourceMeter, mean_utilization, peak_memory_mib
from gpt2core.step_graphs import StepGraphs, add_gradients
from gpt2core.training_state import Progress, TrainingState
from gpt2core.types import TrainSummary

Log = Callable[[int, Mapping[str, float]], None]


@dataclass(frozen=True)
class TrainResult:
    """The results of a training besides the weights.

    history: one entry for each step after which values are logged or a validation takes place. `step` is the number of
        completed optimizer steps. Logged values are `train/loss`, `train/learning_rate`, `train/grad_norm`,
        `train/tokens_seen`, `train/tokens_per_second` (mean since the previous logged step), and the result of
        `gpt2core.resources.ResourceMeter.read`. A validation adds `val/loss`. Losses are nats per token.
    best_val_loss: None without validation examples.
    tokens_per_second: tokens without padding, divided by the time spent in training steps. A prefix that the examples
        of a batch share is computed once, but counted for each example.
    """

    history: list[dict[str, float]]
    best_val_loss: float | None
    tokens_per_second: float

    def summary(self, wandb_run: str = "") -> TrainSummary:
        """Summarize the history: the last logged values, mean utilization and peak memory.

        Args:
            wandb_run: id of the training's run in wandb; "": not tracked.
        """
        last = {name: value for entry in self.history for name, value in entry.items()}
        return TrainSummary(
            loss=last["train/loss"],
            val_loss=self.best_val_loss,
            tokens_seen=last["train/tokens_seen"],
            tokens_per_second=self.tokens_per_second,
            utilization=mean_utilization(self.history),
            peak_memory_mib=peak_memory_mib(self.history),
            wandb_run=wandb_run,
        )


def finetune(
    model: GPT2,
    train: Sequence[Example],
    val: Sequence[Example],
    config: TrainConfig,
    log: Log | None = None,
    checkpoint_dir: str | Path | None = None,
) -> TrainResult:
    """Train the weights that require gradients, in place, with AdamW. After `add_lora`, these are only the adapter's.

    With `patience`, training stops early after that many validations in a row without a new best loss. At the end, the
    model has the weights with the best validation loss, or the last weights if `val` is empty. Frozen weights do not
    change, in any precision.

    Training resumes from a checkpoint in `checkpoint_dir`. The result then has the same bytes as the result of an
    uninterrupted run on the same kind of machine with the same number of threads. On a GPU it is equal up to rounding,
    since the backward pass of attention has no fixed order of summation. `epochs` and `max_steps` may be larger than in
    the interrupted run. A damaged checkpoint is skipped with a warning. `log` first gets the entries of the interrupted
    run.

    In a process group (`torch.distributed`), every process calls this with the same arguments and an equal model. Each
    process computes its share of every batch. Gradients are summed, so all processes get the same weights. `batch_size`
    is the number of records of all processes together. Only rank 0 logs and writes checkpoints; all ranks read them.

    Raises:
        ValueError: there are no examples, an example does not fit the model, no weight requires gradients, the adapter
            is merged, or the checkpoint has other data, another config or more steps.
        FloatingPointError: the loss or a weight is not finite.
    """
    if not train:
        raise ValueError("there are no training examples")
    for name, examples in (("training", train), ("validation", val)):
        check_examples(name, examples, model.config)
    if config.patience is not None and not val:
        raise ValueError(f"patience={config.patience} needs validation examples, but there are none")
    if config.devices > 1 and not dist.is_initialized():
        raise ValueError(
            f"devices is {config.devices}, but this is one process; use finetune_adapter of gpt2core.distributed"
        )
    n_batches, steps_per_epoch, total_steps = training_steps(len(train), config)
    device = model.wte.weight.device
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    lora = next((layer.config for _, layer in lora_layers(model)), None)
    # dropout differs between examples, so a shared prefix cannot be computed once for all of them
    share_prefix = lora is None or not lora.dropout
    use_varlen = uses_varlen(device, _base_dtype(config), model.config.head_width)
    # graphs have not been tested with dropout, where share_prefix is false
    use_graphs = use_varlen and _trains_only_lora(model) and share_prefix and not config.gradient_checkpointing

    def indices_of(step: int) -> list[list[int]]:
        epoch, step_in_epoch = divmod(step, steps_per_epoch)
        order = torch.randperm(len(train), generator=_generator(config.seed, epoch)).tolist()
        first = step_in_epoch * config.gradient_accumulation_steps
        parts = range(first, min(first + config.gradient_accumulation_steps, n_batches))
        return [order[part * config.batch_size : (part + 1) * config.batch_size] for part in parts]

    def batches_of(step: int) -> list[Batch]:
        shares = [part[rank::world_size] for part in indices_of(step)]
        options = config.loss_on, device, share_prefix, use_varlen, use_graphs
        return [pack([train[i] for i in own], *options) for own in shares if own]

    def describe(step: int) -> str:
        return f"training records {', '.join(str(i + 1) for part in indices_of(step) for i in part)}"

    def validate() -> float:
        n = None if config.limit_val_batches is None else config.limit_val_batches * config.batch_size
        sums = token_losses(model, val[:n][rank::world_size], config.batch_size, config.loss_on)
        loss, count = _summed(sum(loss for loss, _ in sums), sum(count for _, count in sums))
        return loss / count

    plan = _Plan(
        config=config,
        optimizers=lambda weights: finetuning_optimizers(weights, config, lora),
        batches_of=batches_of,
        describe=describe,
        total_steps=total_steps,
        validate=validate if val else None,
        validate_every=config.validate_every_epochs * steps_per_epoch if val else total_steps,
        checkpoint_every=total_steps if checkpoint_dir is None else config.checkpoint_every_epochs * steps_per_epoch,
        patience=config.patience,
        use_graphs=use_graphs,
        fingerprint=_fingerprint(
            config, [[*example.input_ids, example.prompt_length] for example in (*train, *val)], lora
        ),
    )
    return _run(model, plan, log, checkpoint_dir)


def training_steps(n_examples: int, config: TrainConfig) -> tuple[int, int, int]:
    """Return batches per epoch, optimizer steps per epoch, and the total number of optimizer steps of `finetune`."""
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
    """Train all weights, in place, to predict each next token of a text.

    Muon (Jordan et al. 2024) orthogonalizes the update of every matrix within the blocks. AdamW updates embeddings,
    biases and gains; with `optimizer: adamw`, it updates all weights. Each pass over the text starts at another random
    offset, and cuts the text into sequences of n_positions tokens in random order.

    Args:
        tokens: (N,), documents with end of text between them.

    Raises:
        ValueError: there are fewer tokens than one step needs; otherwise as `finetune`.
    """
    T, device = model.config.n_positions, model.wte.weight.device
    per_step = config.batch_size * config.gradient_accumulation_steps
    sequences = (len(tokens) - T - 1) // T
    steps_per_pass = sequences // per_step
    if steps_per_pass < 1:
        way_out = f"lower batch_size or gradient_accumulation_steps to a product of at most {sequences}"
        if sequences < 1:  # too few even for a step of one sequence
            way_out = "use a longer text, or a lower model.n_positions"
        raise ValueError(f"{len(tokens)} tokens are too few for a step of {per_step} sequences of {T}; {way_out}")

    def batches_of(step: int) -> list[Batch]:
        this_pass, step_in_pass = divmod(step, steps_per_pass)
        generator = _generator(config.seed, this_pass)
        offset = int(torch.randint(T, (1,), generator=generator))
        order = torch.randperm((len(tokens) - offset - 1) // T, generator=generator)
        parts = order[step_in_pass * per_step : (step_in_pass + 1) * per_step].split(config.batch_size)
        index = [offset + part[:, None] * T + torch.arange(T + 1) for part in parts]  # each (B, T + 1)
        return [Batch(tokens[i[:, :-1]], tokens[i[:, 1:]], i[:, 1:].numel()).to(device) for i in index]

    plan = _Plan(
        config=config,
        optimizers=lambda weights: pretraining_optimizers(weights, config),
        batches_of=batches_of,
        describe=lambda step: f"pass {step // steps_per_pass + 1} over the text",
        total_steps=config.max_steps,
        validate=None,
        validate_every=config.max_steps,
        checkpoint_every=config.max_steps if checkpoint_dir is None else config.checkpoint_every_steps,
        patience=None,
        use_graphs=False,
        fingerprint=_fingerprint(config, tokens.tolist()),
    )
    return _run(model, plan, log, checkpoint_dir)


@dataclass(frozen=True)
class _Plan:
    """The constants of a training."""

    config: TrainConfig | PretrainConfig
    optimizers: Callable[[Mapping[str, nn.Parameter]], list[torch.optim.Optimizer]]
    batches_of: Callable[[int], list[Batch]]  # the batches of an optimizer step
    describe: Callable[[int], str]  # the data of an optimizer step, for messages
    total_steps: int
    validate: Callable[[], float] | None  # the validation loss
    validate_every: int  # steps
    checkpoint_every: int  # steps
    patience: int | None  # validations without a new best loss after which training stops
    use_graphs: bool  # batches are padded for `StepGraphs`
    fingerprint: str  # identifies data and config of a checkpoint

    def is_due(self, step: int, every: int) -> bool:
        return step >= self.total_steps or step % every == 0


def _run(model: GPT2, plan: _Plan, log: Log | None, checkpoint_dir: str | Path | None) -> TrainResult:
    weights = _trainable_weights(model)
    device = model.wte.weight.device
    directory = None if checkpoint_dir is None else Path(checkpoint_dir)
    is_first = not dist.is_initialized() or dist.get_rank() == 0
    log = log if is_first and log is not None else lambda step, values: None
    with (
        ResourceMeter(device) as meter,
        _training(model, plan.config),
        _prepacked_weights(model),
        torch.random.fork_rng([device] if device.type == "cuda" else []),
    ):
        torch.manual_seed(plan.config.seed)  # for dropout; the order of the data has its own generators
        state = TrainingState(weights, plan.optimizers(weights), device)
        if directory is not None:
            state.resume(directory, plan.fingerprint)
            if state.progress.step > plan.total_steps:
                raise ValueError(
                    f"the checkpoint in {directory} is of step {state.progress.step}, but this training has "
                    f"{plan.total_steps} steps; raise epochs or max_steps, or pass another checkpoint_dir"
                )
            for entry in state.progress.history:  # a tracker then has the whole curve, also after a kill
                log(int(entry["step"]), {name: value for name, value in entry.items() if name != "step"})
        losses: list[Tensor] = []  # losses of the steps since the host last read them
        batches = _Batches(plan)
        # LoraLinear casts its inputs itself, so autocast is needed only if fp32 weights of the base are trained
        mixed = plan.config.precision == "bf16-mixed" and not _trains_only_lora(model)
        add = StepGraphs(model) if plan.use_graphs else partial(add_gradients, model, mixed=mixed)
        while state.progress.step < plan.total_steps and not state.progress.should_stop_early(plan.patience):
            with _adding_batch_to_memory_errors(plan, state):
                values = _step(plan, state, batches, add, losses, meter)
            step = state.progress.step
            if values:
                log(step, values)
            if plan.is_due(step, plan.validate_every) or plan.is_due(step, plan.checkpoint_every):
                state.check_finite()
            if plan.validate is not None and plan.is_due(step, plan.validate_every):
                val_loss = plan.validate()
                state.keep_best(val_loss)
                log(step, {"val/loss": val_loss})
            if directory is not None and is_first and plan.is_due(step, plan.checkpoint_every):
                state.save(directory, plan.fingerprint)
        state.restore_best()
    progress = state.progress
    speed = progress.tokens_seen / progress.seconds if progress.seconds else 0.0
    return TrainResult(progress.history, progress.best_val_loss, speed)


@contextmanager
def _adding_batch_to_memory_errors(plan: _Plan, state: TrainingState) -> Iterator[None]:
    """Context manager that adds the batch to out-of-memory errors; the allocator's own message has only a size."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        named = re.search("out of memory|allocate memory|could not create a", str(error))  # CUDA, CPU, oneDNN
        if isinstance(error, RuntimeError) and not named:
            raise
        raise MemoryError(
            f"not enough memory for step {state.progress.step + 1} ({plan.describe(state.progress.step)}); lower "
            f"batch_size={plan.config.batch_size}, and raise gradient_accumulation_steps by the same factor"
        ) from None


def _trainable_weights(model: GPT2) -> dict[str, nn.Parameter]:
    if any(layer.merged for _, layer in lora_layers(model)):
        raise ValueError("the model's adapter is merged, so its weights are not in use; unmerge_lora(model) first")
    weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    if not weights:
        raise ValueError("no weight of the model requires gradients; add_lora(model, LoraConfig()) first")
    return weights


class _Batches:
    """The batches of each optimizer step. With a GPU, the batches of the next step are prepared while it computes."""

    def __init__(self, plan: _Plan) -> None:
        self._plan, self._next = plan, dict[int, list[Batch]]()

    def prepare(self, step: int) -> None:
        if step < self._plan.total_steps:
            self._next = {step: self._plan.batches_of(step)}

    def take(self, step: int) -> list[Batch]:
        return self._next.pop(step, None) or self._plan.batches_of(step)


def _step(
    plan: _Plan,
    state: TrainingState,
    batches: _Batches,
    add_gradients: Callable[[Batch, int], Tensor],
    losses: list[Tensor],
    meter: ResourceMeter,
) -> dict[str, float]:
    """Take one optimizer step. Return the values to log; they are empty unless a log entry is due.

    A GPU computes while the host prepares the next steps. Therefore the host reads from it only if a log entry, a
    validation or a checkpoint is due.

    Args:
        losses: losses, on the device, of the steps since the last read by the host; a read empties the list.
    """
    start = perf_counter()
    config, progress, weights = plan.config, state.progress, state.weights
    learning_rate = state.scale_learning_rates(learning_rate_factor(progress.step, plan.total_steps, config))
    parts = batches.take(progress.step)
    own_labels, own_tokens = sum(part.n_labels for part in parts), sum(part.n_tokens for part in parts)
    n_labels, n_tokens = map(int, _summed(own_labels, own_tokens))
    step_loss = torch.zeros((), device=state.device)
    for part in parts:
        step_loss += add_gradients(part, n_labels)
    _sum_gradients([*weights.values()])
    norm = torch.nn.utils.clip_grad_norm_(weights.values(), config.max_grad_norm or math.inf)
    for optimizer in state.optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=not plan.use_graphs)

    losses.append(step_loss)
    progress.step += 1
    if state.device.type == "cuda":  # before the host waits for the GPU
        batches.prepare(progress.step)
    may_stop = plan.patience is not None and plan.is_due(progress.step, plan.validate_every)
    is_logged = may_stop or plan.is_due(progress.step, config.log_every_steps)
    is_saved = plan.is_due(progress.step, plan.validate_every) or plan.is_due(progress.step, plan.checkpoint_every)
    if is_logged or is_saved or state.device.type == "cpu":
        _read_losses(losses, plan, progress)
    progress.labels += n_labels
    progress.tokens += n_tokens
    progress.tokens_seen += n_tokens
    progress.seconds += perf_counter() - start
    if not is_logged:
        return {}
    values = {
        "train/loss": progress.loss / progress.labels,
        "train/learning_rate": learning_rate,
        "train/grad_norm": float(norm),
        "train/tokens_seen": progress.tokens_seen,
        "train/tokens_per_second": progress.tokens / (progress.seconds - progress.logged_seconds),
        **meter.read(),
    }
    progress.record(values)
    progress.loss, progress.labels, progress.tokens = 0.0, 0, 0
    progress.logged_seconds = progress.seconds
    return values


def _read_losses(losses: list[Tensor], plan: _Plan, progress: Progress) -> None:
    """Add the losses of the last steps to the progress, and empty the list.

    Raises:
        FloatingPointError: a loss is not finite.
    """
    first = progress.step - len(losses) + 1
    for step, loss in enumerate(_summed(*torch.stack(losses).tolist()), first):
        progress.loss += loss
        if not math.isfinite(progress.loss):
            raise FloatingPointError(
                f"the loss is {progress.loss} at step {step} ({plan.describe(step - 1)}); "
                f"lower learning_rate={plan.config.learning_rate}, raise warmup_steps, or use another precision"
            )
    losses.clear()


def _summed(*values: float) -> list[float]:
    """Return the values, each summed over the processes of the group."""
    if not dist.is_initialized():
        return list(values)
    total = torch.tensor(values, dtype=torch.float64, device="cuda" if dist.get_backend() == "nccl" else "cpu")
    dist.all_reduce(total)
    return total.tolist()


def _sum_gradients(weights: Sequence[nn.Parameter]) -> None:
    if not dist.is_initialized():
        return
    for weight in weights:
        if weight.grad is None:  # this process had no example in the batch
            weight.grad = torch.zeros_like(weight)
    grads = [weight.grad for weight in weights if weight.grad is not None]
    flat = torch.cat([grad.flatten() for grad in grads])
    dist.all_reduce(flat)
    for grad, part in zip(grads, flat.split([grad.numel() for grad in grads]), strict=True):
        grad.copy_(part.view_as(grad))  # in place: a CUDA graph adds to this tensor


def _base_dtype(config: TrainConfig | PretrainConfig) -> torch.dtype:
    """Return the dtype of frozen weights and activations."""
    return torch.float32 if config.precision == "fp32" else torch.bfloat16


@contextmanager
def _training(model: GPT2, config: TrainConfig | PretrainConfig) -> Iterator[None]:
    """Context manager that sets train mode, gradient checkpointing, determinism, and the weights' dtypes by the config.

    At the end, modes and dtypes are restored, and frozen weights have exactly their previous values.
    """
    modes = [(module, module.training) for module in model.modules()]
    frozen = _base_dtype(config)
    trained = torch.bfloat16 if config.precision == "bf16-true" else torch.float32
    checkpointing, deterministic = model.gradient_checkpointing, torch.are_deterministic_algorithms_enabled()
    before = []  # the weights that are converted, and their data
    for parameter in model.parameters():
        dtype = trained if parameter.requires_grad else frozen
        if parameter.requires_grad or parameter.dtype != dtype:
            before.append((parameter, parameter.data))
        parameter.grad = None
        parameter.data = parameter.data.to(dtype)
    model.train()
    model.gradient_checkpointing = isinstance(config, TrainConfig) and config.gradient_checkpointing
    torch.use_deterministic_algorithms(deterministic or (isinstance(config, TrainConfig) and config.deterministic))
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(deterministic)
        model.gradient_checkpointing = checkpointing
        for module, training in modes:
            module.training = training
        for parameter, data in before:
            parameter.grad = None
            parameter.data = parameter.data.to(data.dtype) if parameter.requires_grad else data


def _trains_only_lora(model: GPT2) -> bool:
    return all("lora_" in name for name, weight in model.named_parameters() if weight.requires_grad)


@contextmanager
def _prepacked_weights(model: GPT2) -> Iterator[None]:
    """Context manager that prepacks the weights if only an adapter is trained, on a bf16 base on a CPU.

    A prepacked matrix has two copies. Its original parameter is emptied for this time; otherwise, three copies would be
    in memory.
    """
    only_lora = _trains_only_lora(model) and not any(layer.config.dora for _, layer in lora_layers(model))
    head = model.wte.weight.data
    is_prepackable = only_lora and head.device.type == "cpu" and head.dtype == torch.bfloat16 and has_bf16()
    layers = [module for module in model.modules() if isinstance(module, Linear)] if is_prepackable else []
    try:
        for layer in layers:
            layer.prepacked = PrepackedWeight.make(layer.weight.data)
            layer.weight.data = head.new_empty(0)
        model.prepacked_head = PrepackedWeight.make(head) if is_prepackable else None
        yield
    finally:
        for layer in layers:
            if layer.prepacked is not None:
                layer.weight.data, layer.prepacked = layer.prepacked.weight.to_dense(), None
        model.prepacked_head = None


def _generator(seed: int, epoch: int) -> torch.Generator:
    """Return the generator of an epoch. With one generator per epoch, a step's data depends only on its number."""
    digest = hashlib.sha256(f"{seed} {epoch}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))


def _fingerprint(config: TrainConfig | PretrainConfig, data: Sequence[Any], lora: LoraConfig | None = None) -> str:
    """Return the digest of config and data, which must be equal in a resumed run, without the fields `_MAY_DIFFER`."""
    values = {key: value for key, value in asdict(config).items() if key not in _MAY_DIFFER}
    return hashlib.sha256(json.dumps([values, data, lora and asdict(lora)]).encode()).hexdigest()


# fields that a resumed run may change: they do not affect the result of a step
_MAY_DIFFER = ("epochs", "max_steps", "patience", "devices", "gradient_checkpointing")
