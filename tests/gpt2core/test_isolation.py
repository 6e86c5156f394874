"""Requests cannot influence each other through adapters, caches, activations or sampling."""

import hashlib
import json
from dataclasses import replace
from random import Random

import pytest
import torch
from safetensors.torch import load_file, save_file

from gpt2core.adapter_files import read_adapter
from gpt2core.checkpoint import load_pretrained, save_adapter
from gpt2core.config import GenerationConfig, GPT2Config, LoraConfig
from gpt2core.engine import Engine, NonFiniteLogits
from gpt2core.generate import generate
from gpt2core.inference import kv_cache, native
from gpt2core.inference.adapters import AdapterStack, make_adapter
from gpt2core.inference.kv_cache import AlignedRowCache, PrefillCache, RowCache, StaticRowCache
from gpt2core.inference.quantized import QuantizedModel, supported_formats
from gpt2core.inference.request import Request
from gpt2core.lora import add_lora, lora_layers
from gpt2core.model import GPT2
from gpt2core.sampling import Sampler
from tests.gpt2core.conftest import TINY
from tests.gpt2core.decoding import mixed_configs, random_prompts, save_random_adapter

CPU = torch.device("cpu")
FORMATS = supported_formats(GPT2Config(**TINY), CPU)


@pytest.fixture
def good(tiny_gpt2_dir, tmp_path):
    return save_random_adapter(load_pretrained(tiny_gpt2_dir), LoraConfig(), 1, tmp_path / "good")


@pytest.fixture
def overflowing(tiny_gpt2_dir, tmp_path):
    """An adapter whose weights are finite and whose products overflow, for its own rows and for those of others."""
    model = add_lora(load_pretrained(tiny_gpt2_dir), LoraConfig(rank=4, alpha=4.0, targets=("q", "v", "fc")), 0)
    for _, layer in lora_layers(model):
        layer.lora_A.data.fill_(3e38)
        layer.lora_B.data.fill_(3e38)
    return save_adapter(model, tmp_path / "overflowing")


