"""The model behind the endpoint: the engine and its adapters, asked for replies. Knows no HTTP."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic
from typing import Any, Literal, get_args

from bentos import metrics
from bentos.errors import RequestError
from bentos.request_log import RequestLog
from bentos.schemas import BASE, TUNED, AdapterVersion, Usage
from gpt2core.checkpoint import directory_sha256, load_pretrained
from gpt2core.config import GenerationConfig
from gpt2core.engine import Engine, EngineFull, Weights
from gpt2core.inference.detokenizer import IncrementalDetokenizer
from gpt2core.inference.request import EngineClosed, Request, TokenLogprobs
from gpt2core.model import best_device
from gpt2core.tokenizer import load_tokenizer

MAX_BATCH = 16  # replies written at the same time
MAX_QUEUE = 64  # requests that wait for their turn; more are told to come back later
MAX_ADAPTERS = 32  # that may be loaded beside the run's own
RETRY_AFTER = 1  # seconds


@dataclass(frozen=True)
class Wanted:
    """A reply as a route asks for it."""

    prompt: list[int]
    config: GenerationConfig
    model: str  # as /v1/models has it
    deadline: float  # in `time.monotonic`'s seconds; waiting counts
    stops: Sequence[str] = ()
    clean: bool = True  # as an answer to an instruction; else as the model wrote it
    logprobs: int | None = None
    stream: bool = False
    answered: dict[str, Any] = field(default_factory=dict)  # the access log's line; added to at the end


@dataclass(frozen=True)
class Part:
    """What is new of a reply: text that is certain, and the tokens since the last part."""

    text: str
    tokens: list[int]
    logprobs: list[TokenLogprobs]  # of these tokens, if they were asked for


class Reply:
    """A reply as it grows. Who does not take its parts to the end must `cancel` it."""

    def __init__(
        self,
        wanted: Wanted,
        adapter: AdapterVersion | None,
        text: IncrementalDetokenizer,
        on_end: Callable[["Reply", str], None],
    ) -> None:
        self.wanted, self.adapter = wanted, adapter
        self.n_tokens = 0
        self.finish_reason: Literal["stop", "length"] | None = None  # set with the last part
        self.running: Request  # set by who submits it
        self._text, self._on_end, self._ended = text, on_end, False
        self._loop, self._progress = asyncio.get_running_loop(), asyncio.Event()

    def tell(self, running: Request) -> None:
        """For the engine's thread. Who only wants the end is not woken at each token."""
        if self.wanted.stream or self.wanted.stops or running.finish_reason is not None:
            self._loop.call_soon_threadsafe(self._progress.set)

    async def parts(self) -> AsyncIterator[Part]:
        """
        Raises:
            RequestError: the deadline has passed, or the engine has ended.
        """
        running, ended_by = self.running, "cancelled"
        try:
            while self.finish_reason is None:
                await self._progress.wait()
                self._progress.clear()
                reason = running.finish_reason  # before the tokens are looked at: the last ones are among them then
                text, first = "", self.n_tokens
                while self.n_tokens < len(running.tokens) and not self._text.stopped:
                    text += self._text.push(running.tokens[self.n_tokens])
                    self.n_tokens += 1
                if self._text.stopped:
                    reason = "stop"
                elif reason == "deadline":
                    ended_by = reason
                    message = "the answer was not ready in time; ask for fewer tokens, or later"
                    raise RequestError(504, "deadline_exceeded", message)
                elif reason == "cancelled":
                    raise RequestError(503, "shutting_down", "the service ends, or has lost this request; ask again")
                elif reason is not None:
                    text += self._text.finish()
                if reason is not None:
                    self.finish_reason = ended_by = reason
                if text or reason is not None:
                    yield Part(text, running.tokens[first : self.n_tokens], running.logprobs[first : self.n_tokens])
        finally:
            self._end(ended_by)

    async def whole(self) -> Part:
        """All of it, when it has ended."""
        parts = [part async for part in self.parts()]
        return Part(
            "".join(part.text for part in parts),
            [token for part in parts for token in part.tokens],
            [one for part in parts for one in part.logprobs],
        )

    def cancel(self) -> None:
        """Leave the engine before its next step; a reply that has ended stays as it is."""
        self._end("cancelled")

    def _end(self, reason: str) -> None:
        if not self._ended:
            self._ended = True
            self.running.cancel()
            self._on_end(self, reason)


