"""The engine against `generate`, which is plain and slow: whatever else runs, each reply is what it is alone."""

import gc
import os
import subprocess
import sys
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from time import monotonic, sleep

import pytest
import torch

from gpt2core import engine
from gpt2core.checkpoint import load_adapter, load_pretrained, save_adapter, save_pretrained
from gpt2core.config import GenerationConfig, GPT2Config, LoraConfig
from gpt2core.data import Example
from gpt2core.engine import Engine, EngineFull
from gpt2core.generate import generate
from gpt2core.inference import kv_cache as caches
from gpt2core.inference import quantized as packed
from gpt2core.inference.quantized import PackedModel, pack_fastest
from gpt2core.inference.request import EngineClosed
from gpt2core.lora import add_lora, merge_lora
from gpt2core.metrics import perplexity
from gpt2core.model import GPT2
from gpt2core.train import token_losses

FORMATS = ("fp32", "bf16", "int8")


@pytest.fixture
def model(tiny_gpt2_dir):
    return load_pretrained(tiny_gpt2_dir)


def random_prompts(n: int, longest: int = 63, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest + 1, (n,), generator=generator).tolist()
    return [torch.randint(97, (length,), generator=generator).tolist() for length in lengths]


def mixed(n: int) -> list[GenerationConfig]:
    """Greedy and sampled in turn, of many lengths, some with an end."""
    return [
        GenerationConfig(max_new_tokens=1 + i * 7 % 23, temperature=(i % 3) * 0.6, top_p=0.9, seed=i, eos_id=i % 97)
        for i in range(n)
    ]


def save_random_adapter(model: GPT2, config: LoraConfig, seed: int, directory):
    add_lora(model, config, seed)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B"):
            parameter.data.normal_(0, 0.3, generator=generator)
    return save_adapter(model, directory)


@pytest.mark.parametrize("max_batch", [1, 3, 16])
def test_requests_that_join_and_leave_get_what_generate_gives_each_alone(model, max_batch):
    prompts, configs = random_prompts(40), mixed(40)
    with Engine(model, max_batch, "fp32") as running:
        requests = [running.submit(*pair) for pair in zip(prompts, configs, strict=True)]
        replies = [request.result(60) for request in requests]
    expected = [generate(model, [prompt], config)[0] for prompt, config in zip(prompts, configs, strict=True)]
    assert replies == expected
    for request, reply, config in zip(requests, replies, configs, strict=True):
        assert request.finish_reason == ("stop" if reply[-1] == config.eos_id else "length")


@pytest.mark.parametrize("weights", FORMATS)
def test_a_neighbour_never_changes_a_reply_in_any_format(model, weights):
    prompts, configs = random_prompts(12), mixed(12)
    with Engine(model, 8, weights) as running:
        together = [running.submit(*pair) for pair in zip(prompts, configs, strict=True)]
        together = [request.result(60) for request in together]
    alone = []
    for pair in zip(prompts, configs, strict=True):
        with Engine(model, 1, weights) as running:
            alone.append(running.submit(*pair).result(60))
    assert together == alone


def test_a_long_prompt_is_read_in_parts_while_others_go_on(model, monkeypatch):
    monkeypatch.setattr(engine, "PREFILL_TOKENS", 5)
    prompts, configs = random_prompts(10), mixed(10)
    with Engine(model, 4, "fp32") as running:
        replies = [running.submit(*pair) for pair in zip(prompts, configs, strict=True)]
        replies = [request.result(60) for request in replies]
    assert replies == [generate(model, [p], c)[0] for p, c in zip(prompts, configs, strict=True)]


def test_rows_are_moved_when_the_cache_is_full_and_the_replies_stay(model, monkeypatch):
    monkeypatch.setattr(caches.Rows, "SPARE", 3)
    prompts, configs = random_prompts(30), mixed(30)
    with Engine(model, 5, "fp32") as running:
        replies = [running.submit(*pair) for pair in zip(prompts, configs, strict=True)]
        replies = [request.result(60) for request in replies]
    assert replies == [generate(model, [p], c)[0] for p, c in zip(prompts, configs, strict=True)]


def test_prompts_that_begin_alike_are_read_from_where_they_part(model):
    begin = random_prompts(1, seed=5)[0] * 40
    config = GenerationConfig(max_new_tokens=6)
    with Engine(model, 4, "fp32") as running:
        for tail in ([1], [2, 3], [4], [1]):
            prompt = begin[:40] + tail
            assert running.submit(prompt, config).result(60) == generate(model, [prompt], config)[0]
        assert running.stats()["cached_prefix_tokens"] == 32


