"""A request to the engine: its prompt and settings, and its completion as it grows."""

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from threading import Condition, Event
from time import monotonic
from typing import Literal

from gpt2core.inference.adapters import Adapter
from gpt2core.sampling import Sampler

logger = logging.getLogger(__name__)

FinishReason = Literal["stop", "length", "cancelled", "deadline", "error"]


class EngineClosed(RuntimeError):
    """The engine is closed, or the step that computed this request failed."""


@dataclass(frozen=True)
class TokenLogprobs:
    """Log probabilities (natural logarithm, temperature 1) of the generated token and of the most likely ones by id."""

    logprob: float
    top: list[tuple[int, float]]


class Request:
    """Returned by `Engine.submit`. Iterate over it for tokens as they are generated, or wait for `result`.

    Callers read the attributes and may `cancel`; the methods after `cancel` belong to the engine's thread.
    """

    def __init__(
        self,
        input_ids: list[int],
        sampler: Sampler,
        max_new_tokens: int,
        adapter: Adapter | None,
        deadline: float | None,
        on_progress: "Callable[[Request], object] | None",
        n_logprobs: int | None,
        has_prompt_logprobs: bool = False,
    ) -> None:
        """`max_new_tokens`: that of the sampler's config, or less where the context has no more positions."""
        self.input_ids, self.sampler, self.adapter = input_ids, sampler, adapter
        self.tokens: list[int] = []  # the completion so far
        self.n_logprobs = n_logprobs
        self.logprobs: list[TokenLogprobs] = []  # per token, if requested; then never shorter than `tokens`
        self.has_prompt_logprobs = has_prompt_logprobs
        self.prompt_logprobs: list[TokenLogprobs] = []  # of all prompt tokens but the first, when `tokens` has one
        self.token_times: list[float] = []  # per token: when it was generated, by `time.monotonic`
        self.finish_reason: FinishReason | None = None  # None: still waiting or running
        self.submitted_at = monotonic()
        self._max_new_tokens, self._deadline, self._on_progress = max_new_tokens, deadline, on_progress
        self._cancelled = False
        self._error: Exception | None = None
        self._progress = Condition()  # notified at each token, if an iterator waits
        self._n_waiting = 0
        # For `result`: a thread that was woken at each token would take processor time from the engine.
        self._finished = Event()

    @property
    def first_token_at(self) -> float | None:
        return self.token_times[0] if self.token_times else None

    @property
    def error(self) -> Exception | None:
        """What `result` and iteration raise after the tokens; set together with `finish_reason`."""
        return self._error

    def result(self, timeout: float | None = None) -> list[int]:
        """The completion as `generate` returns it; what was generated so far if cancelled or past the deadline.

        Raises:
            TimeoutError: not finished within `timeout` seconds; the request continues.
            EngineClosed: the engine was closed or its step failed.
            NonFiniteLogits: the adapter or the weights gave NaN or infinite logits for this prompt.
        """
        if not self._finished.wait(timeout):
            raise TimeoutError(f"the request did not finish within {timeout} seconds")
        if self._error is not None:
            raise self._error
        return self.tokens

    def __iter__(self) -> Iterator[int]:
        n = 0
        while n < len(self.tokens) or self.finish_reason is None:
            with self._progress:
                self._n_waiting += 1  # before the check: `append` reads it after adding a token, so no wake-up is lost
                while n == len(self.tokens) and self.finish_reason is None:
                    self._progress.wait()
                self._n_waiting -= 1
            new = self.tokens[n:]
            yield from new
            n += len(new)
        if self._error is not None:
            raise self._error

    def cancel(self) -> None:
        """End the request before the engine's next step. No effect on a finished one."""
        self._cancelled = True

    def must_end(self, now: float) -> bool:
        """Whether it is cancelled or past its deadline."""
        return self._cancelled or (self._deadline is not None and now > self._deadline)

    @property
    def n_left(self) -> int:
        """Tokens that are still to be generated at most."""
        return self._max_new_tokens - len(self.tokens)

    def append(self, token: int) -> bool:
        """Add a generated token; returns whether the completion is finished."""
        self.token_times.append(monotonic())
        self.tokens.append(token)
        if self.sampler.has_ended(self.tokens):
            self.finish_reason = "stop"
        elif len(self.tokens) >= self._max_new_tokens:
            self.finish_reason = "length"
        finished = self.finish_reason is not None
        if self._n_waiting:
            with self._progress:
                self._progress.notify_all()
        if finished:
            self._finished.set()
        self._report()
        return finished

    def finish_early(self) -> None:
        """End a request for which `must_end` is true."""
        self.finish("cancelled" if self._cancelled else "deadline")

    def fail(self, error: Exception) -> None:
        """End the request because computing its next token failed."""
        self.finish("error", error)

    def finish(self, reason: FinishReason, error: Exception | None = None) -> None:
        """End the request; `error` is raised to everyone who waits for it."""
        with self._progress:
            self.finish_reason, self._error = reason, error
            self._progress.notify_all()
        self._finished.set()
        self._report()

    def _report(self) -> None:
        if self._on_progress is not None:
            try:
                self._on_progress(self)
            except Exception:  # the caller's error must not end other requests
                logger.exception("on_progress raised; it is not called again for this request")
                self._on_progress = None
