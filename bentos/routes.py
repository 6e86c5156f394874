"""The routes: a request's body to replies of the model, and those to an answer.

FastAPI's, not BentoML's: those of BentoML 1.4 ignore unknown keys, read a bare `curl -d` as a form, and hide the
message of most errors. Functions, not methods of the service: of those, FastAPI would make a handler anew for each
request.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from time import monotonic
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

from fastapi import FastAPI, Query, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ValidationError
from starlette.datastructures import State
from starlette.requests import ClientDisconnect
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from bentos.errors import RequestError
from bentos.gate import MODEL_ROUTE
from bentos.page import page
from bentos.schemas import (
    TUNED,
    AdapterVersion,
    ChatRequest,
    CompletionRequest,
    Envelope,
    ErrorResponse,
    LoadAdapterRequest,
    PredictRequest,
    PredictResponse,
    UnloadAdapterRequest,
    operation,
)

if TYPE_CHECKING:  # torch, which only the process that answers needs; the parent reads this file too (a second, 200 MB)
    from bentos.answering import Answerer, Reply

MAX_BODY = 1_000_000  # bytes
DEADLINE = 55.0  # seconds from the request's head to the answer's end, streams too

Format = Annotated[str, Query(json_schema_extra={"enum": ["", "lambda"]})]
M = TypeVar("M", bound=BaseModel)
T = TypeVar("T")

# its state, set by the service: answerer, lineage, and started in Unix seconds
app = FastAPI(title="gpt2-instruct", docs_url=None, redoc_url=None, openapi_url=None)
errors: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorResponse} for status in (400, 401, 404, 405, 408, 413, 429, 500, 503, 504)
}
admin_errors = {403: {"model": ErrorResponse}, **errors}


@app.exception_handler(RequestError)
async def _refuse(request: Request, error: RequestError) -> Response:
    return error.response()


@app.exception_handler(ClientDisconnect)
async def _gone(request: Request, error: ClientDisconnect) -> Response:
    """Nobody reads this; it is for the log and the metrics."""
    return RequestError(499, "client_closed_request", "the client has closed the connection").response()


@app.get("/", include_in_schema=False)
async def index() -> Response:
    """To try the model in a browser."""
    return page()


@app.post(
    "/predict",
    response_model=PredictResponse | Envelope,
    responses={status: {"model": ErrorResponse | Envelope} for status in errors},
    openapi_extra=operation(PredictRequest, stream=True),
)
async def predict(request: Request, format: Format = "") -> Response:
    """Answer an instruction.

    `?format=lambda` puts the answer, which is whole then, into the envelope of the system before this one.
    """
    if format not in ("", "lambda"):
        raise RequestError(400, "invalid_request", f"format is {format!r}; it may be lambda", "format")
    try:
        response = await _predict(request, enveloped=format == "lambda")
    except RequestError as error:
        response = error.response()
    return _envelope(response) if format == "lambda" else response


async def _predict(request: Request, enveloped: bool) -> Response:
    from bentos.answering import Wanted, usage
    from gpt2core.prompt import format_prompt

    deadline = monotonic() + DEADLINE
    asked = await _read(request, PredictRequest)
    stream = asked.stream and not enveloped
    answerer = _answerer(request)
    answerer.check_model(asked.adapter, "adapter")
    wanted = Wanted(
        answerer.tokenizer.encode_ordinary(format_prompt(asked.instruction, asked.input)),
        answerer.config(
            asked.max_new_tokens,
            "max_new_tokens",
            temperature=asked.temperature,
            top_k=asked.top_k,
            top_p=asked.top_p,
            seed=asked.seed,
        ),
        asked.adapter,
        deadline,
        [asked.stop] if isinstance(asked.stop, str) else asked.stop,
        stream=stream,
        answered=request.scope["answered"],
    )
    (reply,) = answerer.submit([wanted], "input" if asked.input else "instruction")

    def content(text: str) -> dict[str, Any]:
        ended = reply.finish_reason is not None
        return {
            "answer": text,
            "finish_reason": reply.finish_reason,
            "usage": usage([reply]).model_dump() if ended else None,
            "model": request.app.state.lineage["bento"],
            "adapter": reply.adapter and reply.adapter.model_dump(),
        }

    if not stream:
        part = await _unless_gone(request, reply.whole(), [reply])
        return JSONResponse(content(part.text))

    async def events() -> AsyncIterator[dict[str, Any]]:
        async for part in reply.parts():
            yield content(part.text)

    return await _stream(request, events(), [reply])


@app.post(
    "/v1/completions",
    response_model=dict[str, Any],
    responses=errors,
    openapi_extra=operation(CompletionRequest, stream=True),
)
async def completions(request: Request) -> Response:
    """Go on from a text, or several, as OpenAI's route of that name."""
    from bentos.openai import Completions

    return await _openai(request, CompletionRequest, Completions)


@app.post(
    "/v1/chat/completions",
    response_model=dict[str, Any],
    responses=errors,
    openapi_extra=operation(ChatRequest, stream=True),
)
async def chat_completions(request: Request) -> Response:
    """Answer an instruction, as OpenAI's route of that name: a user's turn, perhaps after a system message."""
    from bentos.openai import Chat

    return await _openai(request, ChatRequest, Chat)


