"""What stands before every route: request ids, tokens, the access log, an orderly end; unknown paths get one name."""

import asyncio
import base64
import hmac
import json
import re
import signal
import sys
import threading
from collections.abc import Collection, Mapping
from datetime import UTC, datetime
from time import monotonic
from types import FrameType
from typing import Any
from uuid import uuid4

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from bentos.errors import RequestError

OPEN = ("/livez", "/readyz", "/healthz", "/metrics")  # without a token, and not in the access log
NOT_IN_SCHEMA = ("/", *OPEN, "/docs.json", "/schema.json")
ADMIN = ("/v1/load_lora_adapter", "/v1/unload_lora_adapter")
MODEL_ROUTE = "/v1/models/{model}"
UNKNOWN = "/unknown"
DRAIN = (1.0, 5.0)  # seconds that it goes on to answer after SIGTERM: at least, and at most while requests come
_REQUEST_ID = re.compile(rb"[\w.-]{1,64}")


class Gate:
    """ASGI, outside of BentoML's own middleware, whose metrics would make series of every path that is asked."""

    def __init__(self, app: ASGIApp, paths: Collection[str], run_id: str, tokens: Mapping[str, str]) -> None:
        """
        Args:
            paths: of all routes.
            run_id: the response header X-Run-Id.
            tokens: "api" and "admin": what the routes ask for; an empty "api": nothing.
        """
        self.app, self.paths, self.run_id = app, {*paths, *NOT_IN_SCHEMA}, run_id.encode()
        self.tokens = {name: token for name, token in tokens.items() if token}
        self.in_flight, self.draining = 0, False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        path, start, status = scope["path"], monotonic(), 0
        headers = dict(scope["headers"])
        given = headers.get(b"x-request-id", b"")
        request_id = given.decode() if _REQUEST_ID.fullmatch(given) else uuid4().hex
        scope["asked_path"] = path
        scope["answered"] = {"request_id": request_id}  # of the access log; routes add to it

        async def tell(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                own = [(b"x-request-id", request_id.encode()), (b"x-run-id", self.run_id)]
                message = {**message, "headers": [*message["headers"], *own]}
            await send(message)

        if path.startswith("/v1/models/"):
            scope["path"] = MODEL_ROUTE
        elif path not in self.paths:
            scope["path"] = UNKNOWN
        if path in OPEN:
            await self.app(scope, receive, tell)
            return
        self.in_flight += 1
        try:
            refused = self._refused(path, headers)
            await (refused.response() if refused else self.app)(scope, receive, tell)
        finally:
            self.in_flight -= 1
            _log(scope, status, monotonic() - start)

    def drain_at_sigterm(self) -> None:
        """At SIGTERM: not ready, but answering, until nothing is in flight or `DRAIN` has passed; then the end.

        Who routes requests here sees the first before a closed port.
        """
        if threading.current_thread() is not threading.main_thread():
            return  # of a test, say: signals are the main thread's
        loop, server = asyncio.get_running_loop(), signal.getsignal(signal.SIGTERM)
        if not callable(server):
            return

        async def drain(number: int, frame: FrameType | None) -> None:
            begin = monotonic()
            await asyncio.sleep(DRAIN[0])
            while self.in_flight and monotonic() < begin + DRAIN[1]:
                await asyncio.sleep(0.05)
            server(number, frame)

        tasks = []  # the loop itself keeps no hold of them

        def begin(number: int, frame: FrameType | None) -> None:
            if not self.draining:
                self.draining = True
                loop.call_soon_threadsafe(lambda: tasks.append(loop.create_task(drain(number, frame))))

        signal.signal(signal.SIGTERM, begin)

    def _refused(self, path: str, headers: Mapping[bytes, bytes]) -> RequestError | None:
        if path in ADMIN:
            if "admin" not in self.tokens:
                return RequestError(403, "forbidden", "this is off: the server has no GPT2_ADMIN_TOKEN")
            wanted = [self.tokens["admin"]]
        elif "api" in self.tokens:
            wanted = [*self.tokens.values()]
        else:
            return None
        # some proxies keep Authorization for themselves: Kubernetes' API server does
        given = headers.get(b"x-api-key") or _token(headers.get(b"authorization", b""))
        if sum(hmac.compare_digest(given, token.encode()) for token in wanted):  # all of them, each in constant time
            return None
        # a browser that opens the page asks its user, and sends the token as Basic's password from then on
        scheme = 'Basic realm="gpt2-instruct", charset="UTF-8"' if path == "/" else "Bearer"
        message = "a valid token is wanted: Authorization: Bearer …, or X-Api-Key"
        return RequestError(401, "unauthorized", message, headers={"WWW-Authenticate": scheme})


def _log(scope: Scope, status: int, seconds: float) -> None:
    client = scope.get("client")
    line: dict[str, Any] = {
        "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "client": client[0] if client else None,
        "method": scope["method"],
        "path": scope["asked_path"],
        "status": status,  # 0: the client was gone before there was one
        "milliseconds": round(1000 * seconds, 1),
        **scope["answered"],
    }
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()


def _token(authorization: bytes) -> bytes:
    scheme, _, value = authorization.partition(b" ")
    if scheme.lower() == b"bearer":
        return value.strip()
    if scheme.lower() == b"basic":
        try:
            return base64.b64decode(value, validate=True).partition(b":")[2]
        except ValueError:
            return b""
    return b""