def test_the_cache_of_beginnings_stays_within_its_bytes(model, monkeypatch):
    block = 2 * 2 * 2 * 16 * 16 * 4  # n_layer, keys and values, heads, tokens, D, bytes
    monkeypatch.setattr(engine, "PREFIX_BYTES", 3 * block)
    with Engine(model, 4, "fp32") as running:
        for prompt in random_prompts(8):
            running.submit(prompt, GenerationConfig(max_new_tokens=1)).result(60)
        assert running.stats()["cached_prefix_tokens"] <= 3 * 16


def test_every_request_goes_through_its_own_adapter(tiny_gpt2_dir, model, tmp_path):
    loras = {
        "a": LoraConfig(rank=2),
        "b": LoraConfig(rank=3, alpha=5.0, targets=("k", "proj", "fc")),
        "c": LoraConfig(rank=1, targets=("q", "k", "v", "o", "fc", "proj")),
    }
    tuned = {None: model}
    for seed, (name, lora) in enumerate(loras.items()):
        directory = save_random_adapter(load_pretrained(tiny_gpt2_dir), lora, seed, tmp_path / name)
        tuned[name] = load_adapter(load_pretrained(tiny_gpt2_dir), directory)
    prompts, configs = random_prompts(24), mixed(24)
    names = [list(tuned)[i % 4] for i in range(24)]
    with Engine(model, 6, "fp32") as running:
        for name in loras:
            running.load_adapter(name, tmp_path / name)
        requests = [running.submit(p, c, name) for p, c, name in zip(prompts, configs, names, strict=True)]
        replies = [request.result(60) for request in requests]
        one_alone = running.submit(prompts[0], configs[0], "c").result(60)
    expected = [generate(tuned[n], [p], c)[0] for p, c, n in zip(prompts, configs, names, strict=True)]
    assert replies == expected
    assert one_alone == generate(tuned["c"], [prompts[0]], configs[0])[0]
    assert len({tuple(generate(tuned[n], [prompts[1]], GenerationConfig())[0]) for n in tuned}) == 4


def test_an_adapter_put_in_place_of_another_answers_new_requests_and_none_that_has_begun(
    tiny_gpt2_dir, model, tmp_path
):
    first, second = (
        save_random_adapter(load_pretrained(tiny_gpt2_dir), LoraConfig(), seed, tmp_path / str(seed)) for seed in (1, 2)
    )
    config, prompt = GenerationConfig(max_new_tokens=40), [1, 2, 3]
    wanted = [generate(load_adapter(load_pretrained(tiny_gpt2_dir), d), [prompt], config)[0] for d in (first, second)]
    with Engine(model, 4, "fp32") as running:
        running.load_adapter("x", first)
        begun = running.submit(prompt, config, "x")
        next(iter(begun))
        running.load_adapter("x", second)
        assert running.submit(prompt, config, "x").result(60) == wanted[1]
        running.unload_adapter("x")
        assert begun.result(60) == wanted[0]
        assert running.adapters == []
        with pytest.raises(ValueError, match="no adapter is called 'x'; loaded: none"):
            running.submit(prompt, config, "x")
    assert wanted[0] != wanted[1]


@pytest.mark.parametrize("weights", FORMATS)
def test_an_engine_does_not_keep_the_model_it_was_made_of(tiny_gpt2_dir, weights):
    model = load_pretrained(tiny_gpt2_dir)
    layers = [weakref.ref(layer) for layer in model.modules()]
    running = Engine(model, 2, weights)
    del model
    gc.collect()
    assert [layer() for layer in layers if layer() is not None] == []
    assert running.packed.weights == weights


def test_rows_that_nobody_uses_take_no_memory(model):
    if not Path("/proc/self/statm").exists():
        pytest.skip("what memory a process uses is not told here")

    def used() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    before = used()
    with Engine(model, 1000, "fp32") as running:
        running.submit([1] * 8, GenerationConfig(max_new_tokens=40)).result(60)
        assert running._rows.kv.nbytes > 100 * 2**20
        assert used() - before < 50 * 2**20


