"""A running completion: its request, the text so far, and the result after its end.

Imports no torch, so route handlers can use it in BentoML's parent process too; the engine is in `bentos/generation.py`.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from time import monotonic
from typing import TYPE_CHECKING, Literal

from bentos.errors import ServiceError
from bentos.schemas import AdapterVersion, Usage
from gpt2core.config import GenerationConfig

if TYPE_CHECKING:
    from gpt2core.inference.detokenizer import IncrementalDetokenizer
    from gpt2core.inference.request import Request, TokenLogprobs
    from gpt2core.sampling import Grammar

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class GenerationRequest:
    """One completion of one prompt, as a route requests it."""

    prompt: list[int]
    config: GenerationConfig
    model: str  # a name of /v1/models
    deadline: float  # time by `time.monotonic`, after which the request fails, queued or running
    request_id: str
    route_key: str = ""  # requests with the same key go to the same version during a canary; "": the request id
    stop: Sequence[str] = ()
    clean: bool = True  # extract the answer from the text, for an instruction; False: the text as generated
    logprobs: int | None = None  # most likely tokens to report with each token; None: no logprobs
    stream: bool = False
    grammar: "Grammar | None" = None  # structure that the text must match
    prompt_only: bool = False  # max_tokens=0: the engine generates at least one token, which is discarded
    echo: str | None = None  # text of the prompt, put before the completion's text; logprobs then include the prompt


@dataclass(frozen=True)
class Chunk:
    """New text of a completion, which later tokens cannot change, and the tokens since the previous chunk."""

    text: str
    tokens: list[int]
    logprobs: "list[TokenLogprobs | None]"  # one per token, if requested; None for the first token of a prompt


@dataclass(frozen=True)
class CompletionResult:
    """A completion that has ended, for logs and metrics. Times are by `time.monotonic`."""

    request: GenerationRequest
    adapter: AdapterVersion | None
    finish_reason: str  # a FinishReason, "cancelled", "deadline" or "error"
    tokens: list[int]  # tokens whose text was read from the completion
    token_times: list[float]  # times of all tokens that the engine generated
    submitted_at: float
    ended_at: float

    @property
    def answer(self) -> list[int]:
        """The tokens without end of text, which no client sees."""
        return self.tokens[:-1] if self.tokens[-1:] == [self.request.config.eos_id] else self.tokens

    @property
    def failed(self) -> bool:
        """Whether it ended without an answer. Cancelled completions do not count, because the client caused that."""
        return self.finish_reason in ("error", "deadline")

    @property
    def time_to_first_token(self) -> float | None:
        """Seconds from submission to the first token, including queueing; None if there was no token."""
        return self.token_times[0] - self.submitted_at if self.token_times else None


class TokenNotifier:
    """Wakes a coroutine when the engine's thread has new tokens for it."""

    def __init__(self, every_token: bool) -> None:
        """`every_token`: False wakes the coroutine only at the end, which saves CPU time for the engine."""
        self._every_token = every_token
        self._loop, self._event = asyncio.get_running_loop(), asyncio.Event()

    def notify(self, running: "Request") -> None:
        """Called by the engine's thread."""
        if self._every_token or running.finish_reason is not None:
            self._loop.call_soon_threadsafe(self._event.set)

    async def wait(self) -> None:
        await self._event.wait()
        self._event.clear()


