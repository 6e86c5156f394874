"""Shadow mode: the canary repeats requests that the default version has answered. No client sees its answers.

Shadow requests have the lowest priority: they run one at a time, and only while no client request is in flight. A new
client request cancels the running shadow request before the engine's next step. The shadow request restarts later.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from time import monotonic
from typing import TYPE_CHECKING

from bentos.canary import Canary, Comparison
from bentos.completion import Completion, CompletionResult, GenerationRequest
from bentos.errors import ServiceError
from bentos.limits import DEADLINE, MAX_SHADOWS
from gpt2core.metrics import exact_match, mean, token_f1

if TYPE_CHECKING:
    from bentos.metrics import Metrics
    from bentos.request_log import RequestLog

logger = logging.getLogger(__name__)

Submit = Callable[[GenerationRequest, Sequence[Callable[[CompletionResult], None]]], Completion]


class ShadowQueue:
    """The queue of answered requests for the canary. Not thread-safe: use it from one event loop."""

    def __init__(
        self,
        submit: Submit,
        canary: Canary,
        decode: Callable[[list[int]], str],
        metrics: "Metrics",
        request_log: "RequestLog | None",
    ) -> None:
        """
        Args:
            submit: queues a request in the engine. The functions in its second argument are called when it has ended.
        """
        self._submit, self._canary, self._decode = submit, canary, decode
        self._metrics, self._request_log = metrics, request_log
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

    def request_ended(self, answered: CompletionResult) -> None:
        """Count a client's completion that has ended. The canary repeats it, unless the queue is full."""
        self._in_flight -= 1
        if self._canary.repeats(answered):
            if len(self._waiting) < MAX_SHADOWS:
                self._waiting.append(answered)
            else:
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
            self._running = self._submit(self._for_canary(request), [results.append])
            logprobs = [token.logprob for token in (await self._running.whole()).logprobs if token is not None]
        except ServiceError:
            pass  # the result contains the reason
        finally:
            self._running = None
        ended = [result for result in results if result.finish_reason != "cancelled"]
        return (ended[0] if ended else None), (mean(logprobs) if logprobs else None)

    def _for_canary(self, request: GenerationRequest) -> GenerationRequest:
        assert self._canary.adapter is not None  # waiting requests are dropped when the canary ends
        deadline = monotonic() + DEADLINE
        return replace(request, model=self._canary.adapter, deadline=deadline, logprobs=0, stream=False, echo=None)

    def _compare(self, answered: CompletionResult, shadow: CompletionResult, logprob: float | None) -> None:
        if not self._canary.observe(shadow):
            return  # the answer is from a version that has been replaced
        texts = [self._decode(result.answer) for result in (answered, shadow)]
        comparison = Comparison(shadow, exact_match(*texts) == 1, token_f1(*texts), logprob)
        if not shadow.failed:
            self._canary.observe_shadow(comparison)
        self._metrics.observe_shadow(comparison)
        if self._request_log is not None:
            self._request_log.write_shadow(comparison, texts[1])

    def _drop(self) -> None:
        """Count a request that the canary does not repeat, because the queue is full or the engine has stopped."""
        self._canary.observe_dropped()
        self._metrics.dropped_shadows.inc()
