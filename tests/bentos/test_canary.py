"""A canary in a running service: requests move to another adapter by share and key, and none fails."""

import asyncio
import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from threading import Event
from time import monotonic, sleep

import pytest
import requests
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry

from bentos import shadow
from bentos.canary import routes_to_canary
from bentos.completion import GenerationRequest
from bentos.generation import TextGenerator
from bentos.metrics import Metrics
from bentos.schemas import TUNED, CanaryRequest
from gpt2core.files import directory_sha256
from steps.traffic import read_traffic
from tests.bentos.client import admin, end_canary, error_of, metric, predict, start_canary
from tests.helpers import wait_until

HEADERS = {"Authorization": "Bearer admin"}


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
    small, large = (routes_to_canary(CanaryRequest(adapter="next", share=share), key) for share in sorted((one, other)))
    assert large >= small


def test_the_share_is_that_of_the_keys_and_differs_between_canaries():
    half = [CanaryRequest(adapter=name, share=0.5) for name in ("one", "two")]
    keys = [str(i) for i in range(2000)]
    chosen = [{key for key in keys if routes_to_canary(one, key)} for one in half]
    for those in (*chosen, chosen[0] ^ chosen[1]):
        assert 900 < len(those) < 1100  # 4.5 standard deviations


def test_starting_shifting_and_ending_a_canary_loses_no_request(url, adapters):
    keys = [f"user-{i}" for i in range(20)]
    before = metric(url, 'gpt2_requests_total{adapter="next"')
    with load(url) as responses:
        assert admin(url, "load", lora_name="next", lora_path="good").ok
        seen: list[list[str]] = []
        for share in (0.0, 0.5, 1.0):
            assert start_canary(url, adapter="next", share=share).json()["canary"]["share"] == share
            seen.append([adapter_of(url, key) for key in keys])
        assert error_of(admin(url, "unload", lora_name="next"))["param"] == "lora_name"
        status = requests.get(f"{url}/v1/canary", headers=HEADERS, timeout=60).json()
        assert end_canary(url).json() == {"canary": None, "versions": [], "shadow": None}
        assert admin(url, "unload", lora_name="next").ok
        assert {adapter_of(url, key) for key in keys} == {"gpt2-instruct"}
    assert {response.status_code for response in responses} == {200}
    assert {response.json()["adapter"]["name"] for response in responses} == {"gpt2-instruct", "next"}
    assert (set(seen[0]), set(seen[2])) == ({"gpt2-instruct"}, {"next"})
    half = [routes_to_canary(CanaryRequest(adapter="next", share=0.5), key) for key in keys]
    assert [name == "next" for name in seen[1]] == half
    assert {arm["adapter"]["name"]: arm["failed"] for arm in status["versions"]} == {"gpt2-instruct": 0, "next": 0}
    counted = {arm["adapter"]["name"]: arm["completed"] for arm in status["versions"]}
    assert counted["next"] >= len(keys) + sum(half)
    assert metric(url, 'gpt2_requests_total{adapter="next"') - before >= counted["next"]
    assert status["versions"][1]["adapter"]["sha256"] == directory_sha256(adapters / "good")


def test_openais_routes_name_the_version_that_answered(url, client):
    admin(url, "load", lora_name="next", lora_path="good")
    start_canary(url, adapter="next", share=1)
    try:
        messages = [{"role": "user", "content": "Say hello."}]
        assert client.chat.completions.create(model="gpt2-instruct", messages=messages, max_tokens=2).model == "next"
        assert client.chat.completions.create(model="base", messages=messages, max_tokens=2).model == "base"
    finally:
        end_canary(url)
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
    assert start_canary(url, **body).status_code == status


def test_a_canary_requires_the_admin_token(url):
    assert requests.get(f"{url}/v1/canary", timeout=10).status_code == 401