async def _openai(request: Request, model: type[M], form: Callable[..., Any]) -> Response:
    from bentos.answering import merge
    from bentos.openai import Answer, wanted

    deadline, answered = monotonic() + DEADLINE, request.scope["answered"]
    answerer = _answerer(request)
    asked = form(await _read(request, model), answerer)
    replies = answerer.submit(wanted(asked, answerer, deadline, answered), asked.param)
    answer = Answer(asked, replies, answered["request_id"], request.app.state.lineage["bento"])
    if not asked.request.stream:

        async def whole() -> dict[str, Any]:
            return answer.whole(await asyncio.gather(*(reply.whole() for reply in replies)))

        return JSONResponse(await _unless_gone(request, whole(), replies))

    async def events() -> AsyncIterator[dict[str, Any]]:
        async for i, part, finish_reason in merge(replies):
            yield answer.chunk(i, part, finish_reason)
        if (last := answer.last_chunk()) is not None:
            yield last

    return await _stream(request, events(), replies)


@app.get("/v1/models", responses=errors)
async def list_models(request: Request) -> JSONResponse:
    """What `model` and `adapter` may name."""
    names = _answerer(request).models
    return JSONResponse({"object": "list", "data": [_model(request.app.state, name) for name in names]})


@app.get(MODEL_ROUTE, responses=errors)
async def get_model(request: Request, model: str) -> JSONResponse:
    name = request.scope["asked_path"].removeprefix("/v1/models/")  # the gate gives all of them one path
    _answerer(request).check_model(name, "model")
    return JSONResponse(_model(request.app.state, name))


def _model(state: State, name: str) -> dict[str, Any]:
    adapter: AdapterVersion | None = state.answerer.models[name]
    return {
        "id": name,
        "object": "model",
        "created": state.started,
        "owned_by": TUNED,
        "parent": None if adapter is None else "base",
        "sha256": state.lineage["base"]["sha256"] if adapter is None else adapter.sha256,
        "max_model_len": state.answerer.n_positions,
    }


@app.post(
    "/v1/load_lora_adapter",
    response_model=AdapterVersion,
    responses=admin_errors,
    openapi_extra=operation(LoadAdapterRequest),
)
async def load_adapter(request: Request) -> JSONResponse:
    """Load an adapter from below GPT2_ADAPTERS_DIR, or replace one; wants GPT2_ADMIN_TOKEN."""
    asked = await _read(request, LoadAdapterRequest)
    return JSONResponse((await _answerer(request).load(asked.lora_name, asked.lora_path)).model_dump())


@app.post("/v1/unload_lora_adapter", responses=admin_errors, openapi_extra=operation(UnloadAdapterRequest))
async def unload_adapter(request: Request) -> JSONResponse:
    """Forget a loaded adapter; wants GPT2_ADMIN_TOKEN."""
    asked = await _read(request, UnloadAdapterRequest)
    await _answerer(request).unload(asked.lora_name)
    return JSONResponse({"unloaded": asked.lora_name})


@app.get("/metadata", responses=errors)
async def metadata(request: Request) -> JSONResponse:
    """Run, commit, data, base and adapter of what answers here: the lineage.json of the run that made it."""
    return JSONResponse(request.app.state.lineage)


def _answerer(request: Request) -> "Answerer":
    answerer: Answerer = request.app.state.answerer
    return answerer


async def _read(request: Request, model: type[M]) -> M:
    """The body. JSON whatever its header says: a bare `curl -d` calls it a form."""
    if request.headers.get("content-type", "").startswith("multipart/"):
        raise RequestError(400, "invalid_request", "the body must be JSON, not multipart")
    body = bytearray()
    try:
        async with asyncio.timeout(DEADLINE):
            async for chunk in request.stream():
                body += chunk
                if len(body) > MAX_BODY:  # and read no further
                    raise RequestError(413, "body_too_large", f"the body may have at most {MAX_BODY} bytes")
    except TimeoutError:
        raise RequestError(408, "request_timeout", f"the body was not there after {DEADLINE:.0f} seconds") from None
    try:
        return model.model_validate_json(bytes(body))
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        field = str(first["loc"][0]) if first["loc"] else None
        message = f"{field}: {first['msg']}" if field else first["msg"]
        raise RequestError(400, "invalid_request", message, field) from None


async def _unless_gone(request: Request, answer: Coroutine[Any, Any, T], replies: "Sequence[Reply]") -> T:
    """The answer; if the client hangs up before, or anything else ends it, the engine is left."""
    answering = asyncio.create_task(answer)
    gone = asyncio.ensure_future(request.receive())  # the body was read, so all that can come is the end
    try:
        await asyncio.wait({answering, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not answering.done():
            raise ClientDisconnect
        return answering.result()
    except BaseException:
        for reply in replies:
            reply.cancel()
        raise
    finally:
        answering.cancel()
        gone.cancel()


async def _stream(request: Request, events: AsyncIterator[dict[str, Any]], replies: "Sequence[Reply]") -> Response:
    """Server-sent events. It begins with the first of them: what goes wrong before still has a status."""

    async def next_one() -> dict[str, Any]:
        return await anext(events)

    first = await _unless_gone(request, next_one(), replies)

    async def lines() -> AsyncIterator[bytes]:
        yield _event(first)
        try:
            async for event in events:
                yield _event(event)
        except RequestError as error:
            yield _event(error.content)
        else:
            yield b"data: [DONE]\n\n"

    return _EventStream(lines(), replies)


class _EventStream(StreamingResponse):
    """However it ends, the engine is left."""

    media_type = "text/event-stream"

    def __init__(self, content: AsyncIterator[bytes], replies: "Sequence[Reply]") -> None:
        # a proxy that collects a stream would take its point away
        super().__init__(content, headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        self._replies = replies

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            for reply in self._replies:
                reply.cancel()


def _event(content: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


def _envelope(response: Response) -> JSONResponse:
    content = {
        "statusCode": response.status_code,
        "headers": {"Content-Type": "application/json"},
        "body": bytes(response.body).decode(),
    }
    return JSONResponse(content, response.status_code)
