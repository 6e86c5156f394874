"""What needs a service of its own: SIGTERM, and a required token."""

import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import openai
import pytest
import requests

from tests.bentos.client import served, server_pid


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
                    seen.append(requests.get(f"{url}/readyz", timeout=5).status_code)
                    time.sleep(0.05)
            assert 503 in seen
            assert [response.result().status_code for response in responses] == [200] * 8


def test_a_service_with_an_api_token_requires_it(bento_tag):
    with served(bento_tag, GPT2_API_TOKEN="s3cret-token", GPT2_ADMIN_TOKEN="") as url:
        for path in ("/livez", "/readyz", "/metrics"):
            assert requests.get(url + path, timeout=10).status_code == 200
        for path in ("/", "/metadata", "/v1/models", "/docs.json", "/nothing"):
            assert requests.get(url + path, timeout=10).status_code == 401
        with openai.OpenAI(base_url=f"{url}/v1", api_key="wrong", max_retries=0) as client:
            with pytest.raises(openai.AuthenticationError):
                client.models.list()
            assert client.with_options(api_key="s3cret-token").models.list().data
