"""Downloads from a real HTTP server on this machine."""

import gzip
import hashlib
import logging
import threading
from contextlib import suppress
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import requests

from steps.adapters import download
from steps.adapters.download import DownloadError

fetch = partial(download.fetch, max_bytes=2**20)
BODY = bytes(range(256)) * 1000
SHA256 = hashlib.sha256(BODY).hexdigest()
REDIRECTS = {"/to-a-file": "file:///etc/passwd", "/to-ftp": "ftp://127.0.0.1/data.json", "/around": "/around"}


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    monkeypatch.setattr(download, "MAX_WAIT", 0.1)


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.requests: list[str] = []
        self.ended = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        self.server.requests.append(path)
        if path == "/missing":
            self.send_error(404)
        elif path == "/moved":
            self.send_response(302)
            self.send_header("Location", "/good")
            self.end_headers()
        elif path in REDIRECTS:
            self.send_response(302)
            self.send_header("Location", REDIRECTS[path])
            self.end_headers()
        elif path in ("/busy", "/busy-for-a-day") and self.server.requests.count(path) < 3:
            self.send_response(503)
            if path == "/busy-for-a-day":
                self.send_header("Retry-After", "86400")
            self.end_headers()
        elif path in ("/gzip", "/gzip-bomb"):
            body = gzip.compress(BODY if path == "/gzip" else bytes(2**26))
            self.send_response(200)
            self.send_header("Content-Encoding", "gzip")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)
        elif path == "/endless":
            self.send_response(200)
            self.end_headers()
            while not self.server.ended.is_set():
                self.wfile.write(BODY)
        else:
            self.send_response(200)
            self.send_header("Content-Length", {"/not-a-length": "abc", "/huge": "99999999"}.get(path, str(len(BODY))))
            self.end_headers()
            if path == "/cut" or (path == "/cut-once" and self.server.requests.count(path) == 1):
                self.wfile.write(BODY[:1000])
            elif path == "/drip":
                while not self.server.ended.wait(0.05):
                    self.wfile.write(b"x")
                    self.wfile.flush()
            elif path == "/stalled":
                self.wfile.write(BODY[:1000])
                self.wfile.flush()
                self.server.ended.wait(20)
            else:
                self.wfile.write(BODY)

    def handle(self) -> None:
        with suppress(ConnectionError):  # the client has seen enough
            super().handle()

    def log_message(self, *arguments) -> None:
        pass


@pytest.fixture
def server():
    server = Server()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.ended.set()
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize("path", ["/good", "/moved"])
def test_a_file_is_downloaded_and_readable_by_others(server, tmp_path, path):
    file = tmp_path / "new" / "data.json"
    assert fetch(server.url + path, file, SHA256) == file
    assert file.read_bytes() == BODY
    assert file.stat().st_mode & 0o044


def test_an_existing_file_with_the_digest_is_not_downloaded_again(server, tmp_path):
    file = tmp_path / "data.json"
    file.write_bytes(BODY)
    fetch(server.url + "/good", file, SHA256)
    assert server.requests == []


def test_an_existing_file_with_another_digest_is_replaced(server, tmp_path):
    file = tmp_path / "data.json"
    file.write_bytes(b"older")
    assert fetch(server.url + "/good", file, SHA256).read_bytes() == BODY


@pytest.mark.parametrize(("path", "attempts"), [("/busy", 3), ("/cut-once", 2)])
def test_a_busy_server_and_an_incomplete_body_are_retried(server, tmp_path, path, attempts):
    assert fetch(server.url + path, tmp_path / "data.json", SHA256).read_bytes() == BODY
    assert server.requests.count(path) == attempts


def test_a_long_retry_after_is_capped_and_logged(server, tmp_path, caplog):
    caplog.set_level(logging.WARNING, download.__name__)
    assert fetch(server.url + "/busy-for-a-day", tmp_path / "data.json", SHA256).read_bytes() == BODY
    assert "next attempt in 0.1 s (the server requested longer: Retry-After: 86400)" in caplog.text


