"""A request to the engine, and the reply as whoever asked sees it grow."""

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from threading import Condition, Event
from time import monotonic
from typing import Literal

import torch
from torch import Tensor

from gpt2core.config import GenerationConfig
from gpt2core.generate import ended

logger = logging.getLogger(__name__)

FinishReason = Literal["stop", "length", "cancelled", "deadline"]


class EngineClosed(RuntimeError):
    """The engine has ended, or the step that this request was in has failed."""


@dataclass(frozen=True, eq=False)
class Adapter:
    """A loaded adapter, as `gpt2core.inference.quantized.adapter_matrices` gives it; each load is one of its own."""

    matrices: Mapping[tuple[int, str], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class TokenLogprobs:
    """Natural logarithms of probabilities at temperature 1: the drawn token's, and the most likely ones' by id."""

    logprob: float
    top: list[tuple[int, float]]


class Request:
    """A prompt in the engine, and its reply as it grows: iterate for the tokens as they come."""

    def __init__(
        self,
        input_ids: list[int],
        config: GenerationConfig,
        room: int,
        adapter: Adapter | None,
        deadline: float | None,
        on_progress: "Callable[[Request], object] | None",
        generator: torch.Generator | None,
        n_logprobs: int | None,
    ) -> None:
        self.input_ids, self.config, self.adapter, self.generator = input_ids, config, adapter, generator
        self.tokens: list[int] = []  # of the reply so far
        self.n_logprobs = n_logprobs
        self.logprobs: list[TokenLogprobs] = []  # of each token, if asked for; never shorter than `tokens` then
        self.token_times: list[float] = []  # when each token came, in `time.monotonic`'s seconds
        self.finish_reason: FinishReason | None = None  # None: not finished
        self.submitted_at = monotonic()
        self._room, self._deadline, self._on_progress = room, deadline, on_progress
        self._cancelled = False
        self._error: EngineClosed | None = None
        self._progress = Condition()  # for those who iterate
        self._finished = Event()  # for those who only want the end: woken at each token, they would take a core from it

    @property
    def first_token_at(self) -> float | None:
        return self.token_times[0] if self.token_times else None

    def result(self, timeout: float | None = None) -> list[int]:
        """The whole reply, as `generate` gives it; what there is of it if it was cancelled or its deadline passed.

        Raises:
            TimeoutError: it was not finished after so many seconds; it goes on.
            EngineClosed: the engine could not go on with it.
        """
        if not self._finished.wait(timeout):
            raise TimeoutError(f"the reply was not finished after {timeout} seconds")
        if self._error is not None:
            raise self._error
        return self.tokens

    def __iter__(self) -> Iterator[int]:
        n = 0
        while n < len(self.tokens) or self.finish_reason is None:
            with self._progress:
                while n == len(self.tokens) and self.finish_reason is None:
                    self._progress.wait()
                new = self.tokens[n:]
            yield from new
            n += len(new)
        if self._error is not None:
            raise self._error

    def cancel(self) -> None:
        """End it before the engine's next step; a finished one stays as it is."""
        self._cancelled = True

    def must_end(self, now: float) -> bool:
        return self._cancelled or (self._deadline is not None and now > self._deadline)

    def finish_early(self) -> None:
        self.finish("cancelled" if self._cancelled else "deadline")

    def finish(self, reason: FinishReason, error: EngineClosed | None = None) -> None:
        with self._progress:
            self.finish_reason, self._error = reason, error
            self._progress.notify_all()
        self._finished.set()
        self._tell()

    def add(self, token: int) -> bool:
        """Append a token; whether that was the last."""
        with self._progress:
            self.token_times.append(monotonic())
            self.tokens.append(token)
            if ended(self.tokens, self.config):
                self.finish_reason = "stop"
            elif len(self.tokens) >= self._room:
                self.finish_reason = "length"
            finished = self.finish_reason is not None
            self._progress.notify_all()
        if finished:
            self._finished.set()
        self._tell()
        return finished

    def _tell(self) -> None:
        if self._on_progress is not None:
            try:
                self._on_progress(self)
            except Exception:  # of one who asked; the others' replies go on
                logger.exception("on_progress raised, and is called no more for this request")
                self._on_progress = None