class Completion:
    """A completion that the engine is generating. Read its chunks to the end, or `cancel` it."""

    def __init__(
        self,
        request: GenerationRequest,
        adapter: AdapterVersion | None,
        running: "Request",
        notifier: TokenNotifier,
        detokenizer: "IncrementalDetokenizer",
        on_end: Sequence[Callable[[CompletionResult], None]],
    ) -> None:
        self.request, self.adapter = request, adapter
        self.n_tokens = 0
        self.finish_reason: FinishReason | None = None  # set before the last chunk is yielded
        self._running, self._notifier, self._detokenizer = running, notifier, detokenizer
        self._on_end, self._ended = on_end, False

    async def chunks(self) -> AsyncIterator[Chunk]:
        """
        Raises:
            ServiceError: the deadline has passed, the engine has stopped, or generating this completion failed.
        """
        running, ended_by = self._running, "cancelled"
        needs_echo = self.request.echo is not None
        sent = 0  # number of tokens in earlier chunks; the detokenizer may still buffer text of later tokens
        try:
            while self.finish_reason is None:
                await self._notifier.wait()
                reason = running.finish_reason  # read before the tokens, so that no token is missed
                text = self._read_tokens()
                if self._detokenizer.stopped:
                    self.finish_reason = ended_by = "stop"
                elif reason is not None:
                    ended_by = reason
                    self.finish_reason = ended_by = self._finish_reason(reason)
                    text += self._detokenizer.finish()
                if text or self.finish_reason is not None:
                    new, sent = slice(sent, self.n_tokens), self.n_tokens
                    chunk = Chunk(text, running.tokens[new], [*running.logprobs[new]])
                    yield self._with_prompt(chunk) if needs_echo else chunk
                    needs_echo = False
        finally:
            self._end(ended_by)

    async def whole(self) -> Chunk:
        """Wait for the end of the completion; return all of it as one chunk."""
        chunks = [chunk async for chunk in self.chunks()]
        return Chunk(
            "".join(chunk.text for chunk in chunks),
            [token for chunk in chunks for token in chunk.tokens],
            [one for chunk in chunks for one in chunk.logprobs],
        )

    def cancel(self) -> None:
        """Remove the completion from the engine before its next step. Has no effect after its end."""
        self._end("cancelled")

    def withdraw(self) -> None:
        """Cancel the completion without recording it, because the request that it belongs to was refused."""
        self._on_end = ()
        self.cancel()

    def _finish_reason(self, reason: str) -> FinishReason:
        """Return the client's reason for that of the engine.

        Raises:
            ServiceError: the engine ended the completion early.
        """
        error = self._running.error
        if reason == "deadline":
            message = "the completion was not ready in time; request fewer tokens, or retry"
            raise ServiceError("deadline_exceeded", message)
        if reason == "cancelled":
            raise ServiceError("shutting_down", "the service stopped or dropped this request; retry")
        if reason == "error":  # the grammar raises ServiceError itself
            raise error if isinstance(error, ServiceError) else ServiceError("generation_failed", str(error))
        return "length" if self.request.prompt_only or reason == "length" else "stop"

    def _with_prompt(self, chunk: Chunk) -> Chunk:
        request, of_prompt = self.request, [None, *self._running.prompt_logprobs]
        logprobs = chunk.logprobs if request.logprobs is None else [*of_prompt, *chunk.logprobs]
        return Chunk(f"{request.echo}{chunk.text}", [*request.prompt, *chunk.tokens], logprobs)

    def _read_tokens(self) -> str:
        text = ""
        if self.request.prompt_only:
            return text
        while self.n_tokens < len(self._running.tokens) and not self._detokenizer.stopped:
            text += self._detokenizer.push(self._running.tokens[self.n_tokens])
            self.n_tokens += 1
        return text

    def _end(self, reason: str) -> None:
        if self._ended:
            return
        self._ended = True
        self._running.cancel()
        result = CompletionResult(
            self.request,
            self.adapter,
            reason,
            self._running.tokens[: self.n_tokens],
            list(self._running.token_times),
            self._running.submitted_at,
            monotonic(),
        )
        for observe in self._on_end:
            observe(result)


def usage(completions: Sequence[Completion]) -> Usage:
    """Count the tokens of all completions of one HTTP request. A prompt with several completions counts once."""
    prompts = {id(one.request.prompt): one.request.prompt for one in completions}
    n_prompt = sum(len(prompt) for prompt in prompts.values())
    n_completion = sum(one.n_tokens for one in completions)
    return Usage(prompt_tokens=n_prompt, completion_tokens=n_completion, total_tokens=n_prompt + n_completion)


async def merge(completions: Sequence[Completion]) -> AsyncIterator[tuple[int, Chunk, FinishReason | None]]:
    """Yield the chunks of several completions in order of arrival.

    Each item is the completion's index, the chunk, and the finish reason (None before the completion's last chunk).

    Raises:
        ServiceError: the error of the first completion that fails; the others are cancelled.
    """
    queue: asyncio.Queue[tuple[int, Chunk, FinishReason | None] | Exception] = asyncio.Queue()

    async def read(i: int, completion: Completion) -> None:
        try:
            async for chunk in completion.chunks():
                queue.put_nowait((i, chunk, completion.finish_reason))
        except Exception as error:
            queue.put_nowait(error)

    tasks = [asyncio.create_task(read(i, completion)) for i, completion in enumerate(completions)]
    try:
        left = len(tasks)
        while left:
            item = await queue.get()
            if isinstance(item, Exception):
                raise item
            left -= item[2] is not None
            yield item
    finally:
        for task in tasks:
            task.cancel()
        for completion in completions:
            completion.cancel()
