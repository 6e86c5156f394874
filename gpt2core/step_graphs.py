"""Forward and backward passes of finetuning as CUDA graphs.

Launching the 1,362 kernels of a step of gpt2-medium takes the host 52 ms; an H200 computes them in 24 ms (2026-11-28).
A graph launches all kernels at once. It computes on tensors of fixed shapes at fixed addresses. Therefore batches are
padded to few shapes (`pack`), and each shape has its own graph. A graph adds to the weights' gradient tensors: call
zero_grad(set_to_none=False) between steps, so that these keep their addresses.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from gpt2core.batching import Batch
from gpt2core.kernels import capture_graph
from gpt2core.losses import batch_losses
from gpt2core.model import GPT2
from gpt2core.sequences import VarlenSequences

logger = logging.getLogger(__name__)

MAX_GRAPHS = 64  # batches of further shapes are computed without a graph


def add_gradients(model: GPT2, batch: Batch, n_labels: int | Tensor, mixed: bool = False) -> Tensor:
    """Add the gradients of (summed loss of the batch) / n_labels to the weights' gradients; return the summed loss.

    Args:
        mixed: compute in bf16 by autocast.
    """
    with torch.autocast(model.wte.weight.device.type, torch.bfloat16, enabled=mixed):
        loss = batch_losses(model, batch).sum()
    (loss / n_labels).backward()
    return loss.detach()


@dataclass(frozen=True, eq=False)
class _Graph:
    graph: "torch.cuda.CUDAGraph"
    batch: Batch  # read by each replay
    loss: Tensor  # written by each replay


class StepGraphs:
    """`add_gradients` for padded batches on a GPU. The first batch of a shape is computed without a graph.

    The very first replay is compared with the same step without a graph. If capturing or this comparison fails,
    training continues without graphs, with a warning.
    """

    def __init__(self, model: GPT2) -> None:
        self._model = model
        self._n_labels = torch.ones((), device=model.wte.weight.device)
        self._graphs: dict[tuple[object, ...], _Graph | None] = {}  # None: the shape has occurred once
        self._is_enabled, self._is_checked = True, False

    def __call__(self, batch: Batch, n_labels: int) -> Tensor:
        """Do the same as `add_gradients`. The next call overwrites the returned sum."""
        key = _shape(batch)
        if self._is_enabled and key in self._graphs:
            try:
                return self._compute_by_graph(key, batch, n_labels)
            except Exception as error:  # any error, since training can continue without graphs
                self._stop(error)
        elif self._is_enabled and len(self._graphs) < MAX_GRAPHS:
            self._graphs[key] = None  # a warm-up: what libraries allocate at their first call must not be captured
        return self._compute_without(batch, n_labels)

    def _compute_by_graph(self, key: tuple[object, ...], batch: Batch, n_labels: int) -> Tensor:
        graph = self._graphs[key] = self._graphs[key] or self._capture(batch)
        if not self._is_checked:
            self._check(graph, batch, n_labels)
        return self._replay(graph, batch, n_labels)

    def _compute_without(self, batch: Batch, n_labels: int) -> Tensor:
        """Compute a step without a graph. If it needs the memory that graphs hold, release them and repeat it."""
        if any(self._graphs.values()):
            try:
                with _restoring_gradients(self._model, always=False):
                    return add_gradients(self._model, batch, n_labels)
            except torch.OutOfMemoryError as error:
                self._stop(error)
            torch.cuda.empty_cache()  # not in the except block: there, the error's traceback still refers to tensors
        return add_gradients(self._model, batch, n_labels)

    def _stop(self, error: Exception) -> None:
        logger.warning("no CUDA graph of a training step, training without, which is slower: %s", error)
        self._is_enabled = False
        self._graphs.clear()

    def _replay(self, graph: _Graph, batch: Batch, n_labels: int) -> Tensor:
        self._n_labels.fill_(n_labels)
        for captured, new in zip(_tensors(graph.batch), _tensors(batch), strict=True):
            captured.copy_(new)
        graph.graph.replay()
        return graph.loss

    def _check(self, graph: _Graph, batch: Batch, n_labels: int) -> None:
        """Compare a replay with the same step without a graph. The gradients are restored afterwards.

        Raises:
            RuntimeError: the loss or the gradients differ by more than rounding errors.
        """
        losses, gradients = list[Tensor](), list[list[Tensor]]()  # of the step without a graph, then of the replay
        for compute in (partial(add_gradients, self._model), partial(self._replay, graph)):
            with _restoring_gradients(self._model, always=True) as grads:
                losses.append(compute(batch, n_labels).clone())
                gradients.append([grad - before for grad, before in grads])
        norms = torch.stack([gradient.norm() for gradient in gradients[0]])
        errors = torch.stack([(plain - replayed).norm() for plain, replayed in zip(*gradients, strict=True)])
        is_equal = (errors <= 0.1 * norms + 0.001 * norms.norm()).all()  # bf16 and another order of summation
        if not bool(is_equal & ((losses[0] - losses[1]).abs() <= 0.01 * losses[0].abs())):
            raise RuntimeError("its gradients are not those of the step without a graph")
        self._is_checked = True

    def _capture(self, batch: Batch) -> _Graph:
        pool = next((graph.graph.pool() for graph in self._graphs.values() if graph is not None), None)
        compute = partial(add_gradients, self._model, batch, self._n_labels)
        graph, loss = capture_graph(compute, self._n_labels.device, pool)
        logger.debug("captured a CUDA graph of a training step of %d tokens", batch.input_ids.numel())
        return _Graph(graph, batch, loss)


@contextmanager
def _restoring_gradients(model: GPT2, always: bool) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Context manager that restores the gradients at the end: always, or only after an exception.

    It yields (gradient, copy of its previous values) for each weight.
    """
    grads = [(weight.grad, weight.grad.clone()) for weight in model.parameters() if weight.grad is not None]
    is_done = False
    try:
        yield grads
        is_done = True
    finally:
        if always or not is_done:
            for grad, before in grads:
                grad.copy_(before)


def _tensors(batch: Batch) -> Iterator[Tensor]:
    """Yield the tensors of the batch that a step reads."""
    sequences = batch.sequences
    assert isinstance(sequences, VarlenSequences)
    assert batch.labeled is not None
    assert batch.positions is not None
    yield from (batch.input_ids, batch.labels, batch.labeled, batch.positions)
    yield from (sequences.keys, sequences.key_index, sequences.ends_q, sequences.ends_k)


def _shape(batch: Batch) -> tuple[object, ...]:
    """Return the key of a batch's graph: the shapes, and the arguments of attention that are not tensors."""
    sequences = batch.sequences
    assert isinstance(sequences, VarlenSequences)
    sizes = tuple(tensor.shape for tensor in _tensors(batch))
    return sizes, sequences.shared, sequences.max_q, sequences.max_k
