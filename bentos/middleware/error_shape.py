"""Gives errors of BentoML and the router (unknown route, wrong method, unhandled exception) the common error shape."""

from http import HTTPStatus

from starlette.datastructures import MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from bentos.errors import error_content, is_error


class ErrorShapeMiddleware:
    def __init__(self, app: ASGIApp) -> None:
        self.app = app

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
                    content = bytes(body) if is_error(body) else bytes(error_of_status(start["status"], scope).body)
                    headers = MutableHeaders(scope=start)
                    headers["Content-Type"], headers["Content-Length"] = "application/json", str(len(content))
                    await send(start)
                    await send({"type": "http.response.body", "body": content})

        await self.app(scope, receive, shaped)


def error_of_status(status: int, scope: Scope) -> JSONResponse:
    """Return the error response for a status without a message of its own."""
    phrase = HTTPStatus(status).phrase
    return JSONResponse(
        error_content(phrase.lower().replace(" ", "_"), f"{scope['method']} {scope['path']}: {phrase}"), status
    )
