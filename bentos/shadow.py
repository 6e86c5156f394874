"""Shadow mode of a canary: it answers again what the default version has answered, and no client sees its answers.

It has the lowest priority: one at a time, and only while no request is in flight. A request that arrives cancels it
before the engine's next step, and it begins again later.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from bentos.completion import Completion, CompletionResult, GenerationRequest
from bentos.errors import ServiceError
from bentos.limits import MAX_SHADOWS
from gpt2core.metrics import mean

logger = logging.getLogger(__name__)

Submit = Callable[[GenerationRequest, Sequence[Callable[[CompletionResult], None]]], Completion]


@dataclass(frozen=True)
class Comparison:
    """A canary's answer compared with the one that the client got."""

    shadow: CompletionResult
    agreed: bool  # equal after `gpt2core.metrics.normalize`
    token_f1: float  # with the client's as reference
    mean_logprob: float | None  # of the canary's tokens, in nats; None: it generated none


class Shadows:
    """Answered requests that wait for the canary. Not thread-safe: belongs to one event loop."""

    def __init__(
        self,
        submit: Submit,
        compare: Callable[[CompletionResult, CompletionResult, float | None], None],
        drop: Callable[[], None],
    ) -> None:
        """
        Args:
            submit: queues a request again, for the canary.
            compare: called with what was answered, the canary's completion and the mean log probability of its tokens.
            drop: called for each request that is not answered again: too many wait, or the engine has stopped.
        """
        self._submit, self._compare, self._drop = submit, compare, drop
        self._waiting: deque[CompletionResult] = deque()
        self._in_flight = 0  # completions of clients
        self._running: Completion | None = None
        self._interrupted = False  # the one that is running begins again, or is not wanted any more
        self._task: asyncio.Task[None] | None = None

    def interrupt(self) -> None:
        """A client's completion is about to be queued: leave the engine to it."""
        if self._running is not None:
            self._interrupted = True
            self._running.cancel()

    def request_started(self) -> None:
        """A client's completion was queued."""
        self._in_flight += 1

    def request_ended(self, answered: CompletionResult | None) -> None:
        """A client's completion has ended; `answered`: to be answered by the canary too."""
        self._in_flight -= 1
        if answered is not None and len(self._waiting) < MAX_SHADOWS:
            self._waiting.append(answered)
        elif answered is not None:
            self._drop()
        if self._waiting and not self._in_flight and (self._task is None or self._task.done()):
            self._task = asyncio.get_running_loop().create_task(self._run())

    def clear(self) -> None:
        """Forget all that wait, and cancel the one that is running."""
        self._waiting.clear()
        self.interrupt()

    async def _run(self) -> None:
        while self._waiting and not self._in_flight:
            answered, self._interrupted = self._waiting[0], False
            try:
                result, logprob = await self._answer(answered.request)
                if not self._interrupted:
                    self._waiting.popleft()
                    self._drop() if result is None else self._compare(answered, result, logprob)
            except Exception:  # nothing that goes wrong here may reach a client
                logger.exception("a shadow failed; those that wait are dropped")
                self._waiting.clear()

    async def _answer(self, request: GenerationRequest) -> tuple[CompletionResult | None, float | None]:
        """The completion that has ended, None if the engine has stopped; and the mean log probability of its tokens."""
        results: list[CompletionResult] = []
        logprobs: list[float] = []
        try:
            self._running = self._submit(request, [results.append])
            logprobs = [token.logprob for token in (await self._running.whole()).logprobs if token is not None]
        except ServiceError:
            pass  # the reason is in the result
        finally:
            self._running = None
        ended = [result for result in results if result.finish_reason != "cancelled"]
        return (ended[0] if ended else None), (mean(logprobs) if logprobs else None)