COUNT_THREADS = """
import os, sys, time, torch
from concurrent.futures import ThreadPoolExecutor
from gpt2core.checkpoint import load_pretrained
from gpt2core.config import GenerationConfig
from gpt2core.engine import Engine
torch.set_num_threads(2)

def more_threads(expected):  # than at the beginning; those that have ended are not gone at once
    last = time.monotonic() + 5
    while (more := len(os.listdir("/proc/self/task")) - n_threads) != expected and time.monotonic() < last:
        time.sleep(0.01)
    return more

def compute():
    torch.rand(512, 512) @ torch.rand(512, 512)

running = Engine(load_pretrained(sys.argv[1]), 1, "fp32")
with ThreadPoolExecutor(1) as pool:  # whose thread lives on, as that of a server does
    pool.submit(int).result()
    compute()
    running.submit([1], GenerationConfig())
    time.sleep(1)
    n_threads = len(os.listdir("/proc/self/task"))
    pool.submit(running.load_adapter, "x", sys.argv[2]).result()
    loaded = more_threads(0)
    compute()
    computed = more_threads(1)
    running.submit([1], GenerationConfig())
    print(loaded, computed, more_threads(0))
"""


def test_who_loads_and_who_asks_keep_no_workers_that_would_slow_down_every_step(tmp_path):
    if engine._openmp() is None:
        pytest.skip("torch does not compute with GNU's OpenMP here")
    config = GPT2Config(vocab_size=97, n_positions=64, n_embd=128, n_layer=1, n_head=4)
    base = save_pretrained(GPT2(config), tmp_path / "base")
    adapter = save_random_adapter(GPT2(config), LoraConfig(rank=128), 0, tmp_path / "adapter")  # worth two threads
    command = [sys.executable, "-c", COUNT_THREADS, str(base), str(adapter)]
    assert subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout == "0 1 0\n"


@pytest.mark.parametrize("merged", [True, False])
def test_a_models_own_adapter_is_taken_as_merged(tiny_gpt2_dir, tmp_path, merged):
    directory = save_random_adapter(load_pretrained(tiny_gpt2_dir), LoraConfig(), 1, tmp_path)
    tuned = load_adapter(load_pretrained(tiny_gpt2_dir), directory)
    config = GenerationConfig(max_new_tokens=20)
    expected = generate(tuned, [[1, 2]], config)[0]
    with Engine(merge_lora(tuned) if merged else tuned, 2, "fp32") as running:
        assert running.submit([1, 2], config).result(60) == expected


def test_tokens_come_one_by_one_and_are_told_of(model):
    told: list[int] = []
    with Engine(model, 2, "fp32") as running:
        config = GenerationConfig(max_new_tokens=9)
        request = running.submit([1, 2], config, on_progress=lambda r: told.append(len(r.tokens)))
        tokens = list(request)
        assert tokens == request.result(0) == generate(model, [[1, 2]], config)[0]
        assert list(request) == tokens  # again, from the start
    assert told == list(range(1, 10))
    assert request.submitted_at <= request.first_token_at <= monotonic()


def test_a_listener_that_raises_costs_nobody_a_reply(model):
    config = GenerationConfig(max_new_tokens=9)
    with Engine(model, 2, "fp32") as running:
        loud = running.submit([1, 2], config, on_progress=lambda r: 1 / 0)
        quiet = running.submit([3], config)
        assert loud.result(60) == generate(model, [[1, 2]], config)[0]
        assert quiet.result(60) == generate(model, [[3]], config)[0]


class Gate:
    """Holds the engine before each step until it is told to go on."""

    def __init__(self, running: Engine, monkeypatch) -> None:
        self.steps, self.go = 0, threading.Semaphore(0)
        step = running._step

        def held() -> None:
            self.go.acquire()
            step()
            self.steps += 1

        monkeypatch.setattr(running, "_step", held)

    def step(self, n: int = 1) -> None:
        wanted = self.steps + n
        for _ in range(n):
            self.go.release()
        while self.steps < wanted:
            sleep(0.001)


@pytest.mark.parametrize("steps_before", [0, 3])
def test_a_cancelled_request_is_out_after_one_step_and_its_place_is_free(model, monkeypatch, steps_before):
    running = Engine(model, 1, "fp32")
    gate = Gate(running, monkeypatch)
    with running:
        long, waits = (running.submit([1], GenerationConfig(max_new_tokens=60)) for _ in range(2))
        gate.step(steps_before)
        long.cancel()
        gate.step()
        gate.step()
        assert long.finish_reason == "cancelled"
        assert len(long.result(5)) <= steps_before + 1
        assert len(waits.tokens) >= 1
        gate.go.release(200)


