"""`bentos.generation` and `bentos.completion` without a server, where time and failures can be controlled."""

import asyncio
import json
from dataclasses import replace
from threading import Event
from time import monotonic, sleep
from types import SimpleNamespace

import pytest
from prometheus_client import CollectorRegistry
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request

from bentos import body, generation, predict
from bentos.completion import Completion, CompletionResult, GenerationRequest, merge, usage
from bentos.dependencies import Served
from bentos.errors import ServiceError, error_response
from bentos.generation import TextGenerator
from bentos.metrics import Metrics
from bentos.middleware.access_log import RequestRecord
from bentos.openai.completions import CompletionRoute
from bentos.openai.protocol import CompletionRequest
from bentos.openai.serving import generation_requests
from bentos.schemas import TUNED, PredictRequest, Structure
from bentos.streaming import grammars
from gpt2core.config import GenerationConfig
from gpt2core.engine import EngineFull
from tests.helpers import make_lineage, wait_until


@pytest.fixture
def generator(base_dir, adapter_dir):
    generator = TextGenerator(base_dir, adapter_dir, Metrics(CollectorRegistry()), "fp32")
    yield generator
    generator.close()


@pytest.fixture
def slow_generator(generator, monkeypatch):
    step = generator.engine._step
    monkeypatch.setattr(generator.engine, "_step", lambda: (sleep(0.02), step()))
    return generator


def submit(
    generator: TextGenerator, seconds: float = 60, max_new_tokens: int = 8, n: int = 1, on_end=None, **values
) -> list[Completion]:
    prompt = generator.encode_instruction("Hello.")
    config = generator.config(max_new_tokens, {})
    request = GenerationRequest(prompt, config, TUNED, monotonic() + seconds, "id-1", **values)
    return generator.submit([request] * n, "instruction", on_end)


def complete(generator: TextGenerator, **values) -> tuple[str, Completion]:
    async def run() -> tuple[str, Completion]:
        (completion,) = submit(generator, **values)
        return (await completion.whole()).text, completion

    return asyncio.run(run())


def test_a_body_is_awaited_until_the_deadline(monkeypatch):
    monkeypatch.setattr(body, "DEADLINE", 0.05)

    async def receive():
        await asyncio.sleep(60)

    app = Starlette()
    app.state.served = Served(SimpleNamespace(), make_lineage(), 0, "last")
    request = Request({"type": "http", "headers": [], "app": app}, receive)
    with pytest.raises(ServiceError) as error:
        asyncio.run(body.read_body(request, PredictRequest))
    assert error_response(error.value).status_code == 408


def test_decoding_ends_at_the_deadline(slow_generator):
    with pytest.raises(ServiceError) as error:
        complete(slow_generator, seconds=0.1, max_new_tokens=60)
    assert error_response(error.value).status_code == 504
    assert slow_generator.engine.stats()["running"] == 0
    assert complete(slow_generator, max_new_tokens=1)[1].finish_reason == "length"


def test_the_controls_of_a_request_are_checked_once_for_all_its_choices(generator, monkeypatch):
    configs = []
    check = GenerationConfig.__post_init__
    monkeypatch.setattr(GenerationConfig, "__post_init__", lambda config: (configs.append(config), check(config)))
    body = CompletionRequest(prompt=["a", "b"], n=3, seed=-1, temperature=1.0, logit_bias={"1": 2.0})
    request = Request({"type": "http", "headers": [], "state": {"request_id": "id-1"}})
    route = CompletionRoute(body, generator)
    requests = generation_requests(route, generator, [None] * 6, monotonic() + 60, request)
    assert len(configs) == 1
    assert [one.config.seed for one in requests] == [2**63 - 1, 0, 1] * 2
    assert all(replace(one.config, seed=0) == replace(configs[0], seed=0) for one in requests)


@pytest.fixture
def stuck_compiler(generator):
    """Its thread is busy with another grammar, until the test has ended."""
    go_on = Event()
    generator._grammars._compiling.submit(go_on.wait)
    yield generator
    go_on.set()


def test_a_grammar_is_awaited_until_the_deadline(stuck_compiler):
    with pytest.raises(ServiceError) as error:
        asyncio.run(stuck_compiler.grammars(Structure("regex", "a", "guided_regex"), 1, monotonic() + 0.05))
    assert (error_response(error.value).status_code, error.value.param) == (504, "guided_regex")


@pytest.mark.parametrize("choice", [["a"], None])
def test_an_adapter_that_is_unloaded_while_a_grammar_is_compiled_is_a_404(generator, adapter_dir, monkeypatch, choice):
    generator.adapters._adapters_dir = str(adapter_dir.parent)
    generator.adapters._load("other", adapter_dir)
    compiling = generator.grammars

    async def grammars_and_unload(structure, n, deadline):
        generator.adapters._unload("other")
        return await compiling(structure, n, deadline)

    monkeypatch.setattr(generator, "grammars", grammars_and_unload)
    if choice is None:
        generator.adapters._unload("other")
    values = {"instruction": "Hello.", "adapter": "other", "guided_choice": choice}
    messages = [{"type": "http.request", "body": json.dumps(values).encode()}]

    async def receive():
        if not messages:
            await asyncio.sleep(60)
        return messages.pop()

    app = Starlette()
    app.state.served = Served(generator, make_lineage(), 0, "last")
    scope = {"type": "http", "headers": [], "app": app, "state": {"request_id": "id-1", "record": RequestRecord()}}
    with pytest.raises(ServiceError) as error:
        asyncio.run(predict.predict(Request(scope, receive)))
    assert (error.value.type, error.value.param) == ("model_not_found", "adapter")


