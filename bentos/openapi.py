"""OpenAPI schemas of bodies that FastAPI does not parse itself, and the limits of the served model in them."""

from typing import Any

from pydantic import BaseModel

from bentos.schemas import ErrorResponse

ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorResponse} for status in (400, 401, 403, 404, 405, 408, 413, 415, 429, 500, 503, 504)
}


def operation(model: type[BaseModel], stream: bool = False) -> dict[str, Any]:
    """Return `openapi_extra` of a route. `model`: schema of its body; `stream`: the response may be a stream."""
    schema = model.model_json_schema()
    body = {"required": True, "content": {"application/json": {"schema": _without_refs(schema, schema)}}}
    event = {"type": "object", "properties": {"data": {"type": "string", "description": "JSON; the last is [DONE]"}}}
    ok = {"responses": {"200": {"content": {"text/event-stream": {"schema": event}}}}} if stream else {}
    return {"requestBody": body, **ok}


def set_limits(schema: Any, n_positions: int, vocab_size: int) -> None:
    """Replace the names of limits in schemas.py and openai/protocol.py by the numbers of the model, in place."""
    limits = {"n_positions": n_positions, "vocab_size": vocab_size, "n_prompt": n_positions - 1}
    for key, value in schema.items() if isinstance(schema, dict) else enumerate(schema):
        if isinstance(value, dict | list):
            set_limits(value, n_positions, vocab_size)
        elif key in ("maximum", "exclusiveMaximum", "maxItems"):
            schema[key] = limits.get(value, value)


def _without_refs(schema: Any, root: dict[str, Any]) -> Any:
    """Replace each `$ref` by its target, because references are relative to the root of another document."""
    if isinstance(schema, list):
        return [_without_refs(one, root) for one in schema]
    if not isinstance(schema, dict):
        return schema
    if "$ref" in schema:
        return _without_refs(root["$defs"][schema["$ref"].rpartition("/")[2]], root)
    return {key: _without_refs(value, root) for key, value in schema.items() if key != "$defs"}
