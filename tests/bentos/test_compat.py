"""Each workaround for BentoML is still needed: a test that fails can be deleted together with its workaround."""

import asyncio
import inspect
import json
import re
import socket
from collections.abc import AsyncIterator

import bentoml
import pytest
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse, StreamingResponse
from starlette.testclient import TestClient
from starlette.types import ASGIApp
from uvicorn import Config
from uvicorn.server import ServerState

from bentos import compat
from bentos.middleware.metrics_path import path_label
from tests.helpers import free_port


@pytest.fixture
def app() -> Starlette:
    """BentoML's own ASGI app of a service without any of the workarounds."""

    @bentoml.service(name="plain")
    class Plain: ...

    return Plain.to_asgi()


def classes(app: Starlette) -> list[type]:
    return [each.cls for each in app.user_middleware]


def test_bentoml_has_no_public_way_to_wrap_the_whole_app():
    public = {name for name in dir(bentoml.Service) if "middleware" in name or "wrap" in name}
    assert public <= {"add_asgi_middleware", "middlewares"}


def test_added_middleware_still_runs_inside_bentomls_metrics():
    class Own:
        def __init__(self, app):
            self.app = app

    @bentoml.service(name="added")
    class Added: ...

    Added.add_asgi_middleware(Own)
    found = classes(Added.to_asgi())
    assert found.index(compat.RunnerTrafficMetricsMiddleware) < found.index(Own)


def test_bentoml_still_says_openapi_3_0():
    assert inspect.signature(compat.generate_spec).parameters["openapi_version"].default.startswith("3.0")


def test_bentoml_still_serves_the_openapi_document_at_its_own_path_only(app):
    client = TestClient(app)
    assert [client.get(path).status_code for path in ("/docs.json", "/openapi.json")] == [200, 404]


def test_the_timer_of_bentomls_timeout_still_outlives_the_response(app):
    assert compat.TimeoutMiddleware in classes(app)

    async def timers_after_a_request() -> int:
        async def ignore(*_: object) -> dict:
            return {"type": "http.request"}

        timeout = compat.TimeoutMiddleware(PlainTextResponse("ok"), 60)
        await timeout({"type": "http"}, ignore, ignore)
        return len(asyncio.get_running_loop()._scheduled)

    assert asyncio.run(timers_after_a_request()) == 1
    compat.remove_timeout(app)
    assert compat.TimeoutMiddleware not in classes(app)


def test_bentoml_still_traces_without_an_exporter(app):
    assert compat.OpenTelemetryMiddleware in classes(app)
    compat.remove_tracing(app)
    assert compat.OpenTelemetryMiddleware not in classes(app)


def test_bentoml_still_labels_metrics_with_the_raw_path():
    source = inspect.getsource(compat.RunnerTrafficMetricsMiddleware.__call__)
    assert 'endpoint = scope["path"]' in source


def test_bounded_metrics_see_the_template_and_the_app_the_path(monkeypatch):
    labeled = []

    async def record(self, scope, receive, send):
        labeled.append(scope["path"])
        await self.app(scope, receive, send)

    async def echo(scope, receive, send):
        await PlainTextResponse(scope["path"])(scope, receive, send)

    monkeypatch.setattr(compat.RunnerTrafficMetricsMiddleware, "__call__", record)
    app = Starlette(middleware=[Middleware(compat.RunnerTrafficMetricsMiddleware)])
    app.mount("/", echo)
    compat.limit_metric_labels(app, path_label(["/predict", "/v1/models/{model}"]))
    paths = ["/predict", "/v1/models/base", "/v1/models/a/b", "/nothing/7"]
    assert [TestClient(app).get(path).text for path in paths] == paths
    assert labeled == ["/predict", "/v1/models/{model}", "/unknown", "/unknown"]


async def read_and_answer(scope, receive, send):
    while (await receive()).get("more_body"):
        pass
    await PlainTextResponse("ok")(scope, receive, send)


def answer(protocol: type[compat.HttpToolsProtocol], data: bytes) -> bytes:
    """What a server of `read_and_answer` sends first: its status, or nothing if it closes the connection."""

    async def run() -> bytes:
        config, loop = Config(read_and_answer, log_config=None), asyncio.get_running_loop()
        server = await loop.create_server(lambda: protocol(config, ServerState(), {}, loop), "127.0.0.1")
        reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
        try:
            writer.write(data)
            return (await asyncio.wait_for(reader.read(12), 5)).removeprefix(b"HTTP/1.1 ")
        finally:
            writer.close()
            server.close()

    return asyncio.run(run())


