"""A canary in a running service: requests move to another adapter by share and key, and none is lost."""

from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from threading import Event

import pytest
import requests
from hypothesis import given
from hypothesis import strategies as st

from bentos.canary import takes
from bentos.schemas import CanaryRequest
from gpt2core.checkpoint import directory_sha256
from tests.bentos.client import admin, error_of, metric

HEADERS = {"Authorization": "Bearer admin"}


def start(url: str, **body) -> requests.Response:
    return requests.post(f"{url}/v1/start_canary", json=body, headers=HEADERS, timeout=60)


def end(url: str) -> requests.Response:
    return requests.post(f"{url}/v1/end_canary", headers=HEADERS, timeout=60)


def adapter_of(url: str, key: str) -> str:
    body = {"instruction": "Say hello.", "max_new_tokens": 2}
    response = requests.post(f"{url}/predict", json=body, headers={"X-Canary-Key": key}, timeout=60)
    return response.json()["adapter"]["name"]


@contextmanager
def load(url: str, n_clients: int = 4):
    """Clients that request completions all the time; gives the responses, which are complete after the block."""
    stop, responses = Event(), []

    def client(_: int) -> None:
        with requests.Session() as session:
            while not stop.is_set():
                body = {"instruction": "Say hello.", "max_new_tokens": 4}
                responses.append(session.post(f"{url}/predict", json=body, timeout=60))

    with ThreadPoolExecutor(n_clients) as pool:
        clients = [pool.submit(client, i) for i in range(n_clients)]
        try:
            yield responses
        finally:
            stop.set()
        for each in clients:
            each.result()


@given(st.text(min_size=1), st.floats(0, 1), st.floats(0, 1))
def test_a_larger_share_keeps_the_keys_of_a_smaller_one(key, one, other):
    small, large = (takes(CanaryRequest(adapter="next", share=share), key) for share in sorted((one, other)))
    assert large >= small


def test_the_share_is_that_of_the_keys_and_differs_between_canaries():
    half = [CanaryRequest(adapter=name, share=0.5) for name in ("one", "two")]
    keys = [str(i) for i in range(2000)]
    chosen = [{key for key in keys if takes(one, key)} for one in half]
    for those in (*chosen, chosen[0] ^ chosen[1]):
        assert 900 < len(those) < 1100  # 4.5 standard deviations


def test_starting_shifting_and_ending_a_canary_loses_no_request(url, adapters):
    keys = [f"user-{i}" for i in range(20)]
    before = metric(url, 'gpt2_requests_total{adapter="next"')
    with load(url) as responses:
        assert admin(url, "load", lora_name="next", lora_path="good").ok
        seen: list[list[str]] = []
        for share in (0.0, 0.5, 1.0):
            assert start(url, adapter="next", share=share).json()["canary"] == {"adapter": "next", "share": share}
            seen.append([adapter_of(url, key) for key in keys])
        assert error_of(admin(url, "unload", lora_name="next"))["param"] == "lora_name"
        status = requests.get(f"{url}/v1/canary", headers=HEADERS, timeout=60).json()
        assert end(url).json() == {"canary": None, "versions": []}
        assert admin(url, "unload", lora_name="next").ok
        assert {adapter_of(url, key) for key in keys} == {"gpt2-instruct"}
    assert {response.status_code for response in responses} == {200}
    assert {response.json()["adapter"]["name"] for response in responses} == {"gpt2-instruct", "next"}
    assert (set(seen[0]), set(seen[2])) == ({"gpt2-instruct"}, {"next"})
    half = [takes(CanaryRequest(adapter="next", share=0.5), key) for key in keys]
    assert [name == "next" for name in seen[1]] == half
    assert {arm["adapter"]["name"]: arm["failed"] for arm in status["versions"]} == {"gpt2-instruct": 0, "next": 0}
    counted = {arm["adapter"]["name"]: arm["completed"] for arm in status["versions"]}
    assert counted["next"] >= len(keys) + sum(half)
    assert metric(url, 'gpt2_requests_total{adapter="next"') - before >= counted["next"]
    assert status["versions"][1]["adapter"]["sha256"] == directory_sha256(adapters / "good")


def test_openais_routes_name_the_version_that_answered(url, client):
    admin(url, "load", lora_name="next", lora_path="good")
    start(url, adapter="next", share=1)
    try:
        messages = [{"role": "user", "content": "Say hello."}]
        assert client.chat.completions.create(model="gpt2-instruct", messages=messages, max_tokens=2).model == "next"
        assert client.chat.completions.create(model="base", messages=messages, max_tokens=2).model == "base"
    finally:
        end(url)
        admin(url, "unload", lora_name="next")


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({"adapter": "absent", "share": 0.5}, 404),
        ({"adapter": "gpt2-instruct", "share": 0.5}, 404),
        ({"adapter": "absent", "share": 1.5}, 400),
    ],
)
def test_a_wrong_canary_is_refused(url, body, status):
    assert start(url, **body).status_code == status


def test_a_canary_requires_the_admin_token(url):
    assert requests.get(f"{url}/v1/canary", timeout=10).status_code == 401
