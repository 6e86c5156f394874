"""Shared code of /v1/completions and /v1/chat/completions: turns a parsed request into a whole or streamed response."""

import asyncio
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Mapping, Sequence
from time import time
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import tiktoken
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from bentos.completion import Chunk, Completion, FinishReason, GenerationRequest, merge, usage
from bentos.dependencies import record, request_id, route_key, served
from bentos.errors import ServiceError
from bentos.openai.logprobs import TextOffsets
from bentos.openai.protocol import OpenAIRequest
from bentos.schemas import TUNED
from bentos.streaming import cancel_on_disconnect, event_stream, grammars

if TYPE_CHECKING:
    from bentos.generation import TextGenerator
    from gpt2core.sampling import Grammar


class Route(ABC):
    """A parsed request to an OpenAI route: its prompts and options, and how a completion becomes a choice."""

    object: str  # value of `object` in the response
    chunk_object: str  # value of `object` in a streamed event
    id_prefix: str
    prompt_field: str
    clean: bool  # whether the text is an answer, which is extracted from the generated text

    body: OpenAIRequest
    tokenizer: tiktoken.Encoding
    prompts: list[list[int]]
    max_new_tokens: int
    logprobs: int | None
    echo: bool = False  # the prompt is part of the text

    extra_fields: Mapping[str, Any] = MappingProxyType({})  # fields of the response in addition to OpenAI's

    @abstractmethod
    def choice(
        self, index: int, chunk: Chunk, finish_reason: FinishReason | None, offsets: Sequence[int]
    ) -> dict[str, Any]:
        """Build a choice of a whole response. `offsets`: where the chunk's tokens begin in the completion's text."""

    @abstractmethod
    def event_choice(
        self, index: int, chunk: Chunk, finish_reason: FinishReason | None, offsets: Sequence[int], first: bool
    ) -> dict[str, Any]:
        """Build a choice of an event. `first`: this is the first event of the choice."""


async def respond(request: Request, route: Route, deadline: float) -> Response:
    generator = served(request).generator
    body = route.body
    own = await grammars(request, body.structure(), len(route.prompts) * (body.n or 1), deadline)
    generation = generation_requests(route, generator, own, deadline, request)
    completions = generator.submit(generation, route.prompt_field, record(request).add)
    builder = _ResponseBuilder(route, completions, request_id(request), served(request).lineage.bento)
    if not route.body.stream:

        async def whole() -> dict[str, Any]:
            return builder.whole(await asyncio.gather(*(completion.whole() for completion in completions)))

        return JSONResponse(await cancel_on_disconnect(request, whole(), completions))

    async def events() -> AsyncIterator[dict[str, Any]]:
        async for i, chunk, finish_reason in merge(completions):
            yield builder.event(i, chunk, finish_reason)
        if (last := builder.usage_event()) is not None:
            yield last

    return await event_stream(request, events(), completions)


def generation_requests(
    route: Route, generator: "TextGenerator", grammars: Sequence["Grammar | None"], deadline: float, request: Request
) -> list[GenerationRequest]:
    """Build `n` requests for each prompt."""
    body = route.body
    model = body.model or TUNED
    generator.adapters.check_model(model, "model")
    if body.stream_options is not None and body.stream_options.include_usage and not body.stream:
        raise ServiceError("invalid_request", "stream_options: only together with stream", "stream_options")
    stop = [text for text in ([body.stop] if isinstance(body.stop, str) else body.stop or []) if text]

    config = generator.config(max(route.max_new_tokens, 1), body.sampling())

    def one(prompt: list[int], seed: int | None, grammar: "Grammar | None") -> GenerationRequest:
        return GenerationRequest(
            prompt,
            config if seed is None else config.with_seed(seed),
            model,
            deadline,
            request_id(request),
            route_key(request),
            stop=stop,
            clean=route.clean and grammar is None,
            logprobs=route.logprobs,
            stream=bool(body.stream),
            grammar=grammar,
            prompt_only=route.max_new_tokens == 0,
            echo=route.tokenizer.decode(prompt) if route.echo else None,
        )

    each = [(prompt, seed) for prompt in route.prompts for seed in body.seeds()]
    return [one(prompt, seed, grammar) for (prompt, seed), grammar in zip(each, grammars, strict=True)]


class _ResponseBuilder:
    """Builds OpenAI's responses and events from completions."""

    def __init__(self, route: Route, completions: Sequence[Completion], request_id: str, bento: str) -> None:
        self.route, self.completions = route, completions
        adapter = completions[0].adapter
        self._common = {
            "id": f"{route.id_prefix}-{request_id}",
            "created": int(time()),
            "model": completions[0].request.model,
            # identifies the Bento and the adapter by their content
            "system_fingerprint": f"{bento}+{adapter.sha256[:16]}" if adapter else bento,
            "adapter": adapter and adapter.model_dump(),
            **route.extra_fields,
        }
        options = route.body.stream_options
        self._include_usage = options is not None and bool(options.include_usage)
        self._continuous_usage = options is not None and bool(options.continuous_usage_stats)
        self._offsets = [
            TextOffsets(
                route.tokenizer,
                0 if one.request.echo is None else len(one.request.prompt),
                (route.tokenizer.eot_token, *one.request.config.stop_token_ids),
            )
            for one in completions
        ]
        self._started: set[int] = set()

    def whole(self, chunks: Sequence[Chunk]) -> dict[str, Any]:
        choices = [
            self.route.choice(i, chunk, completion.finish_reason, self._offsets[i].next(chunk.tokens))
            for i, (chunk, completion) in enumerate(zip(chunks, self.completions, strict=True))
        ]
        counts = usage(self.completions).model_dump()
        return {"object": self.route.object, **self._common, "choices": choices, "usage": counts}

    def event(self, i: int, chunk: Chunk, finish_reason: FinishReason | None) -> dict[str, Any]:
        offsets = self._offsets[i].next(chunk.tokens)
        choice = self.route.event_choice(i, chunk, finish_reason, offsets, first=i not in self._started)
        self._started.add(i)
        counts = usage(self.completions).model_dump() if self._continuous_usage else None
        fields = {"usage": counts} if self._include_usage else {}
        return {"object": self.route.chunk_object, **self._common, "choices": [choice], **fields}

    def usage_event(self) -> dict[str, Any] | None:
        """Return the last event, which has the token counts; None unless the request has `include_usage`."""
        if not self._include_usage:
            return None
        counts = usage(self.completions).model_dump()
        return {"object": self.route.chunk_object, **self._common, "choices": [], "usage": counts}