class Answerer:
    def __init__(
        self, base_dir: str | Path, adapter_dir: str | Path, weights: str, adapters_dir: str, log: RequestLog
    ) -> None:
        """Load base and adapter, and start the engine.

        Args:
            weights: the engine's; only fp32 answers to the letter as the model was evaluated.
            adapters_dir: where other adapters may be loaded from; "": nowhere.
        """
        if weights not in get_args(Weights):
            raise ValueError(f"GPT2_WEIGHTS is {weights!r}; it must be one of {', '.join(get_args(Weights))}")
        self.tokenizer = load_tokenizer(base_dir)
        self._adapters_dir, self._log = adapters_dir, log
        self._adapters: dict[str, AdapterVersion] = {}
        self._changing = asyncio.Lock()
        model = load_pretrained(base_dir, device=best_device())
        self.engine = Engine(model, MAX_BATCH, weights, MAX_QUEUE)  # type: ignore[arg-type]
        self._load(TUNED, Path(adapter_dir))
        self.engine.start()

    def close(self) -> None:
        """End the engine; replies that are being written are lost."""
        self.engine.close()
        self._log.close()

    @property
    def n_positions(self) -> int:
        return self.engine.config.n_positions

    @property
    def models(self) -> dict[str, AdapterVersion | None]:
        """What may be asked: the base with the run's adapter, the base alone, the base with what was loaded."""
        return {TUNED: self._adapters[TUNED], BASE: None, **self._adapters}

    def check_model(self, name: str, param: str | None) -> None:
        """
        Raises:
            RequestError: there is none of that name.
        """
        if name not in self.models:
            message = f"there is no {name!r}; there are {', '.join(self.models)}"
            raise RequestError(404, "model_not_found", message, param)

    def config(self, max_new_tokens: int, param: str, **sampling: Any) -> GenerationConfig:
        """
        Raises:
            RequestError: so many tokens do not fit into the context, whatever the prompt.
        """
        if max_new_tokens > self.n_positions:
            message = f"{param} is {max_new_tokens}, but the context holds {self.n_positions} tokens"
            raise RequestError(400, "invalid_request", message, param)
        return GenerationConfig(max_new_tokens=max_new_tokens, eos_id=self.tokenizer.eot_token, **sampling)

    def submit(self, wanted: Sequence[Wanted], param: str) -> list[Reply]:
        """Join the engine's batch, all or none.

        Args:
            param: the field that gave the prompt, for errors.

        Raises:
            RequestError: a prompt leaves no room in the context, or too many requests wait already.
        """
        replies: list[Reply] = []
        longest = max(len(one.prompt) for one in wanted)
        if longest >= self.n_positions:
            message = f"the prompt has {longest} tokens, but the context holds {self.n_positions}; shorten it"
            raise RequestError(400, "context_length_exceeded", message, param)
        try:
            for one in wanted:
                text = IncrementalDetokenizer(self.tokenizer, one.stops, one.clean)
                reply = Reply(one, self.models[one.model], text, self._ended)
                reply.running = self.engine.submit(
                    one.prompt,
                    one.config,
                    adapter=None if one.model == BASE else one.model,
                    deadline=one.deadline,
                    on_progress=reply.tell,
                    logprobs=one.logprobs,
                )
                replies.append(reply)
        except (EngineFull, EngineClosed, ValueError) as error:
            for reply in replies:
                reply.cancel()
            if isinstance(error, EngineFull):
                metrics.refused.inc()
                raise RequestError(429, "overloaded", str(error), headers={"Retry-After": str(RETRY_AFTER)}) from None
            if isinstance(error, EngineClosed):
                raise RequestError(503, "shutting_down", "the service ends; ask again") from None
            raise RequestError(400, "invalid_request", str(error), param) from None
        return replies

    async def load(self, name: str, directory: str) -> AdapterVersion:
        """Load an adapter, or put another in its place; replies that have begun keep the one they began with.

        Raises:
            RequestError: the name is taken for good, there are too many, or there is no such adapter for this base.
        """
        if not self._adapters_dir:
            raise RequestError(403, "forbidden", "no adapters are loaded here: GPT2_ADAPTERS_DIR is not set")
        if name in (TUNED, BASE):
            raise RequestError(400, "invalid_request", f"lora_name: {name} stays as it is", "lora_name")
        root = Path(self._adapters_dir).resolve()
        try:
            path = (root / directory).resolve()
            found = root in path.parents and path.is_dir()
        except (OSError, ValueError, RuntimeError):  # a name too long, a NUL, a loop of links
            found = False
        if not found:
            message = f"lora_path: there is no directory {directory!r} below that of the adapters"
            raise RequestError(404, "adapter_not_found", message, "lora_path")
        async with self._changing:
            if name not in self._adapters and len(self._adapters) > MAX_ADAPTERS:
                raise RequestError(
                    400, "too_many_adapters", f"{MAX_ADAPTERS} adapters are loaded already; unload one", "lora_name"
                )
            try:
                return await asyncio.to_thread(self._load, name, path)
            except (ValueError, OSError) as error:
                raise RequestError(400, "invalid_adapter", f"lora_path: {error}", "lora_path") from None

    async def unload(self, name: str) -> None:
        """Forget an adapter; replies that have begun keep it.

        Raises:
            RequestError: it is not there, or always stays.
        """
        async with self._changing:
            if name in (TUNED, BASE):
                raise RequestError(400, "invalid_request", f"lora_name: {name} always stays", "lora_name")
            self.check_model(name, "lora_name")
            del self._adapters[name]
            self.engine.unload_adapter(name)

    def gauges(self) -> dict[str, tuple[str, float]]:
        """The engine's state, as /metrics has it."""
        stats = self.engine.stats()
        return {
            "gpt2_queue_depth": ("Requests that wait for their turn", stats["waiting"]),
            "gpt2_running_requests": ("Requests being read or answered in the running batch", stats["running"]),
            "gpt2_cached_tokens": ("Tokens of running requests in the key-value cache", stats["cached_tokens"]),
            "gpt2_cached_prefix_tokens": ("Tokens in the cache of beginnings", stats["cached_prefix_tokens"]),
            "gpt2_adapters": ("Adapters that are loaded", len(self._adapters)),
        }

    def _load(self, name: str, directory: Path) -> AdapterVersion:
        # of the adapter's own files: BentoML adds one to those of its store
        files = [path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file()]
        files = [file for file in files if file != "model.yaml"]
        version = AdapterVersion(name=name, sha256=directory_sha256(directory, files))
        self.engine.load_adapter(name, directory)
        self._adapters[name] = version
        return version

    def _ended(self, reply: Reply, reason: str) -> None:
        wanted, running = reply.wanted, reply.running
        metrics.observe(running, wanted.model, reason)
        first = running.first_token_at
        wanted.answered.update(
            model=wanted.model,
            adapter_sha256=reply.adapter and reply.adapter.sha256,
            finish_reason=reason,
            prompt_tokens=len(wanted.prompt),
            completion_tokens=reply.n_tokens,
            first_token_milliseconds=first and round(1000 * (first - running.submitted_at), 1),
        )
        if self._log.wanted:
            self._log.write(
                prompt=self.tokenizer.decode(wanted.prompt),
                answer=self.tokenizer.decode(running.tokens[: reply.n_tokens]),
                milliseconds=round(1000 * (monotonic() - running.submitted_at), 1),
                temperature=wanted.config.temperature,
                **wanted.answered,
            )


