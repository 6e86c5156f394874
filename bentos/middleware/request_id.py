"""Adds X-Request-Id, X-Run-Id (the run that built the Bento) and Cache-Control to every response."""

import re
from uuid import uuid4

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

_VALID = re.compile(rb"[\w.-]{1,64}")


class RequestIdMiddleware:
    """Keeps the client's X-Request-Id if valid, else generates one; handlers find it in `request.state.request_id`."""

    def __init__(self, app: ASGIApp, run_id: str) -> None:
        self.app, self.run_id = app, run_id

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = dict(scope["headers"]).get(b"x-request-id", b"")
        request_id = given.decode() if _VALID.fullmatch(given) else uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id

        async def identified(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers["X-Request-Id"], headers["X-Run-Id"] = request_id, self.run_id
                # A shared cache would send a stored response to clients without a token: only the header Authorization
                # prevents that by default (RFC 9111, section 3.5), X-Api-Key does not.
                headers.setdefault("Cache-Control", "no-store")
            await send(message)

        await self.app(scope, receive, identified)
