"""Reads and validates the body of a request."""

import asyncio
from typing import TypeVar

from pydantic import BaseModel, ValidationError
from starlette.requests import Request

from bentos.errors import ServiceError
from bentos.limits import DEADLINE, MAX_BODY

M = TypeVar("M", bound=BaseModel)


async def read_body(request: Request, model: type[M]) -> M:
    """Read the body as `model`. It is parsed as JSON regardless of Content-Type, since plain `curl -d` declares a form.

    Raises:
        ServiceError: a field is invalid, the body is too large, or it is not complete by the deadline.
    """
    if request.headers.get("content-type", "").startswith("multipart/"):
        raise ServiceError("invalid_request", "the body must be JSON, not multipart")
    body = bytearray()
    try:
        async with asyncio.timeout(DEADLINE):
            async for chunk in request.stream():
                body += chunk
                if len(body) > MAX_BODY:  # stop reading
                    raise ServiceError("body_too_large", f"the body is larger than {MAX_BODY} bytes")
    except TimeoutError:
        message = f"the body was not complete after {DEADLINE:.0f} seconds"
        raise ServiceError("request_timeout", message) from None
    try:
        return model.model_validate_json(bytes(body))
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        location = first["loc"]
        param = str(location[0]) if location else None
        in_list = len(location) > 1 and isinstance(location[1], int)  # else the rest names types of a union
        name = ".".join(map(str, location)) if in_list else param
        reason = first["msg"].removeprefix("Value error, ")
        message = f"{name}: {reason}" if name else reason
        raise ServiceError("invalid_request", message, param) from None