def test_a_compressed_body_and_a_digest_in_capitals_are_accepted(server, tmp_path):
    assert fetch(server.url + "/gzip", tmp_path / "data.json", SHA256.upper()).read_bytes() == BODY


@pytest.mark.parametrize(
    ("path", "named"),
    [
        ("/gzip-bomb", "more bytes than data.max_bytes"),
        ("/endless", "more bytes than data.max_bytes"),
        ("/huge", "99,999,999 bytes, more than data.max_bytes"),
        ("/not-a-length", "Content-Length: 'abc'"),
        ("/drip", "took too long"),
        ("/to-a-file", "redirects from http to file"),
        ("/to-ftp", "redirects from http to ftp"),
        ("/around", "TooManyRedirects"),
    ],
)
def test_a_response_beyond_the_limits_is_refused_and_leaves_nothing(server, tmp_path, path, named, monkeypatch):
    monkeypatch.setattr(download, "MAX_SECONDS", 1 if path == "/drip" else 60)
    with pytest.raises(DownloadError, match=named):
        fetch(server.url + path, tmp_path / "data.json", SHA256)
    assert list(tmp_path.iterdir()) == []


def test_a_redirect_from_https_to_http_is_refused(server):
    response = requests.Response()
    response.status_code, response.url, response.headers["Location"] = 302, "https://example.org/a", server.url
    with pytest.raises(Exception, match="redirects from https to http"):
        download._Session().get_redirect_target(response)


@pytest.mark.parametrize(
    ("path", "retries", "timeout", "named"),
    [
        ("/missing", 4, 30, ["404"]),
        ("/busy", 1, 30, ["503"]),
        ("/cut", 0, 30, ["could not be downloaded"]),
        ("/stalled", 0, 0.3, ["could not be downloaded"]),
    ],
)
def test_a_failure_names_the_url_and_the_cause_and_keeps_the_existing_file(
    server, tmp_path, path, retries, timeout, named, monkeypatch
):
    monkeypatch.setattr(download, "RETRIES", retries)
    monkeypatch.setattr(download, "TIMEOUT", timeout)
    file = tmp_path / "data.json"
    file.write_bytes(b"older")
    with pytest.raises(DownloadError) as error:
        fetch(server.url + path, file, SHA256)
    for word in [server.url + path, *named]:
        assert word in str(error.value)
    assert file.read_bytes() == b"older"
    assert [path.name for path in tmp_path.iterdir()] == ["data.json"]


def test_an_unexpected_digest_is_reported_with_the_expected_one(server, tmp_path):
    with pytest.raises(DownloadError, match=f"{SHA256}.*{'0' * 64}"):
        fetch(server.url + "/good", tmp_path / "data.json", "0" * 64)
    assert list(tmp_path.iterdir()) == []


def test_an_unreachable_server_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(download, "RETRIES", 0)
    with pytest.raises(DownloadError, match="check that the network"):
        fetch("http://127.0.0.1:9/data.json", tmp_path / "data.json", SHA256)


@pytest.mark.parametrize("url", ["ftp://example.org/a", "file:///etc/passwd", "data.json"])
def test_only_http_urls_are_accepted(url, tmp_path):
    with pytest.raises(DownloadError, match="not an http"):
        fetch(url, tmp_path / "data.json", SHA256)


@pytest.mark.parametrize("path", ["/missing", "/cut", "/good"])
def test_error_messages_contain_no_password_or_token(server, tmp_path, path, monkeypatch):
    monkeypatch.setattr(download, "RETRIES", 0)
    url = server.url.replace("http://", "http://user:secret1@") + path + "?token=secret2"
    with pytest.raises(DownloadError) as error:
        fetch(url, tmp_path / "data.json", "0" * 64)
    assert "secret" not in str(error.value)
    assert error.value.__suppress_context__ or error.value.__context__ is None
