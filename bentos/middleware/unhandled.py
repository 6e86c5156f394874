"""Answers a request whose handling raised, so that its connection stays usable."""

import logging

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from bentos.middleware.error_shape import error_of_status

logger = logging.getLogger(__name__)


class UnhandledErrorMiddleware:
    """Sends a 500 in the common error shape, unless the response has begun, and logs the error.

    For an exception after a response, also that of an error page, uvicorn would close the connection without announcing
    it, and the next request of the client's connection pool would fail.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = complete = False

        async def observed(message: Message) -> None:
            nonlocal started, complete
            started = True
            await send(message)
            complete = message["type"] == "http.response.body" and not message.get("more_body", False)

        try:
            await self.app(scope, receive, observed)
        except Exception:
            if scope["type"] != "http" or (started and not complete):
                raise  # the connection must be closed, or the client takes half a response for a whole one
            logger.exception("%s %s failed", scope["method"], scope["path"])
            if not started:
                await error_of_status(500, scope)(scope, receive, send)
