"""Workarounds that use private names of BentoML 1.4.39 and uvicorn 0.54, each with the reason.

tests/bentos/test_compat.py fails when BentoML no longer needs one of them.
"""

import asyncio
import atexit
import json
import os
import select
import shutil
import signal
import socket
import struct
import tempfile
from array import array
from collections.abc import Callable
from contextlib import suppress
from http import HTTPStatus
from typing import Any
from uuid import uuid4

import click
from _bentoml_sdk import Service
from _bentoml_sdk.service.openapi import generate_spec
from bentoml._internal.configuration.containers import BentoMLContainer
from bentoml._internal.server.http.instruments import RunnerTrafficMetricsMiddleware
from bentoml._internal.server.http.traffic import TimeoutMiddleware
from httptools import HttpParserError, HttpParserUpgrade, HttpRequestParser
from opentelemetry.instrumentation.asgi import OpenTelemetryMiddleware
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http import auto
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from bentos.errors import STATUS, error_content
from bentos.limits import DEADLINE, HEADER_TIMEOUT, KEEP_ALIVE, LAST_HANDSHAKES, MAX_HEADER_BYTES

SO_ATTACH_FILTER, SO_DETACH_FILTER = 26, 27  # Linux constants that Python's socket module does not have
_REQUEST_SCOPE = "gpt2_instruct.request_scope"


class WrappableService(Service[Any]):
    """A service whose ASGI app and OpenAPI document a subclass may change; passed as `service_class`.

    `Service.add_asgi_middleware` is public, but what it adds runs inside BentoML's metrics middleware, so responses
    that it sends itself have no request id, and it cannot change the path that the metrics are labeled with.
    """

    def wrap(self, app: Starlette) -> ASGIApp:
        """Called once per worker with BentoML's app; returns the app to serve."""
        return app

    def complete_spec(self, paths: dict[str, Any]) -> None:
        """Called with the paths of the OpenAPI document, to change them in place."""

    def inject_config(self) -> None:
        """BentoML calls it in every process; in the parent process before anything else."""
        super().inject_config()
        context = click.get_current_context(silent=True)
        if context is not None and context.info_name == "serve":
            http = BentoMLContainer.http
            check_port(context.params["host"] or http.host.get(), context.params["port"] or http.port.get())
            use_own_metrics_directory()
            stop_at_sighup()
            kill_at_sigint_while_stopping()

    def to_asgi(self, is_main: bool = True) -> ASGIApp:
        return self.wrap(super().to_asgi(is_main))

    @property
    def openapi_spec(self) -> Any:
        """BentoML's default says OpenAPI 3.0.2, but the schemas of mounted FastAPI apps are 3.1's."""
        spec = generate_spec(self, openapi_version="3.1.0")
        self.complete_spec(spec.paths)
        return spec


def remove_timeout(app: Starlette) -> None:
    """Remove BentoML's timeout: its timer outlives the response, 1 KB for 60 s each (93 MB in a minute of load).

    The routes have their own deadline, which also stops decoding.
    """
    _remove(app, TimeoutMiddleware)


def remove_redirects(app: Starlette) -> None:
    """Remove the redirect from /predict/ to /predict: its target is an http URL of the host in the Host header."""
    app.router.redirect_slashes = False


def alias_path(app: Starlette, path: str, alias: str) -> None:
    """Serve the route at `path` at `alias` too. BentoML's own routes have fixed paths."""
    endpoint = next(route.endpoint for route in app.routes if isinstance(route, Route) and route.path == path)
    app.router.routes.insert(0, Route(alias, endpoint))  # before the mounted FastAPI app, which matches every path


def remove_tracing(app: Starlette) -> None:
    """Remove BentoML's tracing, 20 % of the HTTP overhead: it records a span per message even without an exporter."""
    _remove(app, OpenTelemetryMiddleware)


