"""Continuous batching: decodes many requests at once. They join and leave between steps without affecting each other.

The parts are in `gpt2core.inference`: scheduler, KV caches, quantized weights, model runner, adapters.
"""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from threading import Condition, Thread
from types import TracebackType
from typing import Self

import torch

from gpt2core.adapter_files import read_adapter
from gpt2core.config import GenerationConfig, GPT2Config, WeightFormat, Weights
from gpt2core.generate import check_prompt
from gpt2core.inference.adapters import Adapter, make_adapter
from gpt2core.inference.quantized import QuantizedModel, quantize_fastest
from gpt2core.inference.request import EngineClosed, Request
from gpt2core.inference.runner import ModelRunner
from gpt2core.inference.scheduler import Scheduler
from gpt2core.kernels import limit_openmp_threads, release_openmp_workers, returning_freed_memory
from gpt2core.model import GPT2
from gpt2core.sampling import Grammar, NonFiniteLogits, Sampler, check_tokens

__all__ = ["Engine", "EngineClosed", "EngineFull", "NonFiniteLogits", "Weights"]

logger = logging.getLogger(__name__)


class EngineFull(RuntimeError):
    """The queue holds its maximum number of requests."""


class Engine:
    """Decodes requests in its own thread. As context manager, it starts the thread and closes the engine at the end."""

    def __init__(
        self,
        model: GPT2,
        max_batch: int = 16,
        weights: Weights = "auto",
        max_queue: int | None = None,
        base_sha256: str | None = None,
        accept_other_base: bool = False,
        static_cache: bool | None = None,
    ) -> None:
        """
        Args:
            model: the model to copy, with its LoRA layers merged.
            max_batch: maximum number of running requests; others wait, first come, first served.
            weights: a format, or "auto": measure which format is the fastest one that predicts as well as fp32.
            max_queue: maximum number of waiting requests; None: unlimited.
            base_sha256, accept_other_base: as in `gpt2core.checkpoint.load_adapter`, for all adapters loaded later.
            static_cache: keep keys and values at fixed addresses, as CUDA graphs require; None: only on a GPU.

        Raises:
            ValueError: a value is out of range, or `weights` is "int8" and this machine has no int8 kernel.
        """
        if max_batch < 1:
            raise ValueError(f"max_batch is {max_batch}; it must be at least 1")
        with returning_freed_memory():
            self._model = quantize_fastest(model, max_batch) if weights == "auto" else QuantizedModel(model, weights)
        self._max_queue = max_queue
        self._base_sha256, self._accept_other_base = base_sha256, accept_other_base
        self._scheduler = Scheduler(self._model, max_batch, static_cache)
        self._runner = ModelRunner(self._model, self._scheduler.row_cache)
        self._changed = Condition()  # guards the attributes below and the scheduler's queue
        self._adapters: dict[str, Adapter] = {}
        self._unloaded: set[Adapter] = set()  # unloaded adapters that are still in a cache or used by a request
        self._closed = False
        self._thread = Thread(target=self._run, name="engine", daemon=True)

    @property
    def config(self) -> GPT2Config:
        """Config of the model."""
        return self._model.config

    @property
    def weights(self) -> WeightFormat:
        """Weight format in use; for "auto", the selected format."""
        return self._model.weights

    @property
    def perplexity_increase(self) -> float | None:
        """Perplexity increase over fp32, a fraction, measured by "auto" on the model's own text; None: not measured."""
        return self._model.perplexity_increase

    def start(self) -> None:
        """Start the thread. The context manager calls this itself."""
        release_openmp_workers()
        self._thread.start()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Cancel unfinished requests and end the thread."""
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
        grammar: Grammar | None = None,
        prompt_logprobs: bool = False,
    ) -> Request:
        """Queue a prompt for completion. This returns immediately.

        Args:
            adapter: name of a loaded adapter; None: no adapter.
            deadline: time by `time.monotonic` at which the request ends with the tokens generated until then.
            on_progress: called in the engine's thread after each token and at the end; must be quick and not raise.
            logprobs: record the log probabilities of each token and of this number of most likely tokens; None: do not
                record any.
            grammar: the grammar that the completion must match. It is used in the engine's thread, and must not be
                shared with other requests.
            prompt_logprobs: record the log probabilities of the prompt's tokens too.

        Raises:
            TypeError, ValueError: the prompt is invalid (as for `generate`), the adapter is not loaded, a token id in
                `config` is invalid, or `logprobs` is out of range.
            EngineFull: the queue is full; try again later.
            EngineClosed: the engine accepts no more requests.
            RuntimeError: the engine is not started.
        """
        release_openmp_workers()
        input_ids = check_prompt(input_ids, self.config)
        check_tokens(config, self.config)
        if logprobs is not None and not 0 <= logprobs <= self.config.token_count:
            raise ValueError(f"logprobs is {logprobs}; it must be from 0 to {self.config.token_count}, or None")
        max_new_tokens = min(config.max_new_tokens, self.config.n_positions - len(input_ids))
        sampler = Sampler(config, input_ids, self._model.device, grammar)
        with self._changed:
            if self._closed:
                raise EngineClosed("the engine is closed")
            if self._thread.ident is None:
                raise RuntimeError("the engine is not started; use `with Engine(...) as engine:`, or engine.start()")
            if adapter is not None and adapter not in self._adapters:
                loaded = ", ".join(sorted(self._adapters)) or "none"
                raise ValueError(f"there is no adapter {adapter!r}; loaded: {loaded}")
            if self._max_queue is not None and self._scheduler.n_waiting >= self._max_queue:
                raise EngineFull(f"{self._scheduler.n_waiting} requests are waiting already; try again later")
            own = None if adapter is None else self._adapters[adapter]
            request = Request(input_ids, sampler, max_new_tokens, own, deadline, on_progress, logprobs, prompt_logprobs)
            self._scheduler.add(request)
            self._changed.notify_all()
        return request

    def load_adapter(self, name: str, directory: str | Path) -> None:
        """Add an adapter, or replace the adapter with this name. Earlier requests keep using the old adapter.

        Raises:
            FileNotFoundError, ValueError: as `gpt2core.checkpoint.load_adapter`; also if the adapter uses DoRA, or if
                its scaled weights overflow.
        """
        base = (self._base_sha256, self._accept_other_base)
        lora, state = read_adapter(directory, self.config, self._model.device, *base)
        adapter = make_adapter(self.config, lora, state, self._model.adapter_dtype, self._model.device)
        release_openmp_workers()
        with self._changed:
            if name in self._adapters:
                self._unload(name)
            self._adapters[name] = adapter

    def unload_adapter(self, name: str) -> None:
        """Remove an adapter and its cache entries. Earlier requests keep using it until they end.

        Raises:
            KeyError: no adapter with this name is loaded.
        """
        with self._changed:
            self._unload(name)

    @property
    def is_alive(self) -> bool:
        """Whether the thread is running. `close` ends it, and so does an unexpected error outside of a step."""
        return self._thread.is_alive()

    @property
    def adapters(self) -> list[str]:
        with self._changed:
            return sorted(self._adapters)

    def adapters_in_use(self) -> tuple[list[str], list[str]]:
        """Return the names of the loaded adapters of running requests, and the names of those of waiting requests."""
        with self._changed:
            running, waiting = self._scheduler.adapters_in_use()
            names = sorted(self._adapters.items())
        return [name for name, one in names if one in running], [name for name, one in names if one in waiting]

    def stats(self) -> dict[str, int]:
        """Return the numbers of waiting and running requests, and of cached tokens of running requests and prefixes."""
        with self._changed:
            return {
                "waiting": self._scheduler.n_waiting,
                "running": self._scheduler.n_running,
                "cached_tokens": self._scheduler.n_cached_tokens,
                "cached_prefix_tokens": self._scheduler.n_cached_prefix_tokens,
            }

    def _unload(self, name: str) -> None:
        self._unloaded.add(self._adapters.pop(name))
        self._changed.notify_all()

    def _run(self) -> None:
        if self._model.is_native:
            limit_openmp_threads()
        try:
            with torch.inference_mode():
                while self._prepare_step():
                    try:
                        self._step()
                    except Exception as error:
                        logger.exception("a step failed; its requests are cancelled")
                        self._scheduler.cancel_running(EngineClosed(f"the step failed: {error}"))
        finally:  # also after an unexpected error: waiting callers must be notified
            with self._changed:
                self._closed = True
                self._scheduler.cancel_waiting()
            self._scheduler.cancel_running()

    def _prepare_step(self) -> bool:
        """Wait for work and admit requests. Return False if the engine is closed."""
        with self._changed:
            while not (self._closed or self._scheduler.n_waiting or self._scheduler.n_running):
                self._release_unloaded()
                self._changed.wait()
            if self._closed:
                return False
            self._scheduler.admit()
            self._release_unloaded()
            return True

    def _step(self) -> None:
        step = self._scheduler.next_step()
        if step is not None:
            self._scheduler.complete_step(step, self._runner.run(step))

    def _release_unloaded(self) -> None:
        """Remove unloaded adapters from the caches.

        Call this again while requests still use such an adapter, since they fill the caches again.
        """
        for adapter in list(self._unloaded):
            self._scheduler.drop_prefixes(adapter)
            if not self._scheduler.uses(adapter):
                self._runner.drop_adapter(adapter)
                self._unloaded.remove(adapter)
