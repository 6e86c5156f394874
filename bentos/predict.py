"""POST /predict: answers an instruction."""

from collections.abc import AsyncIterator
from time import monotonic
from typing import Annotated, Any

from fastapi import APIRouter, Query
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from bentos.body import read_body
from bentos.completion import Completion, GenerationRequest, usage
from bentos.dependencies import record, request_id, route_key, served
from bentos.errors import ServiceError, error_response
from bentos.limits import DEADLINE
from bentos.openapi import ERRORS, operation
from bentos.schemas import DEFAULTS, TUNED, Envelope, ErrorResponse, PredictRequest, PredictResponse
from bentos.streaming import cancel_on_disconnect, event_stream, grammars

Format = Annotated[str, Query(json_schema_extra={"enum": ["", "lambda"]})]

router = APIRouter()


@router.post(
    "/predict",
    response_model=PredictResponse | Envelope,
    responses={status: {"model": ErrorResponse | Envelope} for status in ERRORS},
    openapi_extra=operation(PredictRequest, stream=True),
)
async def predict(request: Request, format: Format = "") -> Response:
    """Answer an instruction.

    `?format=lambda` wraps the whole response in the envelope of mariovas3/llms, so it cannot be streamed.
    """
    if format not in ("", "lambda"):
        raise ServiceError("invalid_request", f"format is {format!r}; it must be lambda, or absent", "format")
    if format == "":
        return await _predict(request, may_stream=True)
    try:
        response = await _predict(request, may_stream=False)
    except ServiceError as error:
        response = error_response(error)
    return _envelope(response)


async def _predict(request: Request, may_stream: bool) -> Response:
    deadline = monotonic() + DEADLINE
    body = await read_body(request, PredictRequest)
    stream = bool(body.stream)
    if stream and not may_stream:
        message = "stream is true, but format=lambda is one whole response; leave out one of them"
        raise ServiceError("invalid_request", message, "stream")
    adapter = TUNED if body.adapter is None else body.adapter
    max_new_tokens = DEFAULTS.max_new_tokens if body.max_new_tokens is None else body.max_new_tokens
    generator = served(request).generator
    if max_new_tokens > generator.n_positions:
        message = f"max_new_tokens is {max_new_tokens}, but the context holds {generator.n_positions} tokens"
        raise ServiceError("invalid_request", message, "max_new_tokens")
    config = generator.config(max_new_tokens, body.sampling())
    [grammar] = await grammars(request, body.structure(), 1, deadline)
    generator.adapters.check_model(adapter, "adapter")  # after the last await, during which it could be unloaded
    generation = GenerationRequest(
        generator.encode_instruction(body.instruction, body.input or ""),
        config,
        adapter,
        deadline,
        request_id(request),
        route_key(request),
        stop=[body.stop] if isinstance(body.stop, str) else body.stop or [],
        clean=grammar is None,
        stream=stream,
        grammar=grammar,
    )
    completions = generator.submit([generation], "input" if body.input else "instruction", record(request).add)
    (completion,) = completions
    bento = served(request).lineage.bento
    if not stream:
        chunk = await cancel_on_disconnect(request, completion.whole(), completions)
        return JSONResponse(_content(completion, chunk.text, bento))

    async def events() -> AsyncIterator[dict[str, Any]]:
        async for chunk in completion.chunks():
            yield _content(completion, chunk.text, bento)

    return await event_stream(request, events(), completions)


def _content(completion: Completion, text: str, bento: str) -> dict[str, Any]:
    ended = completion.finish_reason is not None
    return {
        "answer": text,
        "finish_reason": completion.finish_reason,
        "usage": usage([completion]).model_dump() if ended else None,
        "model": bento,
        "adapter": completion.adapter and completion.adapter.model_dump(),
    }


def _envelope(response: Response) -> JSONResponse:
    content = {
        "statusCode": response.status_code,
        "headers": {"Content-Type": "application/json"},
        "body": bytes(response.body).decode(),
    }
    return JSONResponse(content, response.status_code)