def limit_metric_labels(app: Starlette, label: Callable[[str], str]) -> None:
    """Replace the path label of BentoML's HTTP metrics by `label(path)`.

    BentoML uses the raw path, which creates about 20 time series for each path that was ever requested.
    """

    def bounded(each: Middleware) -> Middleware:
        return Middleware(_BoundedMetrics, label=label, **each.kwargs)  # type: ignore[arg-type]

    app.user_middleware = [
        bounded(each) if each.cls is RunnerTrafficMetricsMiddleware else each for each in app.user_middleware
    ]


class _BoundedMetrics(RunnerTrafficMetricsMiddleware):
    """Gives BentoML's middleware a copy of the scope with another path. The app behind it gets the original scope."""

    def __init__(self, app: ASGIApp, label: Callable[[str], str], **options: Any) -> None:
        async def with_request_scope(scope: Scope, receive: Receive, send: Send) -> None:
            await app(scope.get(_REQUEST_SCOPE, scope), receive, send)

        super().__init__(with_request_scope, **options)
        self._label = label

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            scope = {**scope, "path": self._label(scope["path"]), _REQUEST_SCOPE: scope}
        await super().__call__(scope, receive, send)


class BoundedHttpProtocol(HttpToolsProtocol):
    """uvicorn's httptools protocol with three limits, this project's errors, and support for more clients.

    The limits: header size, time to receive the headers, and time without reads. The clients: those that offer an
    upgrade to HTTP/2, and those of HTTP/1.0.

    Without the limits, uvicorn buffers headers of any size, waits for the end of headers forever, and keeps a response
    in memory while its client reads nothing. uvicorn limits headers only with its other parser, h11
    (https://github.com/Kludex/uvicorn/issues/157).

    Idle connections are kept for `KEEP_ALIVE` seconds instead of uvicorn's 5. A proxy that reuses connections for
    longer than the server keeps them would send requests to closed connections, and respond with 502.

    A server may ignore an offer to upgrade (RFC 9110, section 7.8), but httptools then takes the body for another
    protocol's data. Java's HttpClient offers HTTP/2 in every request to an http URL.
    """

    run_id = ""  # for the header of errors

    _n_bytes = 0  # received bytes of the current request, without its body
    _without_offer = b""  # head of a request that offers an upgrade, without the offer: it is to be parsed again
    _timer: asyncio.TimerHandle | None = None  # runs until the headers are complete
    _write_timer: asyncio.TimerHandle | None = None  # runs while the client reads less than is written

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.timeout_keep_alive = max(self.timeout_keep_alive, KEEP_ALIVE)
        self._start_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        self._stop_write_timer()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._write_timer = self.loop.call_later(DEADLINE, self.transport.abort)

    def resume_writing(self) -> None:
        self._stop_write_timer()
        super().resume_writing()

    def _stop_write_timer(self) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None

    def data_received(self, data: bytes) -> None:
        self._n_bytes += len(data)
        self._unset_keepalive_if_required()
        self._parse(data)
        if self._n_bytes > MAX_HEADER_BYTES and not self.transport.is_closing():
            self._refuse_headers()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._start_timer()

    def on_headers_complete(self) -> None:
        self._stop_timer()
        if len(self.url) + sum(len(name) + len(value) for name, value in self.headers) > MAX_HEADER_BYTES:
            self._refuse_headers()  # data_received does not see headers that arrive in one read with the request's end
            raise ValueError  # ends the parsing of what follows
        method = self.parser.get_method()
        if self.parser.should_upgrade() and not self._should_upgrade() and method != b"CONNECT":
            start = b"%b %b HTTP/%b" % (method, self.url, self.parser.get_http_version().encode())
            others = [b"%b: %b" % header for header in self.headers if header[0] != b"upgrade"]
            self._without_offer = b"\r\n".join([start, *others, b"", b""])
            return
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._n_bytes -= len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        if not self._without_offer:
            self._n_bytes = 0
            super().on_message_complete()

    def _parse(self, data: bytes) -> None:
        while data:
            try:
                self.parser.feed_data(data)
                return
            except HttpParserUpgrade as upgrade:
                [n_parsed] = upgrade.args
                if not self._without_offer:
                    if self._should_upgrade():
                        self.handle_websocket_upgrade()
                    return
                data, self._without_offer = self._without_offer + data[n_parsed:], b""
                self.parser = HttpRequestParser(self)  # the old one accepts nothing after `Connection: close`
                self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn's
            except HttpParserError:
                self._refuse_invalid()
                return

    def _refuse_invalid(self) -> None:
        """Respond to a request that is not valid HTTP. uvicorn's error is plain text.

        If the request before it has no response yet, completes that response and closes the connection.
        """
        self._stop_timer()
        if self.transport.is_closing():
            return
        if self._may_respond():
            self._refuse("invalid_request", "the request is not valid HTTP")
        else:
            self.cycle.keep_alive = False

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        super()._start_asgi_task(cycle, _without_chunks(app, cycle) if cycle.scope["http_version"] == "1.0" else app)

    def _start_timer(self) -> None:
        if self._timer is None:
            message = f"the headers were not complete after {HEADER_TIMEOUT:.0f} seconds"
            self._timer = self.loop.call_later(HEADER_TIMEOUT, self._refuse, "request_timeout", message)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _refuse_headers(self) -> None:
        self._refuse("headers_too_large", f"the request's headers are larger than {MAX_HEADER_BYTES} bytes")

    def _refuse(self, type: str, message: str) -> None:
        """Close the connection. Sends an error first if a request has begun and the app cannot have responded to it."""
        if self._n_bytes and self._may_respond():
            content = json.dumps(error_content(type, message)).encode()
            lines = (
                f"HTTP/1.1 {STATUS[type]} {HTTPStatus(STATUS[type]).phrase}",
                "Content-Type: application/json",
                f"Content-Length: {len(content)}",
                "Cache-Control: no-store",
                f"X-Request-Id: {uuid4().hex}",
                f"X-Run-Id: {self.run_id}",
                "Connection: close",
            )
            self.transport.write("\r\n".join([*lines, "", ""]).encode() + content)
            if self.cycle is not None:
                self.cycle.disconnected = True  # the app sends nothing more
        self.transport.close()

    def _may_respond(self) -> bool:
        """Whether the next response is that of the request that is being received, and the app has not begun it."""
        cycle = self.cycle
        if self.pipeline:
            return False
        return cycle is None or cycle.response_complete or (cycle.more_body and not cycle.response_started)


