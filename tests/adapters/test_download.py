"""Downloads from a real HTTP server on this machine."""

import hashlib
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from steps.adapters.download import DownloadError, fetch

BODY = bytes(range(256)) * 1000
SHA256 = hashlib.sha256(BODY).hexdigest()


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
        elif path == "/busy" and self.server.requests.count("/busy") < 3:
            self.send_error(503)
        else:
            self.send_response(200)
            self.send_header("Content-Length", str(len(BODY)))
            self.end_headers()
            if path == "/cut":
                self.wfile.write(BODY[:1000])
            elif path == "/stalled":
                self.wfile.write(BODY[:1000])
                self.wfile.flush()
                self.server.ended.wait(20)
            else:
                self.wfile.write(BODY)

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


def test_a_busy_server_is_retried(server, tmp_path):
    assert fetch(server.url + "/busy", tmp_path / "data.json", SHA256).read_bytes() == BODY
    assert server.requests.count("/busy") == 3


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
    server, tmp_path, path, retries, timeout, named
):
    file = tmp_path / "data.json"
    file.write_bytes(b"older")
    with pytest.raises(DownloadError) as error:
        fetch(server.url + path, file, SHA256, timeout=timeout, retries=retries)
    for word in [server.url + path, *named]:
        assert word in str(error.value)
    assert file.read_bytes() == b"older"
    assert [path.name for path in tmp_path.iterdir()] == ["data.json"]


def test_an_unexpected_digest_is_reported_with_the_expected_one(server, tmp_path):
    with pytest.raises(DownloadError, match=f"{SHA256}.*{'0' * 64}"):
        fetch(server.url + "/good", tmp_path / "data.json", "0" * 64)
    assert list(tmp_path.iterdir()) == []


def test_an_unreachable_server_is_an_error(tmp_path):
    with pytest.raises(DownloadError, match="check that the network"):
        fetch("http://127.0.0.1:9/data.json", tmp_path / "data.json", SHA256, retries=0)


@pytest.mark.parametrize("url", ["ftp://example.org/a", "file:///etc/passwd", "data.json"])
def test_only_http_urls_are_accepted(url, tmp_path):
    with pytest.raises(DownloadError, match="not an http"):
        fetch(url, tmp_path / "data.json", SHA256)


@pytest.mark.parametrize("path", ["/missing", "/cut", "/good"])
def test_error_messages_contain_no_password_or_token(server, tmp_path, path):
    url = server.url.replace("http://", "http://user:secret1@") + path + "?token=secret2"
    with pytest.raises(DownloadError) as error:
        fetch(url, tmp_path / "data.json", "0" * 64, retries=0)
    assert "secret" not in str(error.value)
    assert error.value.__suppress_context__ or error.value.__context__ is None
