"""Gives errors of BentoML and the router (unknown route, wrong method, unhandled exception) the common error shape."""

import re
from collections.abc import Collection
from http import HTTPStatus

from starlette.datastructures import MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from bentos.errors import error_content, is_error


class ErrorShapeMiddleware:
    def __init__(self, app: ASGIApp, paths: Collection[str] = ()) -> None:
        """
        Args:
            paths: the known paths, of which an unknown path may be a misspelling.
        """
        self.app, self.paths = app, paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        start: Message | None = None  # start of an error response, kept until its body is known
        body = bytearray()

        async def shaped(message: Message) -> None:
            nonlocal start
            if message["type"] == "http.response.start" and message["status"] >= 400:
                start = message
            elif start is None:
                await send(message)
            else:
                body.extend(message.get("body", b""))
                if not message.get("more_body", False):
                    content = bytes(body)
                    if not is_error(body):
                        content = bytes(error_of_status(start["status"], scope, self.paths).body)
                    headers = MutableHeaders(scope=start)
                    headers["Content-Type"], headers["Content-Length"] = "application/json", str(len(content))
                    await send(start)
                    await send({"type": "http.response.body", "body": content})

        await self.app(scope, receive, shaped)


def error_of_status(status: int, scope: Scope, paths: Collection[str] = ()) -> JSONResponse:
    """Return the error response for a status without a message of its own."""
    phrase = HTTPStatus(status).phrase
    hint = _hint(scope["path"], paths) if status == HTTPStatus.NOT_FOUND else ""
    message = f"{scope['method']} {scope['path']}: {phrase}{hint}"
    return JSONResponse(error_content(phrase.lower().replace(" ", "_"), message), status)


def _hint(path: str, paths: Collection[str]) -> str:
    """Return the way out for a path that is not known."""
    if path.endswith("/responses"):  # the default of Agents SDK, Vercel's AI SDK and others for any base URL
        return "; this server has no Responses API: make the client use /v1/chat/completions"
    near = nearest_path(path, paths)
    return f"; did you mean {near}?" if near else ""


def nearest_path(path: str, paths: Collection[str]) -> str:
    """Return the shortest known path that an unknown one ends with, begins with, or is the end of; "" if there is none.

    Such a path comes from a base URL that lacks /v1, has it twice, or is already the whole URL of a route.
    """
    path = re.sub("/+", "/", path).rstrip("/")
    known = [each for each in paths if len(each) > 1 and "{" not in each]
    near = [each for each in known if each.endswith(path) or path.endswith(each) or path.startswith(f"{each}/")]
    return min(near, key=len) if path and near else ""