def damage(directory, value: float):
    """Put the value into one weight of a saved adapter, and adjust the digest."""
    file, description = directory / "adapter.safetensors", directory / "adapter.json"
    tensors = load_file(file)
    next(tensor for name, tensor in tensors.items() if name.endswith("lora_B")).view(-1)[3] = value
    save_file(tensors, file)
    values = json.loads(description.read_text()) | {"sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
    description.write_text(json.dumps(values))
    return directory


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_an_adapter_with_a_non_finite_weight_is_refused(model, good, value):
    damage(good, value)
    with Engine(model, 2, "fp32") as engine:
        with pytest.raises(ValueError, match="NaN or infinite values"):
            engine.load_adapter("x", good)
        assert engine.adapters == []


def test_an_adapter_that_overflows_when_scaled_is_refused(tiny_gpt2_dir, model, tmp_path):
    lora = LoraConfig(rank=1, alpha=1e38)
    directory = save_random_adapter(load_pretrained(tiny_gpt2_dir), lora, 0, tmp_path, spread=1e3)
    with (
        Engine(model, 2, "fp32") as engine,
        pytest.raises(ValueError, match=r"h\.0\.attn\.c_attn, scaled by 1e\+38 as float32"),
    ):
        engine.load_adapter("x", directory)


@pytest.mark.parametrize("weights", FORMATS)
def test_an_overflowing_adapter_ends_its_own_requests_and_changes_no_other(model, good, overflowing, weights):
    prompts, configs = random_prompts(16, seed=3), mixed_configs(16)
    adapters = [(None, "good")[i % 2] for i in range(16)]

    def neighbors(engine: Engine, beside: str | None) -> list:
        """Completions and log probabilities, with a request to another adapter before each."""
        requests = []
        for prompt, config, adapter in zip(prompts, configs, adapters, strict=True):
            if beside:
                bad = engine.submit(prompt, replace(config, max_new_tokens=20), beside, logprobs=1)
                failed.append(bad)
            requests.append(engine.submit(prompt, config, adapter, logprobs=2))
        return [(request.result(60), request.finish_reason) for request in requests]

    failed: list[Request] = []
    with Engine(model, 6, weights) as engine:
        engine.load_adapter("good", good)
        before = neighbors(engine, None)
        engine.load_adapter("bad", overflowing)
        during = neighbors(engine, "bad")
        for request in failed:
            with pytest.raises(NonFiniteLogits, match="NaN or infinite"):
                request.result(60)
            assert request.finish_reason == "error"
            assert isinstance(request.error, NonFiniteLogits)
            assert request.tokens == []
        engine.unload_adapter("bad")
        after = neighbors(engine, None)
    assert before == during == after


def test_a_row_is_the_same_beside_rows_of_an_overflowing_adapter(model, good, overflowing):
    """The stack of adapters alone, bit for bit, against the stack with the overflowing adapter replaced by zeros."""
    own, bad = (
        make_adapter(model.config, *read_adapter(directory, model.config), torch.float32, CPU)
        for directory in (good, overflowing)
    )
    zero = replace(bad, matrices={key: (0 * a, 0 * b) for key, (a, b) in bad.matrices.items()})
    x = torch.randn(6, 32, generator=torch.Generator().manual_seed(0))

    def products(other):
        rows = AdapterStack([own, other], CPU).for_rows([own, other, None, own, other, None])
        y = torch.zeros(6, 96)
        rows.add_delta_(y, 0, "attn.c_attn", x)
        return y

    beside_bad, beside_zero = products(bad), products(zero)
    assert not beside_bad[[1, 4]].isfinite().any(1).all()
    assert torch.equal(beside_bad[[0, 2, 3, 5]], beside_zero[[0, 2, 3, 5]])


@pytest.mark.parametrize("weights", FORMATS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_non_finite_row_of_activations_changes_no_other_row(model, weights, value):
    whole = QuantizedModel(model, weights)
    ids = torch.arange(5)
    hidden = whole.hidden(ids, ids).detach()
    expected = whole.logits(hidden)
    hidden[2] = value
    kept = torch.tensor([0, 1, 3, 4])
    assert torch.equal(whole.logits(hidden)[kept], expected[kept])


def test_int8_is_tested_where_the_processor_has_it():
    assert ("int8" in FORMATS) == (native.library_name() is not None)


CONFIG = GPT2Config(n_layer=1, n_head=2, n_embd=8, n_positions=64, vocab_size=11)


# The rows move to lower columns, the bad request in row 2 ends, and another one joins there over its old columns.
MOVED_AND_JOINED_AGAIN = [
    ("add", 12, False), ("add", 2, False), ("add", 2, True), ("steps", 3, False), ("remove", 0, False),
    ("steps", 1, False), ("remove", 2, False), ("steps", 5, False),
    ("add", 2, False), ("add", 1, False), ("steps", 1, False),
]  # fmt: skip


def random_operations(seed: int) -> list[tuple[str, int, bool]]:
    """What may happen to the rows of a cache: (operation, its number, whether a new request is bad)."""
    random = Random(seed)
    kinds = random.choices(("add", "steps", "remove", "fail"), weights=(6, 6, 5, 1), k=80)
    largest = {"add": 12, "steps": 6, "remove": 3, "fail": 0}
    return [(kind, random.randint(0, largest[kind]), random.random() < 0.5) for kind in kinds]


def begin_step(cache: RowCache) -> None:
    if isinstance(cache, StaticRowCache):
        cache.begin_step(torch.tensor(cache.lengths), cache.shape()[1])
    else:
        cache.begin_step()


def row_outputs(
    operations: list[tuple[str, int, bool]], poison: float, kind_of_cache=AlignedRowCache
) -> list[torch.Tensor]:
    """Attention of all requests that are not bad, after the operations; bad ones have `poison` as keys and values."""
    generator, cache, bad, outputs = (
        torch.Generator().manual_seed(0),
        kind_of_cache(CONFIG, torch.float32, CPU, 4),
        set(),
        [],
    )

    def qkv(n: int, is_bad: bool) -> torch.Tensor:
        values = torch.randn(n, 3, 2, 4, generator=generator)
        return values.fill_(poison) if is_bad else values

    for kind, n, is_bad in operations:
        if kind == "add" and n and cache.n_active < 4:
            request = Request([0] * n, Sampler(GenerationConfig(), [0] * n, CPU), 99, None, None, None, None)
            prefill = PrefillCache(request, CONFIG, torch.float32, CPU, [])
            prefill.attend(0, qkv(n, is_bad), 1.0)
            prefill.advance(n)
            cache.add(prefill)
            if is_bad:
                bad.add(request)
        elif kind == "steps":
            for _ in range(n):
                cache.compact()
                if not cache.requests:
                    break
                begin_step(cache)
                y = cache.attend(0, torch.cat([qkv(1, request in bad) for request in cache.requests]), 1.0)
                cache.end_step()
                outputs += [y[row] for row, r in enumerate(cache.requests) if r is not None and r not in bad]
        elif kind == "remove" and n < len(cache.requests):
            cache.remove(n)
        elif kind == "fail":  # in the middle of a step
            if cache.requests:
                begin_step(cache)
                cache.attend(0, torch.cat([qkv(1, request in bad) for request in cache.requests]), 1.0)
            cache.clear()
    return outputs


@pytest.mark.parametrize("cache", [AlignedRowCache, StaticRowCache])
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_non_finite_keys_and_values_reach_no_other_row_whatever_rows_do(monkeypatch, poison, cache):
    monkeypatch.setattr(kv_cache.AlignedRowCache, "SPARE", 3)
    monkeypatch.setattr(kv_cache.AlignedRowCache, "ALIGN", 4)
    for operations in (MOVED_AND_JOINED_AGAIN, *map(random_operations, range(40))):
        outputs, expected = row_outputs(operations, poison, cache), row_outputs(operations, 0.5, cache)
        assert all(torch.equal(found, exact) for found, exact in zip(outputs, expected, strict=True))


def test_an_error_while_sampling_ends_that_request_alone(model, monkeypatch):
    process = Sampler.process

    def failing(sampler, logits, completion):
        if sampler.config.seed == 666:
            raise RuntimeError("no token can be drawn")
        process(sampler, logits, completion)

    monkeypatch.setattr(Sampler, "process", failing)
    configs = [
        GenerationConfig(max_new_tokens=12, temperature=0.8, presence_penalty=0.5, seed=seed) for seed in (1, 666, 2)
    ]
    with Engine(model, 4, "fp32") as engine:
        first, lost, last = (engine.submit([1, 2], config) for config in configs)
        with pytest.raises(RuntimeError, match="no token can be drawn"):
            lost.result(60)
        with pytest.raises(RuntimeError, match="no token can be drawn"):
            list(lost)
        assert [first.result(60)] == generate(model, [[1, 2]], configs[0])
        assert [last.result(60)] == generate(model, [[1, 2]], configs[2])


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_generate_raises_on_non_finite_logits(model, temperature):
    model.ln_f.weight.data[0] = float("nan")
    with pytest.raises(NonFiniteLogits):
        generate(model, [[1]], GenerationConfig(temperature=temperature))


# An embedding with more rows than the tokenizer has tokens


@pytest.fixture
def padded():
    """A model of 90 tokens and 97 rows whose largest logit is always that of row 93."""
    config = GPT2Config(n_layer=2, n_head=2, n_embd=32, n_positions=64, vocab_size=97, n_tokens=90)
    model = GPT2(config, torch.Generator().manual_seed(0)).eval()
    model.ln_f.bias.data.fill_(1.0)
    model.wte.weight.data[93] = 2.0
    assert model(torch.tensor([[1, 2, 3]]))[0].argmax(-1).eq(93).all()
    return model


@pytest.mark.parametrize("config", [GenerationConfig(), GenerationConfig(temperature=5.0, seed=0, top_p=0.99)])
@pytest.mark.parametrize("weights", FORMATS)
def test_rows_without_a_token_are_never_generated_and_get_no_logprobs(padded, config, weights):
    prompt = [1, 2, 3]
    [expected] = generate(padded, [prompt], config)
    assert max(expected) < 90
    with Engine(padded, 2, weights) as engine:
        request = engine.submit(prompt, config, logprobs=90)
        completion = request.result(60)
        with pytest.raises(ValueError, match="logprobs is 91; it must be from 0 to 90"):
            engine.submit(prompt, config, logprobs=91)
    assert max(completion) < 90
    if weights == "fp32":
        assert completion == expected
    for one in request.logprobs:
        assert sorted(id for id, _ in one.top) == list(range(90))
        assert sum(torch.tensor([value for _, value in one.top]).exp()) == pytest.approx(1, abs=1e-3)


def test_the_format_check_ignores_rows_without_a_token(padded):
    assert Engine(padded, 2, "auto").weights in FORMATS
