"""Graceful shutdown: after SIGTERM the service reports not ready, still answers for a while, and then stops."""

import asyncio
import signal
import threading
from collections.abc import Callable, Collection
from time import monotonic
from types import FrameType

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from bentos.errors import ServiceError, error_response
from bentos.limits import DRAIN_MAX, DRAIN_MIN

READY_PATH = "/readyz"


class DrainMiddleware:
    """Whatever routes requests here sees /readyz fail before the port closes."""

    def __init__(self, app: ASGIApp, uncounted_paths: Collection[str]) -> None:
        """`uncounted_paths`: probes and metrics, which do not prolong the drain."""
        self.app, self.uncounted_paths = app, uncounted_paths
        self.in_flight, self.draining = 0, False
        self._task: asyncio.Task[None] | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, self._drain_after_startup(send))
        elif scope["type"] == "http" and self.draining and scope["path"] == READY_PATH:
            await error_response(ServiceError("shutting_down", "the service is shutting down"))(scope, receive, send)
        elif scope["type"] == "http" and scope["path"] not in self.uncounted_paths:
            self.in_flight += 1
            try:
                await self.app(scope, receive, send)
            finally:
                self.in_flight -= 1
        else:
            await self.app(scope, receive, send)

    def _drain_after_startup(self, send: Send) -> Send:
        async def observed(message: Message) -> None:
            if message["type"] == "lifespan.startup.complete":
                self._take_sigterm()
            await send(message)

        return observed

    def _take_sigterm(self) -> None:
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

    async def _drain(
        self, server: Callable[[int, FrameType | None], object], number: int, frame: FrameType | None
    ) -> None:
        start = monotonic()
        await asyncio.sleep(DRAIN_MIN)
        while self.in_flight and monotonic() < start + DRAIN_MAX:
            await asyncio.sleep(0.05)
        server(number, frame)
