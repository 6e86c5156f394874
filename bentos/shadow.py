"""Shadow mode: the canary repeats requests that the default version has answered. No client sees its answers.

Shadow requests have the lowest priority: they run one at a time, and only while no client request is in flight. A new
client request cancels the running shadow request before the engine's next step. The shadow request restarts later.
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
    """A canary's answer, compared with the answer that the client got."""

    shadow: CompletionResult
    agreed: bool  # equal after `gpt2core.metrics.normalize`
    token_f1: float  # F1 of the canary's answer, with the client's answer as reference
    mean_logprob: float | None  # mean log probability of the canary's tokens, in nats; None: it generated no token


class ShadowQueue:
    """The queue of answered requests for the canary. Not thread-safe: use it from one event loop."""

    def __init__(
        self,
        submit: Submit,
        compare: Callable[[CompletionResult, CompletionResult, float | None], None],
        drop: Callable[[], None],
    ) -> None:
        """
        Args:
            submit: queues a request again, for the canary.
            compare: called with the client's completion, the canary's completion, and the mean log probability of the
                canary's tokens.
            drop: called for each dropped request. Requests are dropped if the queue is full or the engine has stopped.
        """
        self._submit, self._compare, self._drop = submit, compare, drop
        self._waiting: deque[CompletionResult] = deque()
        self._in_flight = 0  # number of clients' completions
        self._running: Completion | None = None
        self._interrupted = False  # the running request restarts later, or is dropped
        self._task: asyncio.Task[None] | None = None

    def interrupt(self) -> None:
        """Cancel the running shadow request, because a client's completion is about to be queued."""
        if self._running is not None:
            self._interrupted = True
            self._running.cancel()

    def request_started(self) -> None:
        """Count a client's completion that was queued."""
        self._in_flight += 1

    def request_ended(self, answered: CompletionResult | None) -> None:
        """Count a client's completion that has ended. `answered`: the completion, if the canary must repeat it."""
        self._in_flight -= 1
        if answered is not None and len(self._waiting) < MAX_SHADOWS:
            self._waiting.append(answered)
        elif answered is not None:
            self._drop()
        if self._waiting and not self._in_flight and (self._task is None or self._task.done()):
            self._task = asyncio.get_running_loop().create_task(self._run())

    def clear(self) -> None:
        """Drop all waiting requests, and cancel the running one."""
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
            except Exception:  # errors here must not reach a client
                logger.exception("a shadow request failed; waiting ones are dropped")
                self._waiting.clear()

    async def _answer(self, request: GenerationRequest) -> tuple[CompletionResult | None, float | None]:
        """Return the canary's completion and the mean log probability of its tokens; None if the engine has stopped."""
        results: list[CompletionResult] = []
        logprobs: list[float] = []
        try:
            self._running = self._submit(request, [results.append])
            logprobs = [token.logprob for token in (await self._running.whole()).logprobs if token is not None]
        except ServiceError:
            pass  # the result contains the reason
        finally:
            self._running = None
        ended = [result for result in results if result.finish_reason != "cancelled"]
        return (ended[0] if ended else None), (mean(logprobs) if logprobs else None)