def _without_chunks(app: Any, cycle: RequestResponseCycle) -> Any:
    """Send responses without Content-Length as they are; the end of the connection, which uvicorn closes, ends them.

    Clients of HTTP/1.0 do not know chunks (RFC 9112, section 6.1), but uvicorn sends them.
    """

    async def wrapped(scope: Scope, receive: Receive, send: Send) -> None:
        has_length = False

        async def unchunked(message: Message) -> None:
            nonlocal has_length
            if message["type"] == "http.response.start":
                has_length = any(name.lower() == b"content-length" for name, _ in message.get("headers", ()))
            if not has_length:
                cycle.chunked_encoding, cycle.expected_content_length = False, len(message.get("body", b""))
            await send(message)

        await app(scope, receive, unchunked)

    return wrapped


def limit_headers(run_id: str) -> None:
    """Make uvicorn use `BoundedHttpProtocol`. BentoML starts uvicorn afterwards, in this process."""
    auto.AutoHTTPProtocol = type("HttpProtocol", (BoundedHttpProtocol,), {"run_id": run_id})


def check_port(host: str, port: int) -> None:
    """Exit with a one-line error if the port cannot be listened on. BentoML would exit with a traceback."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as BentoML's socket
        try:
            probe.bind((host, port))
        except OSError as error:
            raise SystemExit(f"Error: cannot listen on {host}, port {port}: {error.strerror}") from None


def use_own_metrics_directory() -> None:
    """Keep this server's metrics apart. By default they are in BENTOML_HOME, and a server that starts deletes them."""
    directory = tempfile.mkdtemp(prefix="bentoml-metrics-")
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    BentoMLContainer.prometheus_multiproc_dir.set(directory)


