"""The service: HTTP in, HTTP out, lineage beside it. `steps/adapters/bento.py` builds it.

BentoML serves health, metrics and the schema. The routes are FastAPI's: BentoML 1.4's own ignore unknown keys, read a
bare `curl -d` as a form, and hide the message of most errors.
"""

import asyncio
import json
import os
from collections.abc import Coroutine
from pathlib import Path
from time import monotonic
from typing import Any

import bentoml
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect

from bentos.errors import OneErrorShape, RequestError
from bentos.schemas import ErrorResponse, PredictRequest, PredictResponse

MAX_BODY = 1_000_000  # bytes
DEADLINE = 55.0  # seconds: below BentoML's own limit, which answers 504 but lets the work go on
TIMEOUT = 60  # seconds
LINEAGE = Path(__file__).parent.parent / "lineage.json"


class Models(BaseModel):
    """Exact tags in the model store, fixed when the Bento is built."""

    base: str
    adapter: str


models = bentoml.use_arguments(Models)
app = FastAPI(title="gpt2-instruct", docs_url=None, redoc_url=None)
errors: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorResponse} for status in (400, 404, 405, 413, 415, 429, 500, 503, 504)
}


@bentoml.service(name="gpt2-instruct", workers=1, traffic={"timeout": TIMEOUT})
@bentoml.asgi_app(app, path="/")
class GPT2Instruct:
    base = bentoml.models.BentoModel(models.base)
    adapter = bentoml.models.BentoModel(models.adapter)

    def __init__(self) -> None:
        # here: BentoML's parent process reads this file too, and need not load torch for it (a second, 200 MB)
        from bentos.answering import Answerer

        self.lineage = json.loads(LINEAGE.read_text(encoding="utf-8"))
        weights = os.environ.get("GPT2_WEIGHTS", "fp32")
        self.answerer = Answerer(self.base.path, self.adapter.path, self.lineage["bento"], weights)

    @bentoml.on_shutdown
    def close(self) -> None:
        self.answerer.close()

    @app.post(
        "/predict",
        response_model=PredictResponse,
        responses=errors,
        openapi_extra={
            "requestBody": {
                "required": True,
                "content": {"application/json": {"schema": PredictRequest.model_json_schema()}},
            }
        },
    )
    async def predict(self, request: Request, format: str = "") -> JSONResponse:
        """Answer an instruction. `?format=lambda` puts the answer into the envelope of the system before this one."""
        deadline = monotonic() + DEADLINE
        try:
            if format not in ("", "lambda"):
                raise RequestError(400, "invalid_request", f"format is {format!r}; it may be lambda", "format")
            wanted = _parse(await _body(request))
            answered = await _unless_gone(request, self.answerer.answer(wanted, deadline))
            response = JSONResponse(answered.model_dump())
        except ClientDisconnect:  # nobody reads this; it is for the log and the metrics
            response = RequestError(499, "client_closed_request", "the client has closed the connection").response()
        except RequestError as error:
            response = error.response()
        return _envelope(response) if format == "lambda" else response

    @app.get("/metadata")
    async def metadata(self) -> JSONResponse:
        """Run, commit, data, base and adapter of what answers here: the lineage.json of the run that made it."""
        return JSONResponse(self.lineage)


async def _body(request: Request) -> bytes:
    """The body, read no further than the limit. JSON whatever its header says: a bare `curl -d` calls it a form."""
    if request.headers.get("content-type", "").startswith("multipart/"):
        raise RequestError(415, "unsupported_media_type", "the body must be JSON, not multipart")
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_BODY:
            raise RequestError(413, "body_too_large", f"the body may have at most {MAX_BODY} bytes")
    return bytes(body)


async def _unless_gone(request: Request, answer: Coroutine[Any, Any, PredictResponse]) -> PredictResponse:
    """The answer; if the client hangs up before, it is cancelled."""
    answering = asyncio.create_task(answer)
    gone = asyncio.ensure_future(request.receive())  # the body was read, so all that can come is the end
    try:
        await asyncio.wait({answering, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not answering.done():
            raise ClientDisconnect
        return answering.result()
    finally:
        answering.cancel()
        gone.cancel()


def _parse(body: bytes) -> PredictRequest:
    try:
        return PredictRequest.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        field = str(first["loc"][0]) if first["loc"] else None
        message = f"{field}: {first['msg']}" if field else first["msg"]
        raise RequestError(400, "invalid_request", message, field) from None


def _envelope(response: JSONResponse) -> JSONResponse:
    content = {
        "statusCode": response.status_code,
        "headers": {"Content-Type": "application/json"},
        "body": bytes(response.body).decode(),
    }
    return JSONResponse(content, response.status_code)


GPT2Instruct.add_asgi_middleware(OneErrorShape)  # type: ignore[attr-defined]  # the decorator's
