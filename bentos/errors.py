"""Errors of the service and their HTTP responses: a status and {"error": {"type", "message", "param", "code"}}."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from starlette.responses import JSONResponse

from bentos.limits import RETRY_AFTER

STATUS: Mapping[str, int] = {
    "invalid_request": 400,
    "context_length_exceeded": 400,
    "invalid_adapter": 400,
    "too_many_adapters": 400,
    "unauthorized": 401,
    "forbidden": 403,
    "model_not_found": 404,
    "adapter_not_found": 404,
    "request_timeout": 408,
    "body_too_large": 413,
    "unsupported_media_type": 415,
    "overloaded": 429,
    "headers_too_large": 431,
    "client_closed_request": 499,
    "generation_failed": 500,
    "shutting_down": 503,
    "deadline_exceeded": 504,
}
HEADERS: Mapping[str, Mapping[str, str]] = {"overloaded": {"Retry-After": str(RETRY_AFTER)}}


@dataclass(eq=False)
class ServiceError(Exception):
    """A request that cannot be completed.

    Args:
        type: a key of `STATUS`.
        message: names the field, its value and the limit.
        param: the invalid field of the request, if any.
    """

    type: str
    message: str
    param: str | None = None


def error_content(type: str, message: str, param: str | None = None) -> dict[str, Any]:
    """The body of every error. `code` repeats the type, because OpenAI's clients read it there."""
    return {"error": {"type": type, "message": message, "param": param, "code": type}}


def is_error(body: bytes | bytearray) -> bool:
    """Whether a body has the form of `error_content`, or is /predict's envelope (`bentos.schemas.Envelope`) of one."""
    try:
        content = json.loads(body)
    except ValueError:
        return False
    return isinstance(content, dict) and (isinstance(content.get("error"), dict) or "statusCode" in content)


def error_response(error: ServiceError, headers: Mapping[str, str] | None = None) -> JSONResponse:
    content = error_content(error.type, error.message, error.param)
    return JSONResponse(content, STATUS[error.type], {**HEADERS.get(error.type, {}), **(headers or {})})