def stop_at_sighup() -> None:
    """Make BentoML's parent process stop at SIGHUP as at SIGTERM, unless SIGHUP is ignored, as after `nohup`.

    By default it starts a second worker, and ends the first one, which closes the port of both (`stop_listening`).
    """
    from bentoml._internal.utils.circus import Arbiter  # no worker needs it, and tornado and zmq, which it imports

    ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    Arbiter.reload = lambda self, **_: None if ignored else self.stop()


def kill_at_sigint_while_stopping() -> None:
    """Make BentoML's parent process kill its workers at SIGINT (Ctrl-C) while it stops.

    By default it only waits for them, up to a minute if they have requests in flight.
    """
    from bentoml._internal.utils.circus import Arbiter  # as in `stop_at_sighup`

    stop = Arbiter.stop

    def kill(arbiter: Arbiter) -> None:
        for watcher in arbiter.iter_watchers():
            for process in watcher.processes.values():
                process.send_signal(signal.SIGKILL)

    def stop_once(arbiter: Arbiter) -> None:
        signal.signal(signal.SIGINT, lambda *_: kill(arbiter))
        return stop(arbiter)

    Arbiter.stop = stop_once  # type: ignore[method-assign, assignment]


async def stop_listening(sigterm_handler: Callable[..., object]) -> None:
    """Refuse new connections; accepted connections stay open.

    Args:
        sigterm_handler: uvicorn's handler, a method of the `Server` that listens.

    uvicorn only closes this process's descriptor of the listening socket. BentoML's parent process also has a
    descriptor, so the kernel would accept connections for another second, and reset them when the parent exits.
    `shutdown` ends listening itself (Linux), but resets connections that are not accepted yet. A packet filter
    therefore drops new connections first. A client that tries to connect during that time retries after a second,
    and is refused then. If only the worker was stopped, BentoML starts another one, which listens again.
    """
    servers = getattr(getattr(sigterm_handler, "__self__", None), "servers", [])
    for listening in [listening for server in servers for listening in server.sockets]:
        with socket.socket(fileno=os.dup(listening.fileno())) as duplicate:
            _drop_new_connections(duplicate)
            await asyncio.sleep(LAST_HANDSHAKES)  # the event loop accepts
            while select.select([duplicate], [], [], 0)[0]:
                await asyncio.sleep(0.01)
            duplicate.shutdown(socket.SHUT_RDWR)
            with suppress(OSError):  # no filter
                duplicate.setsockopt(socket.SOL_SOCKET, SO_DETACH_FILTER, 0)
    for server in servers:
        server.close()


def _drop_new_connections(listening: socket.socket) -> None:
    """Make the kernel drop the first packet (SYN) of each new connection. Other packets pass.

    Has no effect except for TCP on Linux.
    """
    program = (  # classic BPF: code, jump if true, jump if false, operand
        (0x30, 0, 0, 13),  # load the flags of the TCP header
        (0x54, 0, 0, 0x12),  # SYN and ACK
        (0x15, 0, 1, 0x02),  # SYN alone?
        (0x06, 0, 0, 0),  # drop the packet
        (0x06, 0, 0, 0xFFFFFFFF),  # take all of it
    )
    code = array("B", b"".join(struct.pack("HBBI", *line) for line in program))
    with suppress(OSError):  # gVisor has no filters
        listening.setsockopt(
            socket.SOL_SOCKET, SO_ATTACH_FILTER, struct.pack("HP", len(program), code.buffer_info()[0])
        )


def _remove(app: Starlette, middleware: type) -> None:
    app.user_middleware = [each for each in app.user_middleware if each.cls is not middleware]
