"""Waiting for grammars, whole responses and server-sent events; a client disconnect cancels the completions."""

import asyncio
import json
from collections.abc import AsyncIterator, Coroutine, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from bentos.completion import Completion
from bentos.dependencies import served
from bentos.errors import ServiceError, error_content
from bentos.schemas import Structure

if TYPE_CHECKING:
    from gpt2core.sampling import Grammar

T = TypeVar("T")
# JSON allows these characters in strings, but some clients split lines at them (httpx: str.splitlines).
_LINE_ENDS = {code: f"\\u{code:04x}" for code in (0x85, 0x2028, 0x2029)}


async def cancel_on_disconnect(request: Request, work: Coroutine[Any, Any, T], completions: Sequence[Completion]) -> T:
    """Return the result of `work`. Cancels the completions if the client disconnects or `work` fails.

    Raises:
        ClientDisconnect
    """
    working = asyncio.create_task(work)
    disconnected = asyncio.ensure_future(request.receive())  # the body was read, so nothing else can arrive
    try:
        await asyncio.wait({working, disconnected}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    except BaseException:
        for completion in completions:
            completion.cancel()
        raise
    finally:
        working.cancel()
        disconnected.cancel()


async def grammars(
    request: Request, structure: Structure | None, n: int, deadline: float
) -> "Sequence[Grammar | None]":
    """Compile the grammars of the request's `n` completions; None for each if it has no structure.

    Raises:
        ClientDisconnect, ServiceError
    """
    if structure is None:
        return [None] * n
    return await cancel_on_disconnect(request, served(request).generator.grammars(structure, n, deadline), [])


async def event_stream(
    request: Request, events: AsyncIterator[dict[str, Any]], completions: Sequence[Completion]
) -> Response:
    """Return a response of server-sent events that ends with [DONE].

    Waits for the first event. An error before it is raised, so that the response has the error's HTTP status.
    """

    async def next_event() -> dict[str, Any]:
        return await anext(events)

    first = await cancel_on_disconnect(request, next_event(), completions)

    async def lines() -> AsyncIterator[bytes]:
        yield _line(first)
        try:
            async for event in events:
                yield _line(event)
        except ServiceError as error:
            yield _line(error_content(error.type, error.message, error.param))
        else:
            yield b"data: [DONE]\n\n"

    return _EventStream(lines(), completions)


class _EventStream(StreamingResponse):
    """Cancels the completions when the response ends: complete, after an error, or after a client disconnect."""

    media_type = "text/event-stream"

    def __init__(self, content: AsyncIterator[bytes], completions: Sequence[Completion]) -> None:
        # X-Accel-Buffering: no keeps nginx from buffering the events
        super().__init__(content, headers={"X-Accel-Buffering": "no"})
        self._completions = completions

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            for completion in self._completions:
                completion.cancel()


def _line(event: dict[str, Any]) -> bytes:
    data = json.dumps(event, ensure_ascii=False, separators=(",", ":")).translate(_LINE_ENDS)
    return f"data: {data}\n\n".encode()
