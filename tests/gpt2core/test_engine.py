"""The engine against `generate`, the simple reference: a completion does not depend on other requests."""

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from time import monotonic

import pytest
import torch

from gpt2core.checkpoint import load_adapter, load_pretrained
from gpt2core.config import GenerationConfig, GPT2Config, LoraConfig
from gpt2core.engine import Engine, EngineClosed, EngineFull
from gpt2core.generate import generate
from gpt2core.inference import scheduler
from gpt2core.inference.quantized import supported_formats
from gpt2core.lora import merge_lora
from gpt2core.model import GPT2
from tests.gpt2core.conftest import TINY
from tests.gpt2core.decoding import mixed_configs, random_prompts, save_random_adapter
from tests.helpers import wait_until


class StepGate:
    """Makes the engine wait before each step until the test allows it."""

    def __init__(self, engine: Engine, monkeypatch) -> None:
        self._n_steps, self._allowed = 0, threading.Semaphore(0)
        step = engine._step

        def gated() -> None:
            self._allowed.acquire()
            step()
            self._n_steps += 1

        monkeypatch.setattr(engine, "_step", gated)

    def step(self, n: int = 1) -> None:
        """Allow n steps, and wait until they are done."""
        target = self._n_steps + n
        for _ in range(n):
            self._allowed.release()
        wait_until(lambda: self._n_steps >= target, 60, f"step {target}")

    def open(self) -> None:
        self._allowed.release(1000)


# Batching and adapters


@pytest.mark.parametrize("max_batch", [1, 3, 16])
def test_requests_that_join_and_leave_get_the_completions_of_generate(model, max_batch):
    prompts, configs = random_prompts(40), mixed_configs(40)
    with Engine(model, max_batch, "fp32") as engine:
        requests = [engine.submit(*pair) for pair in zip(prompts, configs, strict=True)]
        completions = [request.result(60) for request in requests]
    expected = [generate(model, [prompt], config)[0] for prompt, config in zip(prompts, configs, strict=True)]
    assert completions == expected
    for request, completion, config in zip(requests, completions, configs, strict=True):
        assert request.finish_reason == ("stop" if completion[-1] == config.eos_id else "length")


@pytest.mark.parametrize("weights", supported_formats(GPT2Config(**TINY), torch.device("cpu")))
def test_a_completion_does_not_depend_on_the_rest_of_the_batch(model, weights):
    prompts, configs = random_prompts(12), mixed_configs(12)
    with Engine(model, 8, weights) as engine:
        requests = [engine.submit(*pair) for pair in zip(prompts, configs, strict=True)]
        together = [request.result(60) for request in requests]
    with Engine(model, 1, weights) as engine:
        alone = [engine.submit(*pair).result(60) for pair in zip(prompts, configs, strict=True)]
    assert together == alone


@pytest.mark.parametrize("static_cache", [False, True])
def test_each_request_uses_its_own_adapter(tiny_gpt2_dir, model, tmp_path, static_cache):
    loras = {
        "a": LoraConfig(rank=2),
        "b": LoraConfig(rank=3, alpha=5.0, targets=("k", "proj", "fc")),
        "c": LoraConfig(rank=1, targets=("q", "k", "v", "o", "fc", "proj")),
    }
    tuned = {None: model}
    for seed, (name, lora) in enumerate(loras.items()):
        directory = save_random_adapter(load_pretrained(tiny_gpt2_dir), lora, seed, tmp_path / name)
        tuned[name] = load_adapter(load_pretrained(tiny_gpt2_dir), directory)
    prompts, configs = random_prompts(24), mixed_configs(24)
    names = [list(tuned)[i % 4] for i in range(24)]
    with Engine(model, 6, "fp32", static_cache=static_cache) as engine:
        for name in loras:
            engine.load_adapter(name, tmp_path / name)
        requests = [engine.submit(p, c, name) for p, c, name in zip(prompts, configs, names, strict=True)]
        completions = [request.result(60) for request in requests]
        alone = engine.submit(prompts[0], configs[0], "c").result(60)
    expected = [generate(tuned[n], [p], c)[0] for p, c, n in zip(prompts, configs, names, strict=True)]
    assert completions == expected
    assert alone == generate(tuned["c"], [prompts[0]], configs[0])[0]
    assert len({tuple(generate(tuned[n], [prompts[1]], GenerationConfig())[0]) for n in tuned}) == 4


def test_replacing_and_unloading_an_adapter_does_not_affect_running_requests(tiny_gpt2_dir, model, tmp_path):
    first, second = (
        save_random_adapter(load_pretrained(tiny_gpt2_dir), LoraConfig(), seed, tmp_path / str(seed)) for seed in (1, 2)
    )
    config, prompt = GenerationConfig(max_new_tokens=40), [1, 2, 3]
    expected = [generate(load_adapter(load_pretrained(tiny_gpt2_dir), d), [prompt], config)[0] for d in (first, second)]
    with Engine(model, 4, "fp32") as engine:
        engine.load_adapter("x", first)
        running = engine.submit(prompt, config, "x")
        next(iter(running))
        engine.load_adapter("x", second)
        assert engine.submit(prompt, config, "x").result(60) == expected[1]
        engine.unload_adapter("x")
        assert running.result(60) == expected[0]
        assert engine.adapters == []
        with pytest.raises(ValueError, match="there is no adapter 'x'; loaded: none"):
            engine.submit(prompt, config, "x")
        with pytest.raises(KeyError):
            engine.unload_adapter("x")
    assert expected[0] != expected[1]


