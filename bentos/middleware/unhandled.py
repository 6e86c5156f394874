"""Responds to a request whose handler raised an exception, so that its connection stays usable."""

import logging

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from bentos.middleware.error_shape import error_of_status

logger = logging.getLogger(__name__)


class UnhandledErrorMiddleware:
    """Sends a 500 in the common error shape, unless the response has begun, and logs the error.

    If an exception reaches uvicorn, it closes the connection without a `Connection: close` header, even if a complete
    response, such as an error page, was already sent. The next request of the client's connection pool would then fail.
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
                raise  # uvicorn closes the connection, so that the client can tell that the response is incomplete
            logger.exception("%s %s failed", scope["method"], scope["path"])
            if not started:
                await error_of_status(500, scope)(scope, receive, send)