def test_a_deadline_ends_a_reply_with_what_there_is_of_it(model, monkeypatch):
    running = Engine(model, 1, "fp32")
    gate = Gate(running, monkeypatch)
    with running:
        late = running.submit([1], GenerationConfig(max_new_tokens=60), deadline=monotonic() + 0.2)
        waiting = running.submit([1], GenerationConfig(max_new_tokens=60), deadline=monotonic() + 0.2)
        gate.step(2)
        sleep(0.25)
        gate.go.release(2)
        assert 2 <= len(late.result(5)) <= 3
        assert waiting.result(5) == []
        assert late.finish_reason == waiting.finish_reason == "deadline"
        gate.go.release(200)


def test_result_waits_no_longer_than_it_is_told_and_the_reply_goes_on(model, monkeypatch):
    running = Engine(model, 1, "fp32")
    gate = Gate(running, monkeypatch)
    with running:
        request = running.submit([1], GenerationConfig(max_new_tokens=3))
        with pytest.raises(TimeoutError, match=r"not finished after 0\.01 seconds"):
            request.result(0.01)
        gate.go.release(10)
        assert len(request.result(60)) == 3


def test_a_full_queue_refuses_and_harms_nobody(model, monkeypatch):
    running = Engine(model, 1, "fp32", max_queue=2)
    gate = Gate(running, monkeypatch)
    config = GenerationConfig(max_new_tokens=4)
    with running:
        first = running.submit([1], config)
        gate.step()  # now it runs, and waits no more
        queued = [running.submit([2], config) for _ in range(2)]
        with pytest.raises(EngineFull, match="2 requests wait already"):
            running.submit([3], config)
        gate.go.release(100)
        assert [len(request.result(60)) for request in (first, *queued)] == [4, 4, 4]


def test_first_come_is_first_served(model):
    finished: list[int] = []
    with Engine(model, 1, "fp32") as running:
        config = GenerationConfig(max_new_tokens=2)
        requests = [
            running.submit([i], config, on_progress=lambda r, i=i: r.finish_reason and finished.append(i))
            for i in range(20)
        ]
        for request in requests:
            request.result(60)
    assert finished == list(range(20))


def test_a_step_that_fails_fails_its_requests_and_the_next_ones_are_answered(model, monkeypatch):
    running = Engine(model, 2, "fp32")
    hidden = running.packed.hidden
    monkeypatch.setattr(running.packed, "hidden", lambda *a: (_ for _ in ()).throw(RuntimeError("out of memory")))
    config = GenerationConfig(max_new_tokens=4)
    with running:
        lost = running.submit([1], config)
        with pytest.raises(EngineClosed, match="out of memory"):
            lost.result(60)
        with pytest.raises(EngineClosed, match="out of memory"):
            list(lost)
        monkeypatch.setattr(running.packed, "hidden", hidden)
        assert running.submit([1], config).result(60) == generate(model, [[1]], config)[0]


def test_closing_cancels_what_is_unfinished(model):
    with Engine(model, 1, "fp32") as running:
        requests = [running.submit([1], GenerationConfig(max_new_tokens=60)) for _ in range(200)]
    assert all(request.finish_reason is not None for request in requests)
    assert requests[-1].finish_reason == "cancelled"
    with pytest.raises(EngineClosed):
        running.submit([1], GenerationConfig())


def test_many_threads_may_submit(model):
    prompts, configs = random_prompts(60, longest=20), mixed(60)
    with Engine(model, 8, "fp32") as running, ThreadPoolExecutor(12) as pool:
        replies = list(pool.map(lambda pair: running.submit(*pair).result(60), zip(prompts, configs, strict=True)))
    assert replies == [generate(model, [p], c)[0] for p, c in zip(prompts, configs, strict=True)]


@pytest.mark.parametrize(("prompt", "named"), [([], "empty"), ([1] * 64, "n_positions is 64"), ([97], "outside")])
def test_what_generate_refuses_is_refused(model, prompt, named):
    with Engine(model, 1, "fp32") as running, pytest.raises(ValueError, match=named):
        running.submit(prompt, GenerationConfig())


def logits_of(model: GPT2, weights: str, ids: torch.Tensor) -> torch.Tensor:
    whole = PackedModel(model, weights)
    with torch.inference_mode():
        return whole.logits(whole.hidden(ids, torch.arange(len(ids)), packed.causal(whole)))


