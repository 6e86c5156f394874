"""Decoding for many at once: requests join and leave between steps, and none changes another's reply. Knows no HTTP.

A step is one forward over a token of every running reply and over a share of the prompts that are still to be read, so
weights are read once for all of them (continuous batching, Orca, OSDI 2022; chunked prefill, arXiv:2308.16369).
"""

import ctypes
import logging
import os
from collections import deque
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from threading import Condition, Thread
from time import monotonic
from types import TracebackType
from typing import Literal, Self

import torch
from torch import Tensor

from gpt2core.checkpoint import read_adapter
from gpt2core.config import GenerationConfig
from gpt2core.generate import check_prompt, make_generator, sample_token
from gpt2core.inference.kv_cache import BLOCK, Prefill, PrefixCache, Rows
from gpt2core.inference.quantized import AdapterStack, PackedModel, RowAdapters, adapter_matrices, pack_fastest
from gpt2core.inference.request import Adapter, EngineClosed, Request, TokenLogprobs
from gpt2core.model import GPT2

logger = logging.getLogger(__name__)

Weights = Literal["auto", "fp32", "bf16", "int8"]
PREFILL_TOKENS = 256  # of prompts, that a step reads at most: bounds how long running replies wait for a long prompt
PREFIX_BYTES = 64 * 2**20


class EngineFull(RuntimeError):
    """The queue holds as many requests as it may."""


