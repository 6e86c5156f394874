"""Graceful shutdown: after SIGTERM the service is not ready, accepts requests for a short time, and then stops.

The order: first /readyz fails, and every response closes its connection. Then the port closes, while open connections
may still send a request. Then the server completes the requests in flight and exits.
"""

import asyncio
import signal
import threading
from collections.abc import Awaitable, Callable, Collection
from time import monotonic
from types import FrameType

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from bentos.errors import ServiceError, error_response
from bentos.limits import DRAIN_MAX, DRAIN_MIN, LAST_REQUESTS

READY_PATH = "/readyz"


Handler = Callable[[int, FrameType | None], object]  # a signal handler


class DrainMiddleware:
    """Lets load balancers see /readyz fail before the port closes."""

    def __init__(
        self, app: ASGIApp, uncounted_paths: Collection[str], stop_listening: Callable[[Handler], Awaitable[None]]
    ) -> None:
        """
        Args:
            uncounted_paths: probes and metrics. Their requests do not prolong the drain.
            stop_listening: closes the port of the server whose SIGTERM handler it gets; accepted connections stay open.
        """
        self.app, self.uncounted_paths, self._stop_listening = app, uncounted_paths, stop_listening
        self.in_flight, self.draining = 0, False
        self._task: asyncio.Task[None] | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, self._drain_after_startup(send))
            return
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        counted = scope["path"] not in self.uncounted_paths
        self.in_flight += counted
        try:
            if self.draining and scope["path"] == READY_PATH:
                error = ServiceError("shutting_down", "the service is shutting down")
                await error_response(error)(scope, receive, self._close_if_draining(send))
            else:
                await self.app(scope, receive, self._close_if_draining(send))
        finally:
            self.in_flight -= counted

    def _close_if_draining(self, send: Send) -> Send:
        async def closing(message: Message) -> None:
            if message["type"] == "http.response.start" and self.draining:
                MutableHeaders(scope=message)["Connection"] = "close"
            await send(message)

        return closing

    def _drain_after_startup(self, send: Send) -> Send:
        async def observed(message: Message) -> None:
            if message["type"] == "lifespan.startup.complete":
                self._install_sigterm_handler()
            await send(message)

        return observed

    def _install_sigterm_handler(self) -> None:
        """Drain at SIGTERM, and call the server's own handler afterwards."""
        server = signal.getsignal(signal.SIGTERM)
        if threading.current_thread() is not threading.main_thread() or not callable(server):
            return  # a test server: only the main thread receives signals
        loop = asyncio.get_running_loop()

        def begin(number: int, frame: FrameType | None) -> None:
            if not self.draining:
                self.draining = True
                loop.call_soon_threadsafe(start, number, frame)

        def start(number: int, frame: FrameType | None) -> None:
            self._task = loop.create_task(self._drain(server, number, frame))

        signal.signal(signal.SIGTERM, begin)

    async def _drain(self, server: Handler, number: int, frame: FrameType | None) -> None:
        start = monotonic()
        await asyncio.sleep(DRAIN_MIN)
        while self.in_flight and monotonic() < start + DRAIN_MAX:
            await asyncio.sleep(0.05)
        await self._stop_listening(server)
        await asyncio.sleep(LAST_REQUESTS)
        server(number, frame)
