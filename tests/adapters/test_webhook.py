"""A JSON message to a real HTTP server."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from steps.adapters import webhook
from steps.adapters.webhook import WebhookError, post
from tests.helpers import free_port


@contextmanager
def receiver(status: int = 204, location: str = "") -> Iterator[tuple[str, list]]:
    """The address of a server, and the bodies that it received."""
    received: list = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            received.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            assert self.headers["Authorization"] is None  # otherwise `received` is complete, but there is no response
            self.send_response(status)
            if location:
                self.send_header("Location", location)
            self.end_headers()

        def log_message(self, *values) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", received
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_the_message_arrives_as_json_without_the_passwords_of_netrc(tmp_path, monkeypatch):
    (tmp_path / "netrc").write_text("default login alice password secret\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    with receiver() as (url, received):
        post(f"{url}/hook?key=1", {"text": "É"})
    assert received == [{"text": "É"}]


def test_a_busy_server_is_tried_again():
    with receiver(503) as (url, received), pytest.raises(WebhookError, match="answered 503"):
        post(url, {"text": "a"})
    assert len(received) == 1 + webhook.RETRIES


def test_redirects_are_not_followed():
    with receiver() as (other, received), receiver(307, other) as (url, _):
        with pytest.raises(WebhookError, match="answered 307"):
            post(url, {"text": "a"})
        assert received == []


@pytest.mark.parametrize("url", ["file:///etc/passwd", "ftp://host/x", "https://", "http://[", "hooks.example/secret"])
def test_other_urls_are_refused(url):
    with pytest.raises(WebhookError):
        post(url, {})


def test_the_message_of_an_error_has_no_secret():
    with pytest.raises(WebhookError) as error:
        post(f"http://user:secret@127.0.0.1:{free_port()}/secret", {})
    assert "cannot be reached" in str(error.value)
    assert "secret" not in str(error.value)


def test_no_log_of_a_host_that_cannot_be_reached_has_the_path(caplog):
    with pytest.raises(WebhookError, match=r"^http://127.0.0.1 cannot be reached"):
        post(f"http://127.0.0.1:{free_port()}/secret", {"text": "a"})
    assert "secret" not in caplog.text