def test_a_shadow_answers_again_and_no_client_sees_it(url, adapters, request_log):
    admin(url, "load", lora_name="next", lora_path="good")
    status = start_canary(url, adapter="next", share=1, shadow=True).json()
    assert status["shadow"]["compared"] == 0
    series = 'gpt2_shadow_requests_total{adapter="next",outcome="agreed"'
    counted, ended = metric(url, series), metric(url, 'gpt2_requests_total{adapter="next"')
    responses = [predict(url, instruction=f"Say {i}.") for i in range(3)]
    sampled = predict(url, instruction="Say hello.", temperature=1.0)

    def canary() -> dict:
        return requests.get(f"{url}/v1/canary", headers=HEADERS, timeout=60).json()

    wait_until(lambda: canary()["shadow"]["compared"] == 3, 60, "three comparisons")
    status = canary()
    assert {each.json()["adapter"]["name"] for each in (*responses, sampled)} == {"gpt2-instruct"}
    expected = {"agreed": 3, "mean_token_f1": 1.0, "dropped": 0}  # both adapters have the same weights
    assert {name: status["shadow"][name] for name in expected} == expected
    assert status["shadow"]["mean_logprob"] < 0
    assert [arm["completed"] for arm in status["versions"]] == [4, 3]
    assert metric(url, series) - counted == 3
    assert metric(url, 'gpt2_requests_total{adapter="next"') == ended  # of clients
    ids = {each.headers["X-Request-Id"] for each in (*responses, sampled)}

    def own_lines() -> list[dict]:  # an earlier test's lines may still be on their way into the log
        return [line for line in read(request_log) if line.get("request_id") in ids]

    wait_until(lambda: len(own_lines()) == 7, 20, "the lines in the log")
    lines = [line for line in own_lines() if "shadow" in line]
    assert [line["request_id"] for line in lines] == [each.headers["X-Request-Id"] for each in responses]
    assert all(line["agreed"] and line["shadow"] == "next" and "answer_sha256" in line for line in lines)
    read_back = read_traffic(request_log)
    assert not read_back.problems
    assert "next" not in {one.model for one in read_back.completions[-4:]}
    assert end_canary(url).json()["shadow"] is None
    assert admin(url, "unload", lora_name="next").ok


def read(log) -> list[dict]:
    return [json.loads(line) for line in log.read_text().splitlines()]


@pytest.fixture
def shadowing(base_dir, adapter_dir, adapters):
    """Calls a coroutine function with a slow engine that has a canary in shadow mode and records its requests."""
    generator = TextGenerator(base_dir, adapter_dir, Metrics(CollectorRegistry()), "fp32", str(adapters))
    step, running = generator.engine._step, []

    def slow_step() -> None:
        sleep(0.01)
        running.append(generator.engine._scheduler.n_running)
        step()

    generator.engine._step = slow_step

    async def run(scenario):
        await generator.adapters.load("next", "good")
        await generator.adapters.set_canary(CanaryRequest(adapter="next", share=1, shadow=True))
        return await scenario(generator)

    yield lambda scenario: asyncio.run(run(scenario)), running
    generator.close()


def ask(generator: TextGenerator, n: int = 1, max_new_tokens: int = 8):
    prompt, config = generator.encode_instruction("Hello."), generator.config(max_new_tokens, {"ignore_eos": True})
    request = GenerationRequest(prompt, config, TUNED, monotonic() + 60, "id-1")
    return asyncio.gather(*(each.whole() for each in generator.submit([request] * n, "instruction")))


async def until(is_true) -> None:
    async with asyncio.timeout(60):
        while not is_true():
            await asyncio.sleep(0.005)


def test_a_request_interrupts_a_shadow_which_begins_again_later(shadowing):
    run, running = shadowing

    async def scenario(generator: TextGenerator):
        await ask(generator)
        await until(lambda: generator.engine.stats()["running"] == 1)  # the shadow
        await ask(generator)
        between = generator.canary.status().shadow.compared
        await until(lambda: generator.canary.status().shadow.compared == 2)
        return between

    assert run(scenario) == 0
    assert max(running) == 1  # never beside a request


def test_another_version_of_the_canary_is_compared_from_the_beginning(shadowing, adapters):
    other = shutil.copytree(adapters / "good", adapters / "other")
    (other / "README.md").write_text("another digest")

    async def scenario(generator: TextGenerator):
        await ask(generator)
        await until(lambda: generator.canary.status().shadow.compared == 1)
        await generator.adapters.load("next", "other")
        reloaded = generator.canary.status().model_copy(deep=True)
        await ask(generator)
        await until(lambda: generator.canary.status().shadow.compared == 1)
        return reloaded

    status = shadowing[0](scenario)
    assert status.shadow.compared == 0
    assert [arm.completed for arm in status.versions] == [0, 0]
    assert status.versions[1].adapter.sha256 == directory_sha256(other)


def test_shadows_are_dropped_when_many_wait_and_forgotten_at_the_end(shadowing, monkeypatch):
    monkeypatch.setattr(shadow, "MAX_SHADOWS", 1)

    async def scenario(generator: TextGenerator):
        await ask(generator, n=3)
        await until(lambda: generator.canary.status().shadow.compared == 1)
        dropped = generator.canary.status().shadow.dropped
        await ask(generator, max_new_tokens=60)
        await until(lambda: generator.engine.stats()["running"] == 1)
        generator.close()
        await asyncio.sleep(0)
        return dropped, generator.canary.status().shadow.compared, asyncio.all_tasks() - {asyncio.current_task()}

    dropped, compared, tasks = shadowing[0](scenario)
    assert (dropped, compared) == (2, 1)
    assert all(task.done() for task in tasks)