def test_a_client_disconnect_ends_the_wait_for_a_grammar(stuck_compiler):
    async def receive():
        return {"type": "http.disconnect"}

    app = Starlette()
    app.state.served = Served(stuck_compiler, make_lineage(), 0, "last")
    request = Request({"type": "http", "headers": [], "app": app}, receive)
    with pytest.raises(ClientDisconnect):
        asyncio.run(grammars(request, Structure("regex", "a", "guided_regex"), 1, monotonic() + 60))


def test_a_cancelled_completion_leaves_the_engine(slow_generator):
    async def give_up() -> None:
        (completion,) = submit(slow_generator, max_new_tokens=60)
        await asyncio.wait_for(completion.whole(), 0.1)

    with pytest.raises(TimeoutError):
        asyncio.run(give_up())
    wait_until(lambda: slow_generator.engine.stats()["running"] == 0, 20, "an idle engine")


def test_a_full_queue_is_a_429_with_retry_after(base_dir, adapter_dir, monkeypatch):
    monkeypatch.setattr(generation, "MAX_QUEUE", 0)
    generator = TextGenerator(base_dir, adapter_dir, Metrics(CollectorRegistry()), "fp32")
    with pytest.raises(ServiceError) as error:
        complete(generator)
    generator.close()
    response = error_response(error.value)
    assert (response.status_code, response.headers["Retry-After"]) == (429, "1")


def test_requests_are_queued_all_or_none(slow_generator, monkeypatch):
    submit_one, n = slow_generator.engine.submit, 0

    def submit_two(*args, **values):
        nonlocal n
        n += 1
        if n == 3:
            raise EngineFull("2 requests are waiting")
        return submit_one(*args, **values)

    async def run() -> None:
        submit(slow_generator, n=3, max_new_tokens=60)

    monkeypatch.setattr(slow_generator.engine, "submit", submit_two)
    monkeypatch.setattr(slow_generator, "_observe", lambda result: pytest.fail("it was recorded as a completion"))
    with pytest.raises(ServiceError):
        asyncio.run(run())
    assert slow_generator._shadows._in_flight == 0
    wait_until(lambda: sum(map(slow_generator.engine.stats().get, ("waiting", "running"))) == 0, 20, "an idle engine")


def test_a_completion_that_the_engine_drops_is_a_503(generator, monkeypatch):
    monkeypatch.setattr(generator.engine, "_step", lambda: 1 / 0)
    with pytest.raises(ServiceError) as error:
        complete(generator)
    assert error_response(error.value).status_code == 503


def test_a_completion_is_no_longer_in_flight_even_if_recording_it_fails(generator):
    metrics = SimpleNamespace(observe=lambda result: 1 / 0)
    generator._metrics = metrics
    with pytest.raises(ZeroDivisionError):
        complete(generator)
    assert generator._shadows._in_flight == 0


def test_merging_ends_with_the_first_error(generator, monkeypatch):
    monkeypatch.setattr(generator.engine, "_step", lambda: 1 / 0)

    async def run() -> None:
        async for _ in merge(submit(generator, n=2)):
            pass

    with pytest.raises(ServiceError):
        asyncio.run(run())


def test_end_of_text_finishes_a_completion_and_is_not_part_of_its_text(generator, monkeypatch):
    tokens = iter([5, generator.tokenizer.eot_token])
    monkeypatch.setattr(generator.engine._runner, "_sample", lambda hidden, requests: [next(tokens)])
    text, completion = complete(generator)
    assert completion.finish_reason == "stop"
    assert text == generator.tokenizer.decode([5]).strip()
    assert usage([completion]).completion_tokens == 2


def test_the_record_of_a_request_sums_tokens_over_all_completions(generator):
    record = RequestRecord()
    results: list[CompletionResult] = []

    def on_end(result: CompletionResult) -> None:
        record.add(result)
        results.append(result)

    async def run() -> list[Completion]:
        completions = submit(generator, n=3, on_end=on_end)
        await asyncio.gather(*(completion.whole() for completion in completions))
        return completions

    completions = asyncio.run(run())
    fields, counts = record.fields(), usage(completions)
    assert [len(result.tokens) for result in results] == [8, 8, 8]
    assert fields["completion_tokens"] == counts.completion_tokens == 24
    assert fields["prompt_tokens"] == counts.prompt_tokens == len(completions[0].request.prompt)
    assert fields["finish_reason"] == "length"