class Engine:
    """Use as a context manager: its thread ends with the block, and what is unfinished then is cancelled."""

    def __init__(
        self, model: GPT2, max_batch: int = 16, weights: Weights = "auto", max_queue: int | None = None
    ) -> None:
        """
        Args:
            model: taken with its LoRA layers merged; must not change while the engine lives.
            max_batch: replies that are decoded at the same time; others wait, first come first served.
            weights: "auto" measures and takes the fastest that predicts as fp32 does.
            max_queue: how many may wait; None: any number.
        """
        if max_batch < 1:
            raise ValueError(f"max_batch is {max_batch}; it must be at least 1")
        self.packed = pack_fastest(model, max_batch) if weights == "auto" else PackedModel(model, weights)
        self.device = model.wte.weight.device
        self.max_batch, self.max_queue = max_batch, max_queue
        self._adapters: dict[str, Adapter] = {}
        self._changed = Condition()
        self._waiting: deque[Request] = deque()
        self._reading: list[Prefill] = []
        self._rows = Rows(self.packed, max_batch, self.device)
        self._prefixes = PrefixCache(PREFIX_BYTES)
        self._stack: tuple[tuple[Adapter, ...], AdapterStack] | None = None
        self._closed = False
        self._thread = Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Begin to work; a context manager does it by itself."""
        _end_workers()
        self._thread.start()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Cancel what is unfinished and end the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if self._thread.is_alive():
            self._thread.join()

    def submit(
        self,
        input_ids: Sequence[int],
        config: GenerationConfig,
        adapter: str | None = None,
        deadline: float | None = None,
        on_progress: Callable[[Request], object] | None = None,
        logprobs: int | None = None,
    ) -> Request:
        """Ask for a reply to the prompt; returns at once.

        Args:
            adapter: the name of a loaded one; None is the model as it was given.
            deadline: in `time.monotonic`'s seconds; a reply unfinished then ends with what there is of it.
            on_progress: called by the engine's thread after each token and at the end; must be quick, and not raise.
            logprobs: how many of the most likely tokens are wanted beside each token's own; None: no logprobs at all.

        Raises:
            ValueError: a prompt that `generate` refuses too, an adapter that is not loaded, or logprobs out of range.
            EngineFull: later there may be room.
            EngineClosed: there will be none.
        """
        _end_workers()
        check_prompt(input_ids, self.packed.config)
        if logprobs is not None and not 0 <= logprobs <= self.packed.config.vocab_size:
            raise ValueError(f"logprobs is {logprobs}; it must be from 0 to {self.packed.config.vocab_size}, or None")
        with self._changed:
            if self._closed:
                raise EngineClosed("the engine is closed")
            if adapter is not None and adapter not in self._adapters:
                loaded = ", ".join(sorted(self._adapters)) or "none"
                raise ValueError(f"no adapter is called {adapter!r}; loaded: {loaded}")
            if self.max_queue is not None and len(self._waiting) >= self.max_queue:
                raise EngineFull(f"{len(self._waiting)} requests wait already; try again later")
            room = min(config.max_new_tokens, self.packed.config.n_positions - len(input_ids))
            own = None if adapter is None else self._adapters[adapter]
            generator = make_generator(config, self.device)
            request = Request(list(input_ids), config, room, own, deadline, on_progress, generator, logprobs)
            self._waiting.append(request)
            self._changed.notify_all()
        return request

    def load_adapter(self, name: str, directory: str | Path) -> None:
        """Add an adapter, or put another in its place; replies that have begun keep the one they began with.

        Raises:
            FileNotFoundError, ValueError: as `gpt2core.checkpoint.load_adapter`.
        """
        lora, state = read_adapter(directory, self.packed.config, self.device)
        adapter = Adapter(adapter_matrices(self.packed.config, lora, state, self.packed.dtype, self.device))
        _end_workers()
        with self._changed:
            self._adapters[name] = adapter

    def unload_adapter(self, name: str) -> None:
        """Forget an adapter; replies that have begun keep it.

        Raises:
            KeyError: there is none of that name.
        """
        with self._changed:
            del self._adapters[name]

    @property
    def adapters(self) -> list[str]:
        with self._changed:
            return sorted(self._adapters)

    def stats(self) -> dict[str, int]:
        """Requests waiting and running; tokens whose keys and values are kept, of those running and of beginnings."""
        with self._changed:
            running = len(self._reading) + self._rows.n_active
            cached = sum(self._rows.lengths) + sum(prefill.length for prefill in self._reading)
            return {
                "waiting": len(self._waiting),
                "running": running,
                "cached_tokens": cached,
                "cached_prefix_tokens": len(self._prefixes) * BLOCK,
            }

    def _run(self) -> None:
        with torch.inference_mode():
            while True:
                with self._changed:
                    while not (self._closed or self._waiting or self._reading or self._rows.n_active):
                        self._changed.wait()
                    if self._closed:
                        break
                    self._leave_and_join()
                try:
                    self._step()
                except Exception as error:
                    logger.exception("a step failed; the requests in it are lost")
                    self._drop_running(EngineClosed(f"the step failed: {error}"))
        with self._changed:
            waiting = [*self._waiting]
            self._waiting.clear()
        for request in waiting:
            request.finish("cancelled")
        self._drop_running(None)

    def _drop_running(self, error: EngineClosed | None) -> None:
        for request in [*(prefill.request for prefill in self._reading), *filter(None, self._rows.requests)]:
            request.finish("cancelled", error)
        self._reading.clear()
        self._rows.clear()

    def _leave_and_join(self) -> None:
        """Let go of what is cancelled or late, wherever it is; then take in as many as there is room for."""
        now = monotonic()
        for request in [r for r in self._waiting if r.must_end(now)]:
            self._waiting.remove(request)
            request.finish_early()
        for prefill in [p for p in self._reading if p.request.must_end(now)]:
            self._reading.remove(prefill)
            prefill.request.finish_early()
        for row, running in enumerate(self._rows.requests):
            if running is not None and running.must_end(now):
                self._rows.leave(row)
                running.finish_early()
        while self._waiting and len(self._reading) + self._rows.n_active < self.max_batch:
            request = self._waiting.popleft()
            found = self._prefixes.find(request.adapter, request.input_ids)
            self._reading.append(Prefill(request, self.packed, self.device, found))

    def _step(self) -> None:
        rows = self._rows
        rows.compact()
        budget = PREFILL_TOKENS
        chunks: list[tuple[Prefill, int]] = []
        for prefill in self._reading:  # first come first served
            n = min(budget, prefill.left)
            if n:
                chunks.append((prefill, n))
                budget -= n
        ids, positions, adapters = rows.inputs()
        for prefill, n in chunks:
            ids += prefill.request.input_ids[prefill.length : prefill.length + n]
            positions += range(prefill.length, prefill.length + n)
            adapters += [prefill.request.adapter] * n
        if not ids:
            return
        rows.open_column()
        n_rows = len(rows.requests)

        def attend(layer: int, qkv: Tensor) -> Tensor:
            scale = self.packed.blocks[layer].scale
            parts = [rows.attend(layer, qkv[:n_rows], scale)] if n_rows else []
            start = n_rows
            for prefill, n in chunks:
                parts.append(prefill.attend(layer, qkv[start : start + n], scale))
                start += n
            return parts[0] if len(parts) == 1 else torch.cat(parts)

        hidden = self.packed.hidden(
            torch.tensor(ids, device=self.device),
            torch.tensor(positions, device=self.device),
            attend,
            self._row_adapters(adapters),
        )
        rows.close_column()
        wanted, requests, end = list(range(n_rows)), [*rows.requests], n_rows
        read = []
        for prefill, n in chunks:
            prefill.length += n
            end += n
            if not prefill.left:
                wanted.append(end - 1)
                requests.append(prefill.request)
                read.append(prefill)
        if not wanted:
            return
        tokens = self._sample(hidden if len(wanted) == len(hidden) else hidden[wanted], requests)
        for row in range(n_rows):
            request = rows.requests[row]
            if request is not None and request.add(tokens[row]):
                rows.leave(row)
        for prefill, token in zip(read, tokens[n_rows:], strict=True):
            self._reading.remove(prefill)
            self._prefixes.keep(prefill)
            if not prefill.request.add(token):
                rows.join(prefill)

    def _sample(self, hidden: Tensor, requests: Sequence[Request | None]) -> list[int]:
        """The next token of each row (n); that of a row without a request means nothing."""
        logits = self.packed.logits(hidden)  # (n, V)
        tokens: list[int] = logits.argmax(-1).tolist()
        for i, request in enumerate(requests):
            if request is None:
                continue
            if request.config.temperature > 0:
                tokens[i] = int(sample_token(logits[i], request.config, request.generator))
            if request.n_logprobs is not None:
                logprobs = logits[i].log_softmax(-1)
                values, ids = logprobs.topk(request.n_logprobs)
                top = list(zip(ids.tolist(), values.tolist(), strict=True))
                request.logprobs.append(TokenLogprobs(float(logprobs[tokens[i]]), top))
        return tokens

    def _row_adapters(self, of_row: list[Adapter | None]) -> RowAdapters | None:
        used = {adapter for adapter in of_row if adapter is not None}
        if not used:
            return None
        wanted = tuple(sorted(used, key=id))
        if self._stack is None or self._stack[0] != wanted:
            stack = AdapterStack([adapter.matrices for adapter in wanted], self.packed.dtype, self.device)
            self._stack = wanted, stack
        index = {adapter: i for i, adapter in enumerate(wanted)}
        return self._stack[1].rows([-1 if adapter is None else index[adapter] for adapter in of_row])


@cache
def _openmp() -> ctypes.CDLL | None:
    try:
        return ctypes.CDLL("libgomp.so.1", mode=os.RTLD_NOW | os.RTLD_NOLOAD)  # the one that torch has loaded
    except (OSError, AttributeError):
        return None


def _end_workers() -> None:
    """End the OpenMP workers of the calling thread; they come back when it computes again.

    GNU's OpenMP keeps workers for each thread that has ever computed. Are they more than there are cores, all of them
    sleep between operations, and a step of gpt2 takes 9.4 ms instead of 5.8 (two cores).
    """
    if (openmp := _openmp()) is not None:
        openmp.omp_pause_resource_all(1)  # omp_pause_soft, OpenMP 5.0, section 3.2.44
