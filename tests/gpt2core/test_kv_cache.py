"""The caches of the engine: rows that move, prompts read in chunks, and shared prefixes."""

import gc
import weakref
from dataclasses import replace

import pytest
import torch

from gpt2core.checkpoint import load_adapter, load_pretrained
from gpt2core.config import GenerationConfig, LoraConfig
from gpt2core.engine import Engine, NonFiniteLogits
from gpt2core.generate import generate
from gpt2core.inference import kv_cache, scheduler
from gpt2core.inference.graphs import RowDecoder
from gpt2core.inference.quantized import QuantizedModel
from gpt2core.inference.request import Request
from gpt2core.inference.runner import ModelRunner
from gpt2core.inference.scheduler import Scheduler
from gpt2core.sampling import Sampler
from tests.gpt2core.decoding import mixed_configs, random_prompts, save_random_adapter
from tests.gpt2core.test_batching import attention_by_sequence
from tests.helpers import wait_until


def decode_all(model, prompts, configs, max_batch: int, static_cache: bool = False) -> list[list[int]]:
    with Engine(model, max_batch, "fp32", static_cache=static_cache) as engine:
        requests = [engine.submit(*pair) for pair in zip(prompts, configs, strict=True)]
        return [request.result(60) for request in requests]


def each_alone(model, prompts, configs) -> list[list[int]]:
    return [generate(model, [prompt], config)[0] for prompt, config in zip(prompts, configs, strict=True)]


@pytest.mark.parametrize("static_cache", [False, True])
def test_a_prompt_read_in_chunks_gives_the_same_completion(model, monkeypatch, static_cache):
    monkeypatch.setattr(scheduler, "PREFILL_TOKENS", 5)
    prompts, configs = random_prompts(10), mixed_configs(10)
    assert decode_all(model, prompts, configs, 4, static_cache) == each_alone(model, prompts, configs)


@pytest.mark.parametrize("static_cache", [False, True])
def test_prompts_read_in_one_attention_call_give_the_same_completions(model, monkeypatch, static_cache):
    """A GPU's variable-length kernel, here in plain torch."""
    monkeypatch.setattr(scheduler, "PREFILL_TOKENS", 50)  # some prompts take two steps
    monkeypatch.setattr(kv_cache, "varlen_attention", attention_by_sequence)
    prompts = [[9] * 20 * (i % 2) + prompt for i, prompt in enumerate(random_prompts(12, 40))]
    configs = mixed_configs(12)
    with Engine(model, 8, "fp32", static_cache=static_cache) as engine:
        engine._runner._use_varlen = True
        for _ in range(2):  # then with cached prefixes
            requests = [engine.submit(*pair) for pair in zip(prompts, configs, strict=True)]
            assert [request.result(60) for request in requests] == each_alone(model, prompts, configs)
        assert engine.stats()["cached_prefix_tokens"] > 0


@pytest.mark.parametrize("max_batch", [1, 3, 16])
def test_rows_at_fixed_addresses_give_the_same_completions(model, monkeypatch, max_batch):
    monkeypatch.setattr(kv_cache.StaticRowCache, "WIDTH", 8)
    prompts, configs = random_prompts(40), mixed_configs(40)
    found = decode_all(model, prompts, configs, max_batch, static_cache=True)
    assert found == decode_all(model, prompts, configs, max_batch) == each_alone(model, prompts, configs)


def test_a_graph_that_cannot_be_captured_is_logged_and_decoding_continues_without(model, monkeypatch, caplog):
    def fail(*arguments):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(RowDecoder, "_capture", fail)
    caplog.set_level("WARNING")
    prompts, configs = random_prompts(6), mixed_configs(6)
    with Engine(model, 4, "fp32", static_cache=True) as engine:
        engine._runner._decoder.uses_graphs = True
        completions = [engine.submit(*pair).result(60) for pair in zip(prompts, configs, strict=True)]
    assert completions == each_alone(model, prompts, configs)
    assert "decoding without: operation not permitted" in caplog.text