def usage(replies: Sequence[Reply]) -> Usage:
    """Token counts of all replies to one request; a prompt of several replies counts once."""
    n_prompt = sum(len(prompt) for prompt in {id(r.wanted.prompt): r.wanted.prompt for r in replies}.values())
    n_reply = sum(reply.n_tokens for reply in replies)
    return Usage(prompt_tokens=n_prompt, completion_tokens=n_reply, total_tokens=n_prompt + n_reply)


async def merge(replies: Sequence[Reply]) -> AsyncIterator[tuple[int, Part, str | None]]:
    """Parts of several replies as they come: the reply's place, the part, and with its last one why it ended.

    Raises:
        RequestError: of the first that fails; the others are cancelled then.
    """
    queue: asyncio.Queue[tuple[int, Part, str | None] | RequestError] = asyncio.Queue()

    async def take(i: int, reply: Reply) -> None:
        try:
            async for part in reply.parts():
                queue.put_nowait((i, part, reply.finish_reason))
        except RequestError as error:
            queue.put_nowait(error)

    tasks = [asyncio.create_task(take(i, reply)) for i, reply in enumerate(replies)]
    try:
        left = len(tasks)
        while left:
            item = await queue.get()
            if isinstance(item, RequestError):
                raise item
            left -= item[2] is not None
            yield item
    finally:
        for task in tasks:
            task.cancel()
        for reply in replies:
            reply.cancel()