@pytest.mark.parametrize("merged", [True, False])
def test_the_models_own_lora_layers_are_applied(tiny_gpt2_dir, tmp_path, merged):
    directory = save_random_adapter(load_pretrained(tiny_gpt2_dir), LoraConfig(), 1, tmp_path)
    tuned = load_adapter(load_pretrained(tiny_gpt2_dir), directory)
    config = GenerationConfig(max_new_tokens=20)
    expected = generate(tuned, [[1, 2]], config)[0]
    with Engine(merge_lora(tuned) if merged else tuned, 2, "fp32") as engine:
        assert engine.submit([1, 2], config).result(60) == expected


def test_inverse_layer_scaling_relu_and_a_narrow_mlp_are_supported(tiny_config):
    config = replace(tiny_config, scale_attn_by_inverse_layer_idx=True, activation_function="relu", n_inner=48)
    model = GPT2(config, torch.Generator().manual_seed(3))
    prompt, generation = [1, 2, 3], GenerationConfig(max_new_tokens=20)
    with Engine(model, 2, "fp32") as engine:
        assert engine.submit(prompt, generation).result(60) == generate(model, [prompt], generation)[0]


# A request's life


def test_tokens_arrive_one_by_one_and_are_reported(model):
    reported: list[int] = []
    with Engine(model, 2, "fp32") as engine:
        config = GenerationConfig(max_new_tokens=9)
        request = engine.submit([1, 2], config, on_progress=lambda r: reported.append(len(r.tokens)))
        tokens = list(request)
        assert tokens == request.result(0) == generate(model, [[1, 2]], config)[0]
        assert list(request) == tokens  # again, from the start
    assert reported == list(range(1, 10))
    assert request.submitted_at <= request.first_token_at <= monotonic()


def test_an_exception_in_on_progress_affects_no_request(model):
    config = GenerationConfig(max_new_tokens=9)
    with Engine(model, 2, "fp32") as engine:
        failing = engine.submit([1, 2], config, on_progress=lambda r: 1 / 0)
        other = engine.submit([3], config)
        assert failing.result(60) == generate(model, [[1, 2]], config)[0]
        assert other.result(60) == generate(model, [[3]], config)[0]


@pytest.mark.parametrize("steps_before", [0, 3])
def test_a_cancelled_request_ends_before_the_next_step_and_frees_its_row(model, monkeypatch, steps_before):
    engine = Engine(model, 1, "fp32")
    gate = StepGate(engine, monkeypatch)
    with engine:
        cancelled, waiting = (engine.submit([1], GenerationConfig(max_new_tokens=60)) for _ in range(2))
        gate.step(steps_before)
        cancelled.cancel()
        gate.step(2)
        assert cancelled.finish_reason == "cancelled"
        assert len(cancelled.result(5)) <= steps_before + 1
        assert len(waiting.tokens) >= 1
        gate.open()


def test_a_request_past_its_deadline_ends_with_the_tokens_it_has(model, monkeypatch):
    now = 0.0
    monkeypatch.setattr(scheduler, "monotonic", lambda: now)
    engine = Engine(model, 1, "fp32")
    gate = StepGate(engine, monkeypatch)
    with engine:
        running, waiting = (
            engine.submit([1], GenerationConfig(max_new_tokens=60), deadline=deadline) for deadline in (1.0, 1.0)
        )
        gate.step(2)
        now = 1.5
        gate.step()  # this step may have been prepared before the deadline
        gate.open()
        assert 2 <= len(running.result(60)) <= 3
        assert waiting.result(60) == []
        assert running.finish_reason == waiting.finish_reason == "deadline"


def test_a_timeout_of_result_does_not_end_the_request(model, monkeypatch):
    engine = Engine(model, 1, "fp32")
    gate = StepGate(engine, monkeypatch)
    with engine:
        request = engine.submit([1], GenerationConfig(max_new_tokens=3))
        with pytest.raises(TimeoutError, match=r"did not finish within 0\.01 seconds"):
            request.result(0.01)
        gate.open()
        assert len(request.result(60)) == 3