def test_a_step_is_started_before_its_tokens_are_read_and_computed_once(model, monkeypatch):
    """One step more is computed only if a request ends before its maximum."""
    steps, outputs = [], RowDecoder._outputs
    monkeypatch.setattr(RowDecoder, "_outputs", lambda *arguments: steps.append(1) or outputs(*arguments))
    for config in (
        GenerationConfig(max_new_tokens=9),
        GenerationConfig(max_new_tokens=9, temperature=0.7, seed=1),
        GenerationConfig(max_new_tokens=9, repetition_penalty=1.3),
        GenerationConfig(max_new_tokens=9, repetition_penalty=1.3, temperature=0.7, top_k=5, seed=2),
    ):
        steps.clear()
        assert decode_all(model, [[1, 2, 3]], [config], 2, True) == each_alone(model, [[1, 2, 3]], [config])
        assert len(steps) == 8  # the first token is the prompt's
    drawn = GenerationConfig(max_new_tokens=9, temperature=2.0, seed=0)
    [completion] = each_alone(model, [[1, 2, 3]], [drawn])
    stop = next(i for i, token in enumerate(completion) if token not in completion[:i] and i > 0)
    steps.clear()
    ending = replace(drawn, eos_id=completion[stop])
    assert decode_all(model, [[1, 2, 3]], [ending], 2, True) == [completion[: stop + 1]]
    assert len(steps) == stop + 1


def test_a_step_ahead_is_not_used_for_requests_that_joined_after_it(model):
    """Also if the only row that it computed has become free."""
    quantized = QuantizedModel(model, "fp32")
    scheduler = Scheduler(quantized, 4, static_cache=True)
    runner = ModelRunner(quantized, scheduler.row_cache)

    def add(prompt, n):
        config = GenerationConfig(n)
        request = Request(prompt, Sampler(config, prompt, quantized.device), n, None, None, None, None)
        scheduler.add(request)
        return request

    def step():
        scheduler.admit()
        if (now := scheduler.next_step()) is not None:
            with torch.inference_mode():
                scheduler.complete_step(now, runner.run(now))

    [expected] = each_alone(model, [[1, 2]], [GenerationConfig(9)])
    first = add([1, 2], 9)
    while len(first.tokens) < 3:
        step()
    assert runner._decoder._ahead is not None
    first.cancel()  # its step ahead stays
    others = [add([3, 4, i], 6) for i in range(3)]
    step()  # reads the prompts, without rows
    others[0].cancel()
    while not all(request.finish_reason for request in others):
        step()
    assert first.tokens == expected[: len(first.tokens)]
    config = GenerationConfig(6)
    assert [r.tokens for r in others[1:]] == each_alone(model, [[3, 4, 1], [3, 4, 2]], [config, config])


def test_with_log_probabilities_no_step_is_started_early(model):
    """They are computed from logits that the next step overwrites on a GPU."""
    with Engine(model, 4, "fp32", static_cache=True) as engine:
        config = GenerationConfig(max_new_tokens=9)
        requests = [engine.submit([1, 2, 3], config, logprobs=None if i else 2) for i in range(3)]
        for request in requests:
            request.result(60)
        assert engine._runner._decoder._ahead is None


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_a_request_that_failed_does_not_affect_the_next_one_in_its_row(model, temperature):
    """Its keys and values are NaN, also in the column that was computed ahead, and its token is not an id."""
    model.wpe.weight.data[40] = 3e38
    good, bad_config = GenerationConfig(max_new_tokens=20), GenerationConfig(50, temperature=temperature, seed=0)
    with Engine(model, 1, "fp32", static_cache=True) as engine:
        expected = engine.submit([5, 6], good).result(60)
        with pytest.raises(NonFiniteLogits):
            engine.submit([5, 6], bad_config).result(60)
        assert engine.submit([5, 6], good).result(60) == expected
    with Engine(model, 3, "fp32", static_cache=True) as engine:  # rows move when half of them are free
        bad = [engine.submit([7, 8, 9], bad_config) for _ in range(2)]
        assert engine.submit([5, 6], good).result(60) == expected
        for request in bad:
            with pytest.raises(NonFiniteLogits):
                request.result(60)