def test_uvicorn_still_stores_headers_of_any_size():
    data = b"GET / HTTP/1.1\r\nX: " + b"a" * 9_000_000 + b"\r\n\r\n"
    assert answer(compat.HttpToolsProtocol, data) == b"200"


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", b"200"),
        (b"POST / HTTP/1.1\r\nContent-Length: 9999\r\n\r\n" + b"a" * 9999, b"200"),
        (b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n" + b"9\r\n123456789\r\n" * 99 + b"0\r\n\r\n", b"200"),
        (b"GET / HTTP/1.1\r\nX: " + b"a" * 3000, b"431"),
        (b"GET /" + b"a" * 3000, b"431"),
        (b"GET / HTTP/1.1\r\nX: " + b"a" * 3000 + b"\r\n\r\n", b"431"),  # complete in one read
        (b"GET /" + b"a" * 3000 + b" HTTP/1.1\r\n\r\n", b"431"),
        (b"POST / HTTP/1.1\r\nContent-Length: 2\r\nX: " + b"a" * 3000 + b"\r\n\r\n{}", b"431"),
        (b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\nX: " + b"a" * 3000, b"431"),  # a trailer
        (b"GET / HTTP/1.1\r\nX: ", b"408"),
        (b"GET / HTTP/1.1\r\nno header\r\n\r\n", b"400"),
        (b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nno size\r\n", b"400"),
        (b"", b""),
    ],
)
def test_headers_are_limited_in_size_and_time(monkeypatch, data, expected):
    monkeypatch.setattr(compat, "MAX_HEADER_BYTES", 2000)
    monkeypatch.setattr(compat, "HEADER_TIMEOUT", 0.2)
    assert answer(compat.BoundedHttpProtocol, data) == expected


def whole_answer(
    app: ASGIApp, data: bytes, protocol: type[compat.HttpToolsProtocol] = compat.BoundedHttpProtocol
) -> tuple[bytes, bytes]:
    """Head and body of the response, until the server closes the connection."""

    async def run() -> tuple[bytes, bytes]:
        _, server, reader, writer = await request_from(app, data, protocol)
        head, _, body = (await asyncio.wait_for(reader.read(), 30)).partition(b"\r\n\r\n")
        writer.close()
        server.close()
        return head.lower(), body

    return asyncio.run(run())


def test_a_request_that_is_not_http_gets_an_error_as_every_other():
    head, body = whole_answer(read_and_answer, b"GET / HTTP/1.1\r\nno header\r\n\r\n")
    assert json.loads(body)["error"]["type"] == "invalid_request"
    for header in (b"content-type: application/json", b"cache-control: no-store", b"x-request-id: "):
        assert header in head


def test_an_invalid_request_does_not_interrupt_the_response_to_the_one_before():
    """Pipelined: its error would be taken for that response."""
    head, body = whole_answer(read_and_answer, b"GET / HTTP/1.1\r\n\r\n" + b"no request\r\n\r\n")
    assert head.startswith(b"http/1.1 200")
    assert body == b"ok"


async def repeat(scope, receive, send):
    """Answer with the method, the path and the body of the request."""
    request = Request(scope, receive)
    body = await request.body()
    await PlainTextResponse(f"{request.method} {request.url.path} {body.decode()};")(scope, receive, send)


OFFER = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAEAAEAA\r\n"


class ByteByByte(compat.BoundedHttpProtocol):
    def data_received(self, data: bytes) -> None:
        for i in range(len(data)):
            super().data_received(data[i : i + 1])


def test_uvicorn_still_loses_the_body_of_a_request_that_offers_http_2():
    data = b"POST /1 HTTP/1.0\r\nContent-Length: 2\r\n%b\r\n{}" % OFFER
    assert whole_answer(repeat, data, compat.HttpToolsProtocol)[1] == b"POST /1 ;"


@pytest.mark.parametrize("protocol", [compat.BoundedHttpProtocol, ByteByByte])
def test_a_request_that_offers_http_2_is_answered_as_without_the_offer(protocol):
    """Java's HttpClient and `curl --http2` offer it in every request to an http URL."""
    with_length = b"POST /1 HTTP/1.1\r\nContent-Length: 2\r\n%b\r\n{}" % OFFER
    in_chunks = b"POST /2 HTTP/1.1\r\n%bTransfer-Encoding: chunked\r\n\r\n1\r\n{\r\n1\r\n}\r\n0\r\n\r\n" % OFFER
    last = b"GET /3 HTTP/1.1\r\nConnection: close\r\n%b\r\n" % OFFER
    _, rest = whole_answer(repeat, with_length + in_chunks + last, protocol)
    assert re.findall("[A-Z]+ /[123] .*?;", rest.decode()) == ["POST /1 {};", "POST /2 {};", "GET /3 ;"]


async def stream(scope, receive, send):
    async def parts() -> AsyncIterator[bytes]:
        yield b"one "
        yield b"two"

    await StreamingResponse(parts())(scope, receive, send)


@pytest.mark.parametrize("version", [b"1.0", b"1.1"])
def test_a_stream_is_sent_in_chunks_only_to_clients_that_know_them(version):
    data = b"GET / HTTP/%b\r\nConnection: close\r\n\r\n" % version
    head, body = whole_answer(stream, data)
    assert (b"transfer-encoding: chunked" in head) == (version == b"1.1")
    assert body == (b"one two" if version == b"1.0" else b"4\r\none \r\n3\r\ntwo\r\n0\r\n\r\n")


def test_a_response_with_a_length_keeps_it_for_http_1_0():
    head, body = whole_answer(read_and_answer, b"GET / HTTP/1.0\r\n\r\n")
    assert b"content-length: 2" in head
    assert body == b"ok"


async def answer_at_length(scope, receive, send):
    await PlainTextResponse("a" * 30_000_000)(scope, receive, send)


async def request_from(
    app: ASGIApp,
    data: bytes = b"GET / HTTP/1.1\r\n\r\n",
    protocol: type[compat.HttpToolsProtocol] = compat.BoundedHttpProtocol,
) -> tuple[list[compat.HttpToolsProtocol], asyncio.Server, asyncio.StreamReader, asyncio.StreamWriter]:
    """Send a request to a server of the app: its connections, the server, and the client's streams."""
    loop, made = asyncio.get_running_loop(), list[compat.HttpToolsProtocol]()

    def make() -> compat.HttpToolsProtocol:
        made.append(protocol(Config(app, log_config=None), ServerState(), {}, loop))
        return made[-1]

    server = await loop.create_server(make, "127.0.0.1")
    reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
    writer.write(data)
    return made, server, reader, writer


@pytest.mark.parametrize("reads", [True, False])
def test_a_client_that_does_not_read_is_disconnected(monkeypatch, reads):
    monkeypatch.setattr(compat, "DEADLINE", 60.0 if reads else 0.2)

    async def run() -> bool:
        """Whether the server closed the connection before the whole response was read."""
        made, server, reader, writer = await request_from(answer_at_length)
        size = 0
        async with asyncio.timeout(30):
            while not made or not made[0].transport.is_closing():
                size += len(await reader.read(2**20)) if reads else 0
                if size > 30_000_000:
                    break
                await asyncio.sleep(0.001)
        writer.close()
        server.close()
        return size < 30_000_000

    assert asyncio.run(run()) is not reads


def test_idle_connections_are_kept_for_longer_than_proxies_keep_them():
    assert Config(read_and_answer).timeout_keep_alive < 60  # else this workaround is not needed

    async def kept() -> float:
        made, server, reader, writer = await request_from(read_and_answer)
        await reader.readuntil(b"ok")
        timer = made[0].timeout_keep_alive_task
        writer.close()
        server.close()
        return timer.when() - asyncio.get_running_loop().time()

    assert asyncio.run(kept()) > 60


def request(port: int) -> str:
    """One request on a connection of its own: the version of the response, "refused", or the error."""
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
            connection.sendall(b"GET / HTTP/1.1\r\n\r\n")
            return connection.recv(100).decode() or "closed"
    except ConnectionRefusedError:
        return "refused"
    except OSError as error:
        return str(error)


def requests_until_refused(port: int) -> set[str]:
    return set(iter(lambda: request(port), "refused"))


class Server:  # uvicorn's
    def __init__(self, *servers: asyncio.Server) -> None:
        self.servers = servers

    def handle_exit(self) -> None: ...


async def respond(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.readuntil(b"\r\n\r\n")
    writer.write(b"answer")
    writer.close()


async def answers_while_the_port_closes() -> set[str]:
    listening = socket.create_server(("127.0.0.1", 0), backlog=2048)
    with listening.dup():  # the parent's
        server = await asyncio.start_server(respond, sock=listening)
        port = listening.getsockname()[1]
        clients = [asyncio.create_task(asyncio.to_thread(requests_until_refused, port)) for _ in range(16)]
        await asyncio.sleep(0.1)
        await compat.stop_listening(Server(server).handle_exit)
        return set().union(*await asyncio.gather(*clients))


def test_no_connection_is_reset_or_forgotten_while_the_port_closes():
    """Without the packet filter, one round in three or four failed."""
    for _ in range(8):
        assert asyncio.run(answers_while_the_port_closes()) == {"answer"}


async def answer_of_the_next_worker() -> str:
    listening = socket.create_server(("127.0.0.1", free_port()))  # a socket with port 0 would lose its port
    with listening.dup() as of_parent:
        first = await asyncio.start_server(respond, sock=listening)
        await compat.stop_listening(Server(first).handle_exit)
        port = of_parent.getsockname()[1]
        assert request(port) == "refused"
        async with await asyncio.start_server(respond, sock=of_parent.dup()):
            return await asyncio.wait_for(asyncio.to_thread(request, port), 10)


def test_the_next_worker_can_listen_on_the_same_socket():
    """BentoML starts one if only the worker gets SIGTERM."""
    assert asyncio.run(answer_of_the_next_worker()) == "answer"
