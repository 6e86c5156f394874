"""The training loop of finetuning and pretraining. It resumes an interrupted run with byte-identical results."""

import logging
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import perf_counter

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gpt2core.batching import Batch
from gpt2core.config import PretrainConfig, TrainConfig
from gpt2core.data import Example, check_examples
from gpt2core.lora import lora_layers
from gpt2core.model import GPT2
from gpt2core.optimizers import learning_rate_factor
from gpt2core.process_group import rank_and_size, sum_gradients, summed
from gpt2core.resources import ResourceMeter, mean_utilization, peak_memory_mib
from gpt2core.step_graphs import StepGraphs, add_gradients
from gpt2core.training_mode import prepacked_weights, training_mode, trains_only_lora
from gpt2core.training_plan import FinetuningPlan, Plan, PretrainingPlan
from gpt2core.training_state import Progress, TrainingState
from gpt2core.types import TrainSummary

logger = logging.getLogger(__name__)

Log = Callable[[int, Mapping[str, float]], None]


@dataclass(frozen=True)
class TrainResult:
    """The results of a training run, except the weights.

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
            wandb_run: id of the run in wandb; "": not tracked.
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
    return _run(model, FinetuningPlan(model, train, val, config, checkpoint_dir is not None), log, checkpoint_dir)


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
    return _run(model, PretrainingPlan(model, tokens, config, checkpoint_dir is not None), log, checkpoint_dir)


def _run(model: GPT2, plan: Plan, log: Log | None, checkpoint_dir: str | Path | None) -> TrainResult:
    weights = _trainable_weights(model)
    device = model.wte.weight.device
    directory = None if checkpoint_dir is None else Path(checkpoint_dir)
    is_first = rank_and_size()[0] == 0
    if is_first and plan.config.warmup_steps >= plan.total_steps:
        logger.warning(
            "the learning rate never reaches its full value: warmup_steps is %d, but the training has %d steps",
            plan.config.warmup_steps,
            plan.total_steps,
        )
    log = log if is_first and log is not None else lambda step, values: None
    with (
        ResourceMeter(device) as meter,
        training_mode(model, plan.config),
        prepacked_weights(model),
        torch.random.fork_rng([device] if device.type == "cuda" else []),
    ):
        torch.manual_seed(plan.config.seed)  # for dropout; the order of the data has its own generators
        state = TrainingState(weights, plan.optimizers(weights), device)
        if directory is not None:
            fingerprint = plan.fingerprint()
            _resume(state, plan, directory, fingerprint, log)
        losses: list[Tensor] = []  # losses of the steps since the host last read them
        batches = _Batches(plan)
        # LoraLinear casts its inputs itself, so autocast is needed only if fp32 weights of the base are trained
        mixed = plan.config.precision == "bf16-mixed" and not trains_only_lora(model)
        add = StepGraphs(model) if plan.use_graphs else partial(add_gradients, model, mixed=mixed)
        while state.progress.step < plan.total_steps and not state.progress.should_stop_early(plan.patience):
            with _adding_batch_to_memory_errors(plan, state):
                values = _step(plan, state, batches, add, losses, meter)
            step = state.progress.step
            if values:
                log(step, values)
            if plan.is_due(step, plan.validate_every) or plan.is_due(step, plan.checkpoint_every):
                state.check_finite()
            if plan.is_due(step, plan.validate_every) and (val_loss := plan.validate()) is not None:
                state.keep_best(val_loss)
                log(step, {"val/loss": val_loss})
            if directory is not None and is_first and plan.is_due(step, plan.checkpoint_every):
                state.save(directory, fingerprint)
        state.restore_best()
    progress = state.progress
    speed = progress.tokens_seen / progress.seconds if progress.seconds else 0.0
    return TrainResult(progress.history, progress.best_val_loss, speed)


def _resume(state: TrainingState, plan: Plan, directory: Path, fingerprint: str, log: Log) -> None:
    """Read the checkpoint of an interrupted run with this fingerprint, if there is one, and log its history again."""
    state.resume(directory, fingerprint)
    if state.progress.step > plan.total_steps:
        raise ValueError(
            f"the checkpoint in {directory} is of step {state.progress.step}, but this run has "
            f"{plan.total_steps} steps; raise epochs or max_steps, or pass another checkpoint_dir"
        )
    for entry in state.progress.history:  # a tracker then has the whole curve, also after a kill
        log(int(entry["step"]), {name: value for name, value in entry.items() if name != "step"})


@contextmanager
def _adding_batch_to_memory_errors(plan: Plan, state: TrainingState) -> Iterator[None]:
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

    def __init__(self, plan: Plan) -> None:
        self._plan, self._next = plan, dict[int, list[Batch]]()

    def prepare(self, step: int) -> None:
        if step < self._plan.total_steps:
            self._next = {step: self._plan.batches(step)}

    def take(self, step: int) -> list[Batch]:
        return self._next.pop(step, None) or self._plan.batches(step)


def _step(
    plan: Plan,
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
    # the numbers of labels and tokens of all processes
    n_labels, n_tokens = map(int, summed(sum(part.n_labels for part in parts), sum(part.n_tokens for part in parts)))
    step_loss = torch.zeros((), device=state.device)
    for part in parts:
        step_loss += add_gradients(part, n_labels)
    sum_gradients([*weights.values()])
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
    return _log_entry(progress, learning_rate, float(norm), meter) if is_logged else {}


def _log_entry(progress: Progress, learning_rate: float, grad_norm: float, meter: ResourceMeter) -> dict[str, float]:
    """Return the values to log, loss and throughput since the previous entry, and add them to the history."""
    values = {
        "train/loss": progress.loss / progress.labels,
        "train/learning_rate": learning_rate,
        "train/grad_norm": grad_norm,
        "train/tokens_seen": progress.tokens_seen,
        "train/tokens_per_second": progress.tokens / (progress.seconds - progress.logged_seconds),
        **meter.read(),
    }
    progress.record(values)
    progress.loss, progress.labels, progress.tokens = 0.0, 0, 0
    progress.logged_seconds = progress.seconds
    return values


def _read_losses(losses: list[Tensor], plan: Plan, progress: Progress) -> None:
    """Add the losses of the last steps to the progress, and empty the list.

    Raises:
        FloatingPointError: a loss is not finite.
    """
    first = progress.step - len(losses) + 1
    for step, loss in enumerate(summed(*torch.stack(losses).tolist()), first):
        progress.loss += loss
        if not math.isfinite(progress.loss):
            raise FloatingPointError(
                f"the loss is {progress.loss} at step {step} ({plan.describe(step - 1)}); "
                f"lower learning_rate={plan.config.learning_rate}, raise warmup_steps, or use another precision"
            )
    losses.clear()