def test_moving_rows_when_columns_run_out_does_not_change_completions(model, monkeypatch):
    monkeypatch.setattr(kv_cache.AlignedRowCache, "SPARE", 3)
    prompts, configs = random_prompts(30), mixed_configs(30)
    assert decode_all(model, prompts, configs, 5) == each_alone(model, prompts, configs)


def test_a_shared_prefix_is_cached_and_does_not_change_completions(model):
    begin = random_prompts(1, seed=5)[0] * 40
    config = GenerationConfig(max_new_tokens=6)
    with Engine(model, 4, "fp32") as engine:
        for tail in ([1], [2, 3], [4], [1]):
            prompt = begin[:40] + tail
            assert engine.submit(prompt, config).result(60) == generate(model, [prompt], config)[0]
        assert engine.stats()["cached_prefix_tokens"] == 40  # whole blocks


def test_the_prefix_cache_stays_within_its_memory_limit(model, monkeypatch):
    block = 2 * 2 * 2 * kv_cache.BLOCK * 16 * 4  # n_layer, keys and values, heads, tokens, D, bytes
    monkeypatch.setattr(scheduler, "PREFIX_BYTES", 3 * block)
    with Engine(model, 4, "fp32") as engine:
        for prompt in random_prompts(8):
            engine.submit(prompt, GenerationConfig(max_new_tokens=1)).result(60)
        assert engine.stats()["cached_prefix_tokens"] == 3 * kv_cache.BLOCK
        assert engine._scheduler._prefix_cache._bytes == 3 * block


@pytest.mark.parametrize("static_cache", [False, True])
def test_an_unloaded_adapter_leaves_the_prefix_cache_and_memory(tiny_gpt2_dir, model, tmp_path, static_cache):
    directory = save_random_adapter(load_pretrained(tiny_gpt2_dir), LoraConfig(), 1, tmp_path)
    tuned = load_adapter(load_pretrained(tiny_gpt2_dir), directory)
    config, prompt = GenerationConfig(max_new_tokens=20), random_prompts(1, seed=5)[0] * 2
    with Engine(model, 4, "fp32", static_cache=static_cache) as engine:
        engine.load_adapter("x", directory)
        adapter = weakref.ref(engine._adapters["x"])
        running = engine.submit(prompt[:40], config, "x")
        engine.unload_adapter("x")
        assert running.result(60) == generate(tuned, [prompt[:40]], config)[0]
        del running
        wait_until(lambda: gc.collect() >= 0 and adapter() is None, 60, "freeing the adapter")
        assert engine.stats()["cached_prefix_tokens"] == 0


def test_a_replaced_adapter_leaves_the_prefix_cache(tiny_gpt2_dir, model, tmp_path):
    directories = [
        save_random_adapter(load_pretrained(tiny_gpt2_dir), LoraConfig(), seed, tmp_path / str(seed)) for seed in (1, 2)
    ]
    config, prompt = GenerationConfig(max_new_tokens=5), [7] * 40
    with Engine(model, 4, "fp32") as engine:
        for directory in directories:
            engine.load_adapter("x", directory)
            tuned = load_adapter(load_pretrained(tiny_gpt2_dir), directory)
            assert engine.submit(prompt, config, "x").result(60) == generate(tuned, [prompt], config)[0]
        wait_until(lambda: engine.stats()["cached_prefix_tokens"] == 32, 60, "dropping the old adapter's prefixes")


def test_reserved_rows_are_lazily_allocated(model):
    with Engine(model, 1000, "fp32") as engine:
        engine.submit([1] * 8, GenerationConfig(max_new_tokens=40)).result(60)
        kv = engine._scheduler.row_cache.kv
    assert kv.nbytes > 100 * 2**20
    assert not kv[:, 1:].any()  # zeros from `lazy_zeros`, whose memory use `test_kernels.py` checks
