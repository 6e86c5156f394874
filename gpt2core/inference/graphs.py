"""Decoding one token for every row of a `StaticRowCache`, on a GPU by replaying a CUDA graph.

A step of gpt2 is 100 kernels of a few microseconds (200 kernels without cuda.cu). Launching them one by one takes
longer than computing them; a graph launches them all at once. A graph computes at fixed addresses, so the inputs are
copied to a buffer. There is one graph per stack of adapters and number of rows, rounded up to a power of two. Without
cuda.cu, there is also one per number of columns. A graph is captured when it is first needed.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from gpt2core.inference.adapters import AdapterStack, RowAdapters
from gpt2core.inference.kv_cache import StaticRowCache
from gpt2core.inference.quantized import QuantizedModel
from gpt2core.inference.request import Request
from gpt2core.kernels import capture_graph
from gpt2core.tensors import int_tensor, to_device

logger = logging.getLogger(__name__)


Outputs = tuple[Tensor, Tensor]  # logits (B, token_count) and the most likely tokens (B)


@dataclass(frozen=True, eq=False)
class _Graph:
    graph: "torch.cuda.CUDAGraph"
    outputs: Outputs  # written by each replay


@dataclass(frozen=True, eq=False)
class _LaunchedStep:
    """A decoding step launched asynchronously, before the previous step's tokens were copied to the host."""

    requests: Sequence[Request | None]
    lengths: Sequence[int]
    stack: AdapterStack | None
    outputs: Outputs

    def covers(self, cache: StaticRowCache, stack: AdapterStack | None) -> bool:
        """Return whether this step is still the next one: no request was added, and the adapters did not change.

        Rows that became free since the launch are ignored.
        """
        current = list(zip(cache.requests, cache.lengths, strict=True))
        launched = list(zip(self.requests, self.lengths, strict=True))
        is_alike = all(row[0] is None or row == old for row, old in zip(current, launched, strict=False))
        return stack is self.stack and len(current) <= len(launched) and is_alike


class RowDecoder:
    """Computes the decoding steps of a cache's rows."""

    def __init__(self, model: QuantizedModel, cache: StaticRowCache) -> None:
        self._model, self._cache = model, cache
        # (3, max_batch): each row's last token, the position of this token, and the index of its adapter in the stack
        self._inputs = torch.zeros(3, cache.max_batch, dtype=torch.long, device=model.device)
        self._graphs: dict[tuple[int, int, AdapterStack | None], _Graph] = {}
        self._ahead: _LaunchedStep | None = None
        self.uses_graphs = model.device.type == "cuda"

    def run(self, stack: AdapterStack | None) -> Outputs:
        """Compute the logits (B, token_count) of the next token of the cache's B rows, and the most likely tokens (B).

        The next `run` or `run_ahead` overwrites these outputs. The outputs of free rows are meaningless.
        """
        cache, ahead, n_rows = self._cache, self._ahead, len(self._cache.requests)
        self._ahead = None
        if ahead is not None and ahead.covers(cache, stack):
            logits, best = ahead.outputs
        else:
            self._set_inputs(stack)
            logits, best = self._outputs(stack)
        cache.end_step()
        return logits[:n_rows], best[:n_rows]

    def run_ahead(self, tokens: Tensor, stack: AdapterStack | None) -> None:
        """Launch the next step from the last step's tokens (B), before the host reads them.

        The device computes the step while the host processes the tokens (asynchronous scheduling). If a row ends with
        its token, its result is ignored. If requests join, all results are ignored and the step is computed again.
        """
        cache, n_rows = self._cache, len(tokens)
        # Failed rows have an invalid id (-1, or token_count from sampling). It is clamped; the result is discarded.
        self._inputs[0, :n_rows] = tokens.clamp(0, self._model.config.token_count - 1)
        self._inputs[1, :n_rows].add_(1).clamp_(max=cache.n_positions - 1)
        self._ahead = _LaunchedStep([*cache.requests], [*cache.lengths], stack, self._outputs(stack))

    def _set_inputs(self, stack: AdapterStack | None) -> None:
        ids, positions, adapters = self._cache.inputs()
        indices = [-1] * len(ids) if stack is None else stack.indices(adapters)
        n, _ = self._cache.shape()
        beyond = n - len(ids)  # rows after the last request: they compute token 0 at position 0
        inputs = int_tensor([*ids, *[0] * beyond, *positions, *[0] * beyond, *indices, *[-1] * beyond])
        self._inputs[:, :n] = to_device(inputs, self._model.device).view(3, n)

    def _outputs(self, stack: AdapterStack | None) -> Outputs:
        n, width = self._cache.shape()
        return self._replay(n, width, stack) if self.uses_graphs else self._compute(n, width, stack)

    def forget_stack(self) -> None:
        """Release the graphs that use adapters, and a step that was launched ahead."""
        self._ahead = None
        self._graphs = {key: graph for key, graph in self._graphs.items() if key[2] is None}

    def _compute(self, n: int, width: int, stack: AdapterStack | None) -> Outputs:
        model, cache = self._model, self._cache
        ids, positions, adapters = self._inputs[:, :n].unbind()
        cache.begin_step(positions, width)
        hidden = model.hidden(
            ids,
            positions,
            lambda layer, qkv: cache.attend(layer, qkv, model.blocks[layer].scale),
            None if stack is None else RowAdapters(stack, adapters),
        )
        logits = model.logits(hidden)
        return logits, model.most_likely(logits)

    def _replay(self, n: int, width: int, stack: AdapterStack | None) -> Outputs:
        """Compute the same as `_compute` by a graph. If a capture fails, all later steps run without graphs."""
        key = n, width, stack
        if key not in self._graphs:
            try:
                self._graphs[key] = self._capture(n, width, stack)
            except Exception as error:  # any error: decoding does not need graphs
                logger.warning("no CUDA graph for %d rows of %d columns, decoding without: %s", n, width, error)
                self.uses_graphs = False
                self._graphs.clear()
                return self._compute(n, width, stack)
        with torch.cuda.device(self._model.device):
            self._graphs[key].graph.replay()
        return self._graphs[key].outputs

    def _capture(self, n: int, width: int, stack: AdapterStack | None) -> _Graph:
        compute, device = partial(self._compute, n, width, stack), self._model.device
        # A first run outside of the graph, since libraries allocate memory and load kernels at their first call.
        # Repeating the step gives the same results. It has no stream of its own: for each stream that ever computed a
        # matrix product, torch keeps 32 MiB (H100) for cuBLAS.
        compute()
        pool = next((captured.graph.pool() for captured in self._graphs.values()), None)
        graph, outputs = capture_graph(compute, device, pool)
        logger.debug("captured a CUDA graph for %d rows of %d columns", n, width)
        return _Graph(graph, outputs)
