"""The reverse proxy of the docker target, in a child process in front of small servers of this one."""

import asyncio
import http.client
import json
import os
import subprocess
import sys
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import requests
from aiohttp.test_utils import TestClient, TestServer

from bentos.errors import error_content
from deploy.containers.proxy import make_app
from tests.helpers import free_port, wait_until

ROOT = Path(__file__).parent.parent.parent
START = "import sys; from pathlib import Path; from aiohttp import web; from deploy.containers.proxy import make_app; "
RUN = "web.run_app(make_app(Path(sys.argv[1])), port=int(sys.argv[2]), print=None, handler_cancellation=True)"
TIMEOUT = 60  # seconds; only a failure takes that long


class Service(BaseHTTPRequestHandler):
    """Echoes its name and the request; /slow waits, /stream sends numbers, /broken closes the connection half way."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        length = int(self.headers.get("Content-Length", 0))
        body = self.rfile.read(length).decode()
        if self.path == "/stream":
            return self.stream()
        if self.path == "/slow":
            self.server.started.set()
            self.server.proceed.wait(60)
        if self.path == "/broken":
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(b"half")
            self.close_connection = True
            return None
        seen = {"name": self.server.name, "path": self.path, "body": body, "headers": dict(self.headers.items())}
        content = json.dumps(seen).encode()
        self.send_response(418 if self.path == "/teapot" else 200)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("X-Service", "kept")
        self.end_headers()
        self.wfile.write(content)

    do_POST = do_PUT = do_GET

    def stream(self):
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        try:
            self.wfile.write(b"6\r\nfirst\n\r\n")
            while not self.server.proceed.wait(0.02):
                self.wfile.write(b"5\r\nnext\n\r\n")
        except OSError:
            self.server.disconnected.set()
        self.close_connection = True

    def log_message(self, *_):
        pass


@contextmanager
def service(name: str):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Service)
    server.name, server.address = name, f"http://127.0.0.1:{server.server_port}"
    server.started, server.proceed, server.disconnected = threading.Event(), threading.Event(), threading.Event()
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield server
    finally:
        server.proceed.set()
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    return tmp_path_factory.mktemp("proxy") / "address"


@pytest.fixture(scope="module")
def proxy(address):
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-c", START + RUN, str(address), str(port)]
    process = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(ROOT)})
    try:
        wait_until(lambda: responds(url), 60, "the start of the proxy")
        yield url
        process.terminate()
        assert process.wait(60) == 0
    finally:
        process.kill()


def responds(url: str) -> bool:
    try:
        requests.get(url, timeout=TIMEOUT)
    except requests.ConnectionError:
        return False
    return True


@pytest.fixture
def blue(address):
    with service("blue") as server:
        address.write_text(server.address + "\n")
        yield server


def test_without_a_service_the_response_is_a_503_in_the_shape_of_every_error(proxy):
    response = requests.get(f"{proxy}/predict", timeout=TIMEOUT)
    assert response.status_code == 503
    assert response.json() == error_content("unavailable", response.json()["error"]["message"])
    assert response.headers["Retry-After"]


@pytest.mark.parametrize("path", ["/predict?format=lambda&a=b%20c", "/a%2Fb", "/teapot"])
def test_request_and_response_are_forwarded_unchanged(proxy, blue, path):
    headers = {"X-Mine": "1", "Content-Encoding": "gzip"}  # which it is not: the proxy does not decompress
    response = requests.post(proxy + path, data="é".encode(), headers=headers, timeout=TIMEOUT)
    seen = response.json()
    assert (seen["path"], seen["body"], seen["headers"]["X-Mine"]) == (path, "é", "1")
    assert seen["headers"]["Host"] == proxy.removeprefix("http://")
    assert response.headers["X-Service"] == "kept"
    assert response.status_code == (418 if path == "/teapot" else 200)


def test_a_request_target_that_is_a_url_is_a_400(proxy, blue):
    client = http.client.HTTPConnection(proxy.removeprefix("http://"), timeout=TIMEOUT)
    client.request("GET", "http://user@elsewhere.example/predict")
    assert client.getresponse().status == 400


def test_the_next_request_goes_to_the_new_service_on_the_same_connection(proxy, blue, address):
    with service("green") as green, requests.Session() as client:
        names = [client.get(proxy, timeout=TIMEOUT).json()["name"]]
        address.write_text(green.address + "\n")
        names.append(client.get(proxy, timeout=TIMEOUT).json()["name"])
    assert names == ["blue", "green"]


def test_a_running_request_is_completed_by_the_service_that_it_started_with(proxy, blue, address):
    with service("green") as green:
        responses = []
        request = threading.Thread(target=lambda: responses.append(requests.get(f"{proxy}/slow", timeout=TIMEOUT)))
        request.start()
        assert blue.started.wait(TIMEOUT)
        address.write_text(green.address + "\n")
        assert requests.get(proxy, timeout=TIMEOUT).json()["name"] == "green"
        blue.proceed.set()
        request.join()
    assert responses[0].json()["name"] == "blue"


@pytest.mark.parametrize("content", ["", "http://127.0.0.1:1", None])
def test_while_the_address_is_being_written_the_last_one_is_used(proxy, blue, address, content):
    assert requests.get(proxy, timeout=TIMEOUT).json()["name"] == "blue"
    address.unlink() if content is None else address.write_text(content)
    assert requests.get(proxy, timeout=TIMEOUT).json()["name"] == "blue"


def test_a_new_address_is_written_to_the_disk_once(blue, address, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.fstat(descriptor).st_ino))

    async def requests() -> None:
        async with TestClient(TestServer(make_app(address))) as client:
            for _ in range(2):
                assert (await client.get("/")).status == 200

    asyncio.run(requests())
    assert synced == [address.stat().st_ino, address.parent.stat().st_ino]


def test_a_stream_is_relayed_as_it_arrives_and_a_client_disconnect_reaches_the_service(proxy, blue):
    with requests.get(f"{proxy}/stream", stream=True, timeout=TIMEOUT) as response:
        assert next(response.iter_content(6)) == b"first\n"  # the stream itself does not end
    assert blue.disconnected.wait(TIMEOUT)


def test_the_client_can_tell_that_a_response_is_incomplete(proxy, blue):
    with pytest.raises((requests.RequestException, http.client.HTTPException)):
        _ = requests.get(f"{proxy}/broken", timeout=TIMEOUT).content


def test_a_service_that_does_not_run_is_a_503(proxy, address):
    address.write_text("http://127.0.0.1:1\n")
    response = requests.get(proxy, timeout=TIMEOUT)
    assert response.status_code == 503
    assert response.json()["error"]["type"] == "unavailable"
