"""Reads and validates the body of a request."""

import asyncio
from codecs import BOM_UTF8
from difflib import get_close_matches
from typing import TypeVar

from pydantic import BaseModel, ValidationError
from starlette.requests import Request

from bentos.dependencies import served
from bentos.errors import ServiceError
from bentos.limits import DEADLINE, MAX_BODY, MAX_ERRORS, MAX_TOTAL_BODY, SMALL_BODY

M = TypeVar("M", bound=BaseModel)
REASONS = {  # pydantic's message -> this project's
    r"String should match pattern '\S'": "must not be empty or blank",
    "Extra inputs are not permitted": "unknown field",
}


async def read_body(request: Request, model: type[M]) -> M:
    """Read the body as `model`. It is parsed as JSON regardless of Content-Type: plain `curl -d` declares a form.

    Raises:
        ServiceError: a field is invalid, the body is too large, or it is not complete by the deadline.
    """
    if request.headers.get("content-type", "").startswith("multipart/"):
        raise ServiceError("invalid_request", "the body must be JSON, not multipart")
    encoding = request.headers.get("content-encoding", "identity")
    if encoding.lower() != "identity":
        message = f"Content-Encoding is {encoding}; send the body uncompressed"
        raise ServiceError("unsupported_media_type", message)
    content = await _read(request)
    try:
        # tools on Windows start files with a byte order mark
        return model.model_validate_json(content.removeprefix(BOM_UTF8).decode())
    except UnicodeDecodeError as error:
        message = (
            f"the body must be JSON in UTF-8, which its byte {error.start} (0x{error.object[error.start]:02x}) is not"
        )
        raise ServiceError("invalid_request", message) from None
    except ValidationError as error:
        raise _validation_error(error, model) from None


async def _read(request: Request) -> bytearray:
    body, budget = bytearray(), served(request).body_budget
    try:
        async with asyncio.timeout(DEADLINE):
            async for chunk in request.stream():
                body += chunk
                budget.n_bytes += len(chunk)
                if len(body) > MAX_BODY:  # stop reading
                    raise ServiceError("body_too_large", f"the body is larger than {MAX_BODY} bytes")
                if len(body) > SMALL_BODY and budget.n_bytes > MAX_TOTAL_BODY:
                    raise ServiceError("overloaded", "too many large bodies are being received; retry")
    except TimeoutError:
        message = f"the body was not complete after {DEADLINE:.0f} seconds"
        raise ServiceError("request_timeout", message) from None
    finally:
        budget.n_bytes -= len(body)
    return body


def _validation_error(error: ValidationError, model: type[BaseModel]) -> ServiceError:
    """Return the error for the first invalid field, with the reason."""
    if error.error_count() > MAX_ERRORS:
        return ServiceError("invalid_request", f"the body has {error.error_count()} unknown or invalid values")
    errors = error.errors(include_url=False, include_context=False, include_input=False)
    own = [one for one in errors if one["loc"][:1] == errors[0]["loc"][:1]]
    best = max(own, key=lambda one: _specificity(one["loc"], one["type"]))
    reason = REASONS.get(best["msg"], best["msg"]).removeprefix("Value error, ")
    if not best["loc"]:
        return ServiceError("invalid_request", reason)
    param, *inner = map(str, best["loc"])
    near = get_close_matches(param[:100], model.model_fields, n=1)
    if best["type"] == "extra_forbidden" and near and not inner:
        reason += f"; did you mean {near[0]}?"
    is_in_list = len(inner) > 0 and isinstance(best["loc"][1], int)  # else `inner` contains names of a union's types
    names_field = best["type"] in ("extra_forbidden", "unsupported")  # then the last part is a field of an object
    place = inner if is_in_list else [part for part in inner if part.isdecimal()] + (inner[-1:] if names_field else [])
    return ServiceError("invalid_request", f"{'.'.join([param, *place])}: {reason}", param)


def _specificity(location: tuple[int | str, ...], type: str) -> tuple[bool, int, int]:
    """Sort key that selects the most relevant of pydantic's errors for a value of a union type.

    Prefers errors at a list index above 0 and exceeded limits to wrong types, and then the deepest location.
    """
    index = sum(part for part in location if isinstance(part, int))
    return index > 0 or not type.endswith("_type"), len(location), index
