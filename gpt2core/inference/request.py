"""A request to the engine: its prompt, its parameters and its growing completion."""

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
    """Log probabilities of a token and of the most likely tokens, as natural logarithms at temperature 1."""

    logprob: float
    top: list[tuple[int, float]]  # (token id, log probability), the most likely one first


class Request:
    """A submitted request, returned by `Engine.submit`.

    Iterate over it to get tokens as they are generated, or wait for `result`. Callers can read the attributes and call
    `cancel`; only the engine's thread calls the methods after `cancel`.
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
        """
        Args:
            max_new_tokens: the sampler's limit, or the number of free positions in the context if that is smaller.
        """
        self.input_ids, self.sampler, self.adapter = input_ids, sampler, adapter
        self.tokens: list[int] = []  # the completion so far
        self.n_logprobs = n_logprobs
        self.logprobs: list[TokenLogprobs] = []  # per token, if requested: added before the token is
        self.has_prompt_logprobs = has_prompt_logprobs
        self.prompt_logprobs: list[TokenLogprobs] = []  # all prompt tokens but the first; complete at the first token
        self.token_times: list[float] = []  # per token: time of its generation, by `time.monotonic`
        self.finish_reason: FinishReason | None = None  # None: still waiting or running
        self.submitted_at = monotonic()
        self._max_new_tokens, self._deadline, self._on_progress = max_new_tokens, deadline, on_progress
        self._cancelled = False
        self._error: Exception | None = None
        self._progress = Condition()  # notified at each token, if an iterator waits
        self._n_waiting = 0
        # `result` waits for this event: a thread that was woken at each token would take CPU time from the engine.
        self._finished = Event()

    @property
    def first_token_at(self) -> float | None:
        return self.token_times[0] if self.token_times else None

    @property
    def error(self) -> Exception | None:
        """The exception that `result` and iteration raise after the tokens; set together with `finish_reason`."""
        return self._error

    def result(self, timeout: float | None = None) -> list[int]:
        """Wait for the completion, and return it as `generate` does.

        If the request was cancelled or reached its deadline, return the tokens generated until then.

        Raises:
            TimeoutError: the request did not finish within `timeout` seconds; it continues.
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
                self._n_waiting += 1  # before the check: `append` adds a token, then reads this: no wake-up is lost
                while n == len(self.tokens) and self.finish_reason is None:
                    self._progress.wait()
                self._n_waiting -= 1
            new = self.tokens[n:]
            yield from new
            n += len(new)
        if self._error is not None:
            raise self._error

    def cancel(self) -> None:
        """End the request before the engine's next step. A finished request does not change."""
        self._cancelled = True

    def must_end(self, now: float) -> bool:
        """Return whether the request is cancelled or past its deadline."""
        return self._cancelled or (self._deadline is not None and now > self._deadline)

    @property
    def n_left(self) -> int:
        """Maximum number of tokens still to be generated."""
        return self._max_new_tokens - len(self.tokens)

    def append(self, token: int) -> bool:
        """Add a generated token; return whether the completion is finished."""
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
        """End the request; `error` is raised in every thread that waits for it."""
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