def test_logprobs_are_those_of_the_model(model):
    prompt, sampled = [5, 6, 7], GenerationConfig(max_new_tokens=6, temperature=0.9, seed=3)
    with Engine(model, 4, "fp32") as engine:
        with_logprobs = engine.submit(prompt, sampled, logprobs=4)
        without = engine.submit(prompt, sampled)
        completion = with_logprobs.result(60)
        assert without.result(60) == completion
    assert without.logprobs == []
    with torch.inference_mode():
        expected = model(torch.tensor([prompt + completion]))[0, len(prompt) - 1 : -1].log_softmax(-1)
    for token, found, row in zip(completion, with_logprobs.logprobs, expected, strict=True):
        assert found.logprob == pytest.approx(float(row[token]), abs=1e-4)
        assert [id for id, _ in found.top] == row.topk(4).indices.tolist()
        assert [value for _, value in found.top] == pytest.approx(row.topk(4).values.tolist(), abs=1e-4)


# Queue, refusals, failures, shutdown


def test_a_full_queue_refuses_requests_and_serves_those_it_holds(model, monkeypatch):
    engine = Engine(model, 1, "fp32", max_queue=2)
    gate = StepGate(engine, monkeypatch)
    config = GenerationConfig(max_new_tokens=4)
    with engine:
        first = engine.submit([1], config)
        gate.step()  # now it is running, not waiting
        queued = [engine.submit([2], config) for _ in range(2)]
        with pytest.raises(EngineFull, match="2 requests are waiting already"):
            engine.submit([3], config)
        assert engine.stats() == {"waiting": 2, "running": 1, "cached_tokens": 1, "cached_prefix_tokens": 0}
        gate.open()
        assert [len(request.result(60)) for request in (first, *queued)] == [4, 4, 4]


def test_requests_are_served_first_come_first_served(model):
    finished: list[int] = []
    with Engine(model, 1, "fp32") as engine:
        config = GenerationConfig(max_new_tokens=2)
        requests = [
            engine.submit([i], config, on_progress=lambda r, i=i: r.finish_reason and finished.append(i))
            for i in range(20)
        ]
        for request in requests:
            request.result(60)
    assert finished == list(range(20))


def test_many_threads_may_submit(model):
    prompts, configs = random_prompts(60, longest=20), mixed_configs(60)
    with Engine(model, 8, "fp32") as engine, ThreadPoolExecutor(12) as pool:
        completions = list(pool.map(lambda pair: engine.submit(*pair).result(60), zip(prompts, configs, strict=True)))
    assert completions == [generate(model, [p], c)[0] for p, c in zip(prompts, configs, strict=True)]


@pytest.mark.parametrize(("prompt", "message"), [([], "empty"), ([1] * 64, "n_positions is 64"), ([97], "outside")])
def test_a_prompt_that_generate_refuses_is_refused(model, prompt, message):
    with Engine(model, 1, "fp32") as engine, pytest.raises(ValueError, match=message):
        engine.submit(prompt, GenerationConfig())


def test_values_out_of_range_are_refused(model):
    with pytest.raises(ValueError, match="max_batch is 0"):
        Engine(model, 0, "fp32")
    with Engine(model, 1, "fp32") as engine, pytest.raises(ValueError, match="logprobs is 98; it must be from 0 to 97"):
        engine.submit([1], GenerationConfig(), logprobs=98)


def test_a_failed_step_fails_its_requests_only(model, monkeypatch):
    engine = Engine(model, 2, "fp32")

    def fail(*arguments):
        raise RuntimeError("out of memory")

    config = GenerationConfig(max_new_tokens=4)
    with engine:
        with monkeypatch.context() as failing:
            failing.setattr(engine._model, "hidden", fail)
            lost = engine.submit([1], config)
            with pytest.raises(EngineClosed, match="out of memory"):
                lost.result(60)
            with pytest.raises(EngineClosed, match="out of memory"):
                list(lost)
        assert engine.submit([1], config).result(60) == generate(model, [[1]], config)[0]


def test_an_error_outside_of_a_step_ends_all_requests_and_is_visible(model, monkeypatch):
    with Engine(model) as engine:
        assert engine.is_alive
        monkeypatch.setattr(engine._scheduler, "admit", None)  # as if a library panicked
        running = engine.submit([1], GenerationConfig())
        assert running.result(timeout=30) == []
        assert running.finish_reason == "cancelled"
        engine._thread.join(30)
        assert not engine.is_alive
        with pytest.raises(EngineClosed):
            engine.submit([1], GenerationConfig())


def test_closing_cancels_unfinished_requests(model):
    with Engine(model, 1, "fp32") as engine:
        requests = [engine.submit([1], GenerationConfig(max_new_tokens=60)) for _ in range(200)]
    assert all(request.finish_reason is not None for request in requests)
    assert requests[-1].finish_reason == "cancelled"
    with pytest.raises(EngineClosed):
        engine.submit([1], GenerationConfig())


def test_an_engine_that_is_not_started_refuses_requests_instead_of_keeping_them_waiting(model):
    engine = Engine(model, 1, "fp32")
    with pytest.raises(RuntimeError, match="the engine is not started; use `with Engine"):
        engine.submit([1], GenerationConfig())
    engine.close()
    with pytest.raises(EngineClosed, match="the engine is closed"):
        engine.submit([1], GenerationConfig())
