"""Continuous batching: decides which requests wait, prefill and decode, and what the next step computes.

A step is one forward pass over one token of every decoding request and over the next chunks of unprocessed prompts. The
weights are read from memory once for all of them (Orca, OSDI 2022; chunked prefill: arXiv:2308.16369).
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from time import monotonic

from gpt2core.inference.adapters import Adapter
from gpt2core.inference.kv_cache import (
    BLOCK,
    BLOCK_CUDA,
    AlignedRowCache,
    PrefillCache,
    PrefixCache,
    RowCache,
    StaticRowCache,
)
from gpt2core.inference.quantized import QuantizedModel
from gpt2core.inference.request import EngineClosed, Request

Output = int | Exception  # result of one request in a step: its next token, or the exception that ended the request

PREFILL_TOKENS = 256  # maximum number of prompt tokens per step: limits how long prompts delay decoding requests
PREFILL_TOKENS_CUDA = 4096  # a GPU computes this many tokens in about the same time
PREFIX_BYTES, PREFIX_BYTES_CUDA = 64 * 2**20, 2**30  # maximum size of the prefix cache


@dataclass(frozen=True)
class PrefillChunk:
    """The next `n` tokens of a prompt."""

    prefill: PrefillCache
    n: int
    is_last: bool

    @property
    def request(self) -> Request:
        return self.prefill.request

    @property
    def positions(self) -> range:
        return range(self.prefill.length, self.prefill.length + self.n)


@dataclass(frozen=True)
class Step:
    """The work of one forward pass: one token of each row of the row cache, then the chunks of prompts."""

    rows: Sequence[Request | None]  # None: a free row, whose result is ignored
    chunks: Sequence[PrefillChunk]

    @property
    def sampled(self) -> list[Request | None]:
        """Requests that get a token from this step: the rows (None: free), then the prompts that it completes."""
        return [*self.rows, *(chunk.request for chunk in self.chunks if chunk.is_last)]


class Scheduler:
    """Moves requests from the queue into the running batch, first come, first served.

    It is not thread-safe: the engine locks calls from other threads.
    """

    def __init__(self, model: QuantizedModel, max_batch: int, static_cache: bool | None = None) -> None:
        """
        Args:
            static_cache: keep rows at fixed addresses, as CUDA graphs require; None: only on a GPU.
        """
        on_gpu = model.device.type == "cuda"
        cache = StaticRowCache if static_cache or (static_cache is None and on_gpu) else AlignedRowCache
        if cache is StaticRowCache and model.is_native:
            raise ValueError("a static cache is not implemented for weights 'int8'; use bf16 or fp32")
        self.row_cache: RowCache = cache(model.config, model.cache_dtype, model.device, max_batch)
        self._model, self._max_batch = model, max_batch
        self._waiting: deque[Request] = deque()
        self._prefills: list[PrefillCache] = []
        self._prefix_cache = PrefixCache(PREFIX_BYTES_CUDA, BLOCK_CUDA) if on_gpu else PrefixCache(PREFIX_BYTES, BLOCK)

    @property
    def n_waiting(self) -> int:
        return len(self._waiting)

    @property
    def n_running(self) -> int:
        return len(self._prefills) + self.row_cache.n_active

    @property
    def n_cached_tokens(self) -> int:
        """Number of cached tokens of running requests."""
        return sum(self.row_cache.lengths) + sum(prefill.length for prefill in self._prefills)

    @property
    def n_cached_prefix_tokens(self) -> int:
        return self._prefix_cache.n_tokens

    def add(self, request: Request) -> None:
        self._waiting.append(request)

    def admit(self) -> None:
        """End cancelled requests and requests past their deadline; then move waiting ones into the running batch."""
        now = monotonic()
        for request in [request for request in self._waiting if request.must_end(now)]:
            self._waiting.remove(request)
            request.finish_early()
        for prefill in [prefill for prefill in self._prefills if prefill.request.must_end(now)]:
            self._prefills.remove(prefill)
            prefill.request.finish_early()
        for row, running in enumerate(self.row_cache.requests):
            if running is not None and running.must_end(now):
                self.row_cache.remove(row)
                running.finish_early()
        while self._waiting and self.n_running < self._max_batch:
            request, model = self._waiting.popleft(), self._model
            # prompt_logprobs need the hidden states of all prompt tokens, and the prefix cache does not store these
            find = not request.has_prompt_logprobs
            prefix = self._prefix_cache.find(request.adapter, request.input_ids) if find else []
            self._prefills.append(PrefillCache(request, model.config, model.cache_dtype, model.device, prefix))

    def next_step(self) -> Step | None:
        """Return the next step; None if no request is running."""
        self.row_cache.compact()
        budget = PREFILL_TOKENS if self._model.device.type == "cpu" else PREFILL_TOKENS_CUDA
        chunks = []
        for prefill in self._prefills:
            if n := min(budget, prefill.remaining):
                chunks.append(PrefillChunk(prefill, n, is_last=n == prefill.remaining))
                budget -= n
        return Step(list(self.row_cache.requests), chunks) if self.n_running else None

    def complete_step(self, step: Step, outputs: Sequence[Output]) -> None:
        """Give the requests of `step.sampled` their outputs.

        Rows of finished requests become free. Requests whose prompt is completely processed get a row.
        """
        n_rows = len(step.rows)
        for row, (request, output) in enumerate(zip(step.rows, outputs[:n_rows], strict=True)):
            if request is not None and _is_last(request, output):
                self.row_cache.remove(row)
        finished_prefills = [chunk.prefill for chunk in step.chunks if chunk.is_last]
        for prefill, output in zip(finished_prefills, outputs[n_rows:], strict=True):
            self._prefills.remove(prefill)
            if not isinstance(output, Exception):
                self._prefix_cache.store(prefill)
            if not _is_last(prefill.request, output):
                self.row_cache.add(prefill)

    def uses(self, adapter: Adapter) -> bool:
        """Return whether a waiting or running request uses the adapter."""
        running = (*(prefill.request for prefill in self._prefills), *self.row_cache.requests)
        return any(request is not None and request.adapter is adapter for request in (*self._waiting, *running))

    def adapters_in_use(self) -> tuple[set[Adapter], set[Adapter]]:
        """Return the adapters of running requests and the adapters of waiting requests."""
        running = (*(prefill.request for prefill in list(self._prefills)), *list(self.row_cache.requests))
        return (
            {request.adapter for request in running if request is not None and request.adapter is not None},
            {request.adapter for request in self._waiting if request.adapter is not None},
        )

    def drop_prefixes(self, adapter: Adapter) -> None:
        """Remove the cached prefixes that were computed with the adapter."""
        self._prefix_cache.drop(adapter)

    def cancel_waiting(self) -> None:
        while self._waiting:
            self._waiting.popleft().finish("cancelled")

    def cancel_running(self, error: EngineClosed | None = None) -> None:
        for request in (*(prefill.request for prefill in self._prefills), *self.row_cache.requests):
            if request is not None:
                request.finish("cancelled", error)
        self._prefills.clear()
        self.row_cache.clear()


def _is_last(request: Request, output: Output) -> bool:
    """Give the request its output; return whether the request has ended."""
    if isinstance(output, Exception):
        request.fail(output)
        return True
    return request.append(output)
