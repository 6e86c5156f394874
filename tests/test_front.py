"""The front of a deployment, in a process of its own before small servers of this one."""

import http.client
import json
import os
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import requests

ROOT = Path(__file__).parent.parent
START = "import sys; from pathlib import Path; from aiohttp import web; from bentos.front import make_app; "
RUN = "web.run_app(make_app(Path(sys.argv[1])), port=int(sys.argv[2]), print=None, handler_cancellation=True)"


class Service(BaseHTTPRequestHandler):
    """Says who it is and what it was asked; /slow takes its time, /stream sends numbers, /broken hangs up half way."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        length = int(self.headers.get("Content-Length", 0))
        body = self.rfile.read(length).decode()
        if self.path == "/stream":
            return self.stream()
        if self.path == "/slow":
            self.server.begun.set()
            self.server.go_on.wait(10)
        if self.path == "/broken":
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(b"half")
            self.close_connection = True
            return None
        answer = {"name": self.server.name, "path": self.path, "body": body, "headers": dict(self.headers.items())}
        content = json.dumps(answer).encode()
        self.send_response(418 if self.path == "/teapot" else 200)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("X-Answer", "kept")
        self.end_headers()
        self.wfile.write(content)

    do_POST = do_PUT = do_GET

    def stream(self):
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        try:
            for number in range(1000):
                self.wfile.write(b"6\r\n%05d\n\r\n" % number)
                time.sleep(0.02)
        except OSError:
            self.server.hung_up.set()
        self.close_connection = True

    def log_message(self, *_):
        pass


@contextmanager
def service(name: str):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Service)
    server.name, server.address = name, f"http://127.0.0.1:{server.server_port}"
    server.begun, server.go_on, server.hung_up = threading.Event(), threading.Event(), threading.Event()
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield server
    finally:
        server.go_on.set()
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    return tmp_path_factory.mktemp("front") / "address"


@pytest.fixture(scope="module")
def front(address):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    command = [sys.executable, "-c", START + RUN, str(address), str(port)]
    process = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(ROOT)})
    try:
        for _ in range(200):
            with socket.socket() as connection:
                if connection.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.05)
        yield f"http://127.0.0.1:{port}"
        process.terminate()
        assert process.wait(10) == 0
    finally:
        process.kill()


@pytest.fixture
def blue(address):
    with service("blue") as server:
        address.write_text(server.address + "\n")
        yield server


def test_without_a_service_it_says_so_in_the_shape_of_every_error(front):
    response = requests.get(f"{front}/predict", timeout=5)
    assert response.status_code == 503
    assert response.json()["error"].keys() == {"type", "message", "param"}
    assert response.headers["Retry-After"]


@pytest.mark.parametrize("path", ["/predict?format=lambda&a=b%20c", "/a%2Fb", "/teapot"])
def test_a_request_and_its_answer_are_passed_on_as_they_are(front, blue, path):
    response = requests.post(front + path, data="é".encode(), headers={"X-Mine": "1"}, timeout=5)
    seen = response.json()
    assert (seen["path"], seen["body"], seen["headers"]["X-Mine"]) == (path, "é", "1")
    assert seen["headers"]["Host"] == front.removeprefix("http://")
    assert response.headers["X-Answer"] == "kept"
    assert response.status_code == (418 if path == "/teapot" else 200)


def test_the_next_request_goes_to_the_new_service_on_the_same_connection(front, blue, address):
    with service("green") as green, requests.Session() as client:
        names = [client.get(front, timeout=5).json()["name"]]
        address.write_text(green.address + "\n")
        names.append(client.get(front, timeout=5).json()["name"])
    assert names == ["blue", "green"]


def test_a_request_that_has_begun_is_answered_by_the_service_it_began_with(front, blue, address):
    with service("green") as green:
        answers = []
        asking = threading.Thread(target=lambda: answers.append(requests.get(f"{front}/slow", timeout=20).json()))
        asking.start()
        assert blue.begun.wait(5)
        address.write_text(green.address + "\n")
        assert requests.get(front, timeout=5).json()["name"] == "green"
        blue.go_on.set()
        asking.join()
    assert answers[0]["name"] == "blue"


@pytest.mark.parametrize("content", ["", "http://127.0.0.1:1", None])
def test_while_the_address_is_being_written_the_last_one_holds(front, blue, address, content):
    assert requests.get(front, timeout=5).json()["name"] == "blue"
    address.unlink() if content is None else address.write_text(content)
    assert requests.get(front, timeout=5).json()["name"] == "blue"


def test_a_stream_arrives_as_it_is_sent_and_ends_at_the_service_when_the_client_hangs_up(front, blue):
    begun = time.monotonic()
    with requests.get(f"{front}/stream", stream=True, timeout=5) as response:
        assert next(response.iter_content(6)) == b"00000\n"
        assert time.monotonic() - begun < 5  # the whole of it takes 20 s
    assert blue.hung_up.wait(5)


def test_an_answer_that_breaks_off_is_seen_to_break_off(front, blue):
    with pytest.raises((requests.RequestException, http.client.HTTPException)):
        _ = requests.get(f"{front}/broken", timeout=5).content


def test_a_service_that_is_gone_is_a_503(front, address):
    address.write_text("http://127.0.0.1:1\n")
    response = requests.get(front, timeout=10)
    assert response.status_code == 503
    assert response.json()["error"]["type"] == "unavailable"
