"""Tests that need their own service: SIGTERM, and a required token."""

import json
import os
import signal
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from http.client import HTTPConnection
from urllib.parse import urlsplit

import openai
import psutil
import pytest
import requests

from tests.bentos.client import served, server_pid
from tests.helpers import wait_until


def get(address: tuple[str, int]) -> bytes:
    """One request on a connection of its own: the response, or b"refused"."""
    try:
        connection = socket.create_connection(address, timeout=30)
    except ConnectionRefusedError:
        return b"refused"
    with connection:
        connection.sendall(b"GET /v1/models HTTP/1.1\r\nHost: a\r\n\r\n")
        response = b""
        while part := connection.recv(65536):
            response += part
            if b"\r\n\r\n" in response and b"connection: close" not in response.lower():
                break  # kept open
        return response


def test_after_sigterm_clients_are_served_or_refused_but_never_reset(bento_tag):
    with served(bento_tag) as url:
        parts = urlsplit(url)
        address, server = (parts.hostname, parts.port), server_pid(url)

        def requests_until_refused(_: int) -> list[bytes]:
            responses = []
            while not responses or responses[-1] != b"refused":
                responses.append(get(address))
            return responses

        with ThreadPoolExecutor(8) as pool:
            clients = [pool.submit(requests_until_refused, i) for i in range(8)]
            assert get(address).startswith(b"HTTP/1.1 200")
            os.kill(server, signal.SIGTERM)
            responses = [response for client in clients for response in client.result(60)]
        answered = [response for response in responses if response != b"refused"]
        assert {response.partition(b"\r\n")[0] for response in answered} == {b"HTTP/1.1 200 OK"}
        closing = [response for response in answered if b"connection: close" in response.lower()]
        assert closing


@pytest.mark.slow
def test_kept_alive_connections_are_told_to_close_and_are_never_reset(bento_tag):
    with served(bento_tag) as url:
        server = server_pid(url)
        requests.post(f"{url}/predict", json={"instruction": "Say hello.", "max_new_tokens": 2}, timeout=60)

        def requests_until_told_to_close(_: int) -> int:
            connection, n = HTTPConnection(urlsplit(url).netloc, timeout=60), 0
            while True:
                connection.request("POST", "/predict", json.dumps({"instruction": "Say hello.", "max_new_tokens": 2}))
                response = connection.getresponse()  # raises when the connection was reset
                assert response.status == 200, response.read()
                response.read()
                n += 1
                if response.will_close:
                    return n
                time.sleep(0.1)

        with ThreadPoolExecutor(18) as pool:
            clients = [pool.submit(requests_until_told_to_close, i) for i in range(18)]
            time.sleep(3)
            os.kill(server, signal.SIGTERM)
            assert all(client.result(60) > 1 for client in clients)


def test_readiness_fails_first_and_requests_in_flight_are_completed(bento_tag):
    with served(bento_tag) as url:
        server = server_pid(url)
        body = {"instruction": "Say hello.", "max_new_tokens": 60}
        requests.post(f"{url}/predict", json=body, timeout=60)
        with ThreadPoolExecutor(8) as pool:
            responses = [pool.submit(requests.post, f"{url}/predict", json=body, timeout=60) for _ in range(8)]
            os.kill(server, signal.SIGTERM)
            seen = []
            with suppress(requests.ConnectionError):
                while True:
                    seen.append(requests.get(f"{url}/readyz", timeout=5))
                    time.sleep(0.05)
            assert seen[-1].status_code == 503
            assert seen[-1].headers["Connection"] == "close"
            assert [response.result().status_code for response in responses] == [200] * 8


@pytest.fixture
def not_under_nohup():
    """Child processes inherit that SIGHUP is ignored, as under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


def test_sighup_ends_the_service(bento_tag, not_under_nohup):
    """BentoML would start a second worker on the socket that the first one shuts down."""
    with served(bento_tag) as url:
        [server] = psutil.Process(server_pid(url)).children()
        server.send_signal(signal.SIGHUP)
        wait_until(lambda: not server.is_running(), 30, "the end of the service")


def test_a_second_ctrl_c_ends_the_service_although_a_request_is_in_flight(bento_tag):
    with served(bento_tag) as url:
        [server] = psutil.Process(server_pid(url)).children()
        address = urlsplit(url)
        with socket.create_connection((address.hostname, address.port), timeout=30) as connection:
            connection.sendall(b"POST /predict HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\n")  # no body: 55 seconds
            server.send_signal(signal.SIGINT)
            wait_until(lambda: requests.get(f"{url}/readyz", timeout=5).status_code == 503, 10, "the graceful shutdown")
            server.send_signal(signal.SIGINT)
            wait_until(lambda: not server.is_running(), 30, "the end of the service")


def test_tokens_and_origins_are_checked(bento_tag):
    origin = "https://app.example"
    with served(bento_tag, GPT2_API_TOKEN="s3cret-token", GPT2_ADMIN_TOKEN="", GPT2_CORS_ORIGINS=origin) as url:
        for path in ("/livez", "/readyz", "/metrics"):
            assert requests.get(url + path, timeout=10).status_code == 200
        for path in ("/", "/metadata", "/v1/models", "/docs.json", "/nothing"):
            assert requests.get(url + path, timeout=10).status_code == 401
        with openai.OpenAI(base_url=f"{url}/v1", api_key="wrong", max_retries=0) as client:
            with pytest.raises(openai.AuthenticationError):
                client.models.list()
            assert client.with_options(api_key="s3cret-token").models.list().data
        for other in (origin, "https://other.example"):
            asked = {"Origin": other, "Access-Control-Request-Method": "POST"}
            asked["Access-Control-Request-Headers"] = "authorization,content-type,x-stainless-os"
            preflight = requests.options(f"{url}/v1/completions", headers=asked, timeout=10)
            refused = requests.post(f"{url}/v1/completions", json={}, headers={"Origin": other}, timeout=10)
            assert (preflight.status_code, refused.status_code) == (200 if other == origin else 400, 401)
            for response in (preflight, refused):
                assert response.headers.get("Access-Control-Allow-Origin") == (origin if other == origin else None)
                assert "Access-Control-Allow-Credentials" not in response.headers