@pytest.mark.parametrize(
    ("weights", "atol"),
    [("fp32", 1e-5), ("bf16", 0.06), ("int8", 0.06)],  # logits are about 2; bf16 has 8 bits, int8 7 and a sign
)
def test_packed_weights_give_the_models_logits(model, weights, atol):
    ids = torch.randint(97, (40,), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(logits_of(model, weights, ids), model(ids[None])[0], rtol=0, atol=atol)


@pytest.mark.parametrize("weights", ["bf16", "int8"])
def test_perplexity_of_packed_weights_is_within_a_hundredth(model, weights):
    sequences = [torch.randint(97, (64,), generator=torch.Generator().manual_seed(i)) for i in range(8)]
    plain = perplexity(token_losses(model, [Example(ids.tolist(), 1) for ids in sequences], 8, "all"))
    losses = [
        (float(torch.nn.functional.cross_entropy(logits_of(model, weights, ids)[:-1], ids[1:], reduction="sum")), 63)
        for ids in sequences
    ]
    assert perplexity(losses) == pytest.approx(plain, rel=0.01)


def test_a_row_of_zeros_and_a_row_with_an_outlier_go_through_int8_beside_each_other():
    weight = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))
    linear = packed._pack(weight, torch.ones(8), "int8")
    x = torch.randn(3, 16, generator=torch.Generator().manual_seed(1))
    x[0], x[1, 3] = 0.0, 1e4
    y = linear(x)
    assert torch.equal(y[0], torch.ones(8))
    wanted = x @ weight.T + 1
    assert ((y - wanted).norm(dim=1) <= 0.02 * wanted.norm(dim=1)).all()  # of 127 steps each is half a step off at most
    assert torch.equal(y[2], linear(x[2:])[0])


def test_auto_takes_the_fastest_and_refuses_one_that_would_cost_perplexity(model, monkeypatch, caplog):
    seconds = {"fp32": 3.0, "bf16": 2.0, "int8": 1.0}
    cost = {"bf16": 0.001, "int8": 0.002}
    monkeypatch.setattr(packed, "_step_seconds", lambda whole, n: seconds[whole.weights])
    monkeypatch.setattr(packed, "_perplexity_cost", lambda model, whole: cost[whole.weights])
    assert pack_fastest(model, 16).weights == "int8"
    cost["int8"] = 0.2
    with caplog.at_level("WARNING", "gpt2core.inference.quantized"):
        assert pack_fastest(model, 16).weights == "bf16"
    assert "int8 weights would be faster, but raise perplexity by 20.0 %" in caplog.text
    seconds |= {"bf16": 2.9, "int8": 2.9}  # not worth it
    assert pack_fastest(model, 16).weights == "fp32"


def test_the_cost_in_perplexity_sees_weights_that_int8_cannot_hold():
    config = GPT2Config(vocab_size=97, n_positions=64, n_embd=32, n_layer=2, n_head=2, initializer_range=0.2)
    model = GPT2(config, torch.Generator().manual_seed(0))
    good = packed._perplexity_cost(model, PackedModel(model, "int8"))
    for block in model.h:  # one channel that drowns all others, as large models have it
        block.ln_1.weight.data[3] = block.ln_2.weight.data[3] = 1000.0
        block.attn.c_attn.weight.data[:, 3] = block.mlp.c_fc.weight.data[:, 3] = 1e-4
    assert good < 0.01 < packed._perplexity_cost(model, PackedModel(model, "int8"))


def test_inverse_layer_scaling_and_relu_are_obeyed(tiny_config):
    config = replace(tiny_config, scale_attn_by_inverse_layer_idx=True, activation_function="relu", n_inner=48)
    model = GPT2(config, torch.Generator().manual_seed(3))
    prompt, wanted = [1, 2, 3], GenerationConfig(max_new_tokens=20)
    with Engine(model, 2, "fp32") as running:
        assert running.submit(prompt, wanted).result(60) == generate(model, [prompt], wanted)[0]


def test_logprobs_are_those_of_the_plain_model(model):
    prompt, sampled = [5, 6, 7], GenerationConfig(max_new_tokens=6, temperature=0.9, seed=3)
    with Engine(model, 4, "fp32") as running:
        with_logprobs = running.submit(prompt, sampled, logprobs=4)
        without = running.submit(prompt, sampled)
        reply = with_logprobs.result(60)
        assert without.result(60) == reply
    assert without.logprobs == []
    with torch.inference_mode():
        expected = model(torch.tensor([prompt + reply]))[0, len(prompt) - 1 : -1].log_softmax(-1)
    for token, got, row in zip(reply, with_logprobs.logprobs, expected, strict=True):
        assert got.logprob == pytest.approx(float(row[token]), abs=1e-4)
        assert [id for id, _ in got.top] == row.topk(4).indices.tolist()
        assert [value for _, value in got.top] == pytest.approx(row.topk(4).values.tolist(), abs=1e-4)
