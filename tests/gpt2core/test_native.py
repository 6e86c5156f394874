"""The int8 kernels: compiled where they can be, right, and independent of what else a step computes."""

import copy
import platform
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt2core import sampling
from gpt2core.config import GenerationConfig, GPT2Config, LoraConfig
from gpt2core.engine import Engine
from gpt2core.inference import kv_cache, native, scheduler
from gpt2core.inference.adapters import Adapter, make_adapter
from gpt2core.inference.quantized import QuantizedModel
from gpt2core.kernels import has_onednn_int8
from gpt2core.lora import add_lora, lora_layers
from gpt2core.model import GPT2
from tests.gpt2core.decoding import mixed_configs, random_prompts, save_random_adapter

CPU = torch.device("cpu")
CONFIG = GPT2Config(vocab_size=97, n_positions=64, n_embd=64, n_layer=2, n_head=2, initializer_range=0.2)
needs_compiler = pytest.mark.skipif(
    (platform.system(), platform.machine()) != ("Linux", "x86_64"), reason="the kernels are for Linux on x86-64"
)
needs_kernels = pytest.mark.usefixtures("library")
SUPPORTED = [name for name, suits in native.LIBRARIES.items() if suits()]


@pytest.fixture(scope="module", params=SUPPORTED)
def library(request) -> Iterator[str]:
    """Each library that this processor supports."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(native, "library_name", lambda: request.param)
        yield request.param


@needs_compiler
def test_the_installation_compiled_the_kernels():
    assert native.library_files().keys() == native.LIBRARIES.keys(), "pip install --verbose -e . shows why"


@needs_compiler
def test_the_fastest_compiled_library_for_the_processor_is_used(monkeypatch, caplog):
    avx512, avx2 = native.LIBRARIES
    compiled = native.library_files()
    choose = native.library_name.__wrapped__  # without its cache
    monkeypatch.setattr(native, "LIBRARIES", dict.fromkeys((avx512, avx2), lambda: True))
    assert choose() == avx512
    monkeypatch.setattr(native, "library_files", lambda: {avx2: compiled[avx2]})
    assert choose() == avx2
    monkeypatch.setattr(native, "INTERFACE", 0)
    assert choose() is None
    assert "the int8 kernels are missing or outdated" in caplog.text
    caplog.clear()
    monkeypatch.setattr(native, "LIBRARIES", dict.fromkeys((avx512, avx2), lambda: False))
    assert choose() is None
    assert caplog.text == ""


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def quantized_product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """What Int8Linear computes, in fp64 by torch."""
    scale = weight.abs().amax(1, keepdim=True) / 127
    low, high = x.amin(1, keepdim=True).clamp(max=0), x.amax(1, keepdim=True).clamp(min=0)
    step = (high - low) / 255
    zero = (-low / step + 0.5).floor()
    q = (x / step + zero).round().clamp(0, 255) - zero
    return (q.double() * step) @ ((weight / scale).round().double() * scale).T + bias


@needs_kernels
@settings(max_examples=30, deadline=None)
@given(n=st.integers(1, 40), n_in=st.sampled_from([16, 64, 208]), n_out=st.integers(1, 150), seed=st.integers(0, 99))
def test_a_product_is_the_exact_one_of_the_quantized_operands(n, n_in, n_out, seed):
    x, weight, bias = random(n, n_in, seed=seed), random(n_out, n_in, seed=seed + 1), random(n_out, seed=seed + 2)
    linear = native.Int8Linear(weight, bias, native.Scratch(n_in, n_in))
    expected = quantized_product(x, weight, bias)
    # a value halfway between two steps may be rounded either way: one step of one weight
    atol = 1e-4 + float(weight.abs().max() * (x.amax() - x.amin()) / 255)
    torch.testing.assert_close(linear(x).double(), expected, rtol=1e-5, atol=atol)
    norm = SimpleNamespace(weight=random(n_in, seed=seed + 3), bias=random(n_in, seed=seed + 4), eps=1e-5)
    normed = F.layer_norm(x, (n_in,), norm.weight, norm.bias, norm.eps)
    exact = normed.double() @ weight.double().T + bias
    tolerance = 0.03 * float(exact.abs().max() + normed.norm(dim=1).max() * weight.norm(dim=1).max())
    torch.testing.assert_close(linear(x, norm).double(), exact, rtol=0, atol=tolerance)


@needs_kernels
def test_a_row_has_the_same_bits_alone_and_among_others():
    weight, bias, x = random(130, 64), random(130), random(23, 64)
    x[3], x[5, 7], x[11, 0] = 0.0, 1e30, float("nan")
    linear = native.Int8Linear(weight, bias, native.Scratch(64, 64))
    norm = SimpleNamespace(weight=random(64), bias=random(64), eps=1e-5)
    for options in ({}, {"norm": norm}):
        together = linear(x, **options)
        for n in range(1, 9):
            parts = [linear(part.contiguous(), **options) for part in x.split(n)]
            assert torch.equal(torch.cat(parts).nan_to_num(7.0), together.nan_to_num(7.0))
    assert torch.equal(linear(x)[3], bias)
    assert linear(x)[11].isnan().all()
    assert linear(torch.full((1, 64), float("inf"))).isnan().all()


def spread_model(n_embd: int = 64, n_head: int = 2) -> GPT2:
    """A model whose biases and norms are random too."""
    config = replace(CONFIG, n_embd=n_embd, n_head=n_head)
    model, generator = GPT2(config, torch.Generator().manual_seed(0)).eval(), torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def hidden_states(model: GPT2, ids: torch.Tensor) -> torch.Tensor:
    """(N, C) before the last norm, by the model itself."""
    model.ln_f = torch.nn.Identity()
    return model.hidden(ids[None])[0]


@needs_kernels
@pytest.mark.parametrize(("width", "n_head"), [*((width, 3) for width in native.HEAD_WIDTHS), (16, 17)])
@torch.inference_mode()
def test_the_layers_are_the_models_and_do_not_depend_on_how_a_prompt_is_divided(width, n_head):
    model, ids = spread_model(n_head * width, n_head), torch.arange(40)
    whole, expected = QuantizedModel(model, "int8"), hidden_states(model, ids)
    together = whole.hidden(ids, ids)
    assert whole.is_native
    assert (together - expected).norm() < 0.08 * expected.norm()  # as far as int8 by torch
    kv, parts = whole._new_cache(40), []
    for start, end in pairwise([0, 7, 8, 9, 34, 40]):
        parts.append(whole.hidden(ids[start:end], ids[start:end], [native.span(kv, start, end - start)]))
    assert torch.equal(torch.cat(parts), together)


@needs_kernels
@torch.inference_mode()
def test_keys_and_values_are_stored_with_127_steps_and_a_scale_for_each_token_and_head():
    model, ids = spread_model(), torch.arange(9)
    H, D = CONFIG.n_head, CONFIG.head_width
    whole = QuantizedModel(model, "int8", n_layer=1)
    kv = whole._new_cache(len(ids))  # (1, 2, H and scales, T, D)
    whole.hidden(ids, ids, [native.span(kv, 0, len(ids))])
    scales = kv[0, :, H:].transpose(1, 2).reshape(2, len(ids), -1)[..., : 4 * H].contiguous().view(torch.float32)
    steps = torch.stack([kv[0, 0, :H].view(torch.uint8).int() - 128, kv[0, 1, :H].int()])  # (2, H, T, D)
    assert (steps.abs().amax(-1) == 127).all()
    x = (whole.wte[ids] + whole.wpe[ids]).float()
    qkv = whole.blocks[0].projections[0](x, whole.blocks[0].ln_1).unflatten(-1, (3, H, D))
    exact = qkv[:, 1:].permute(1, 2, 0, 3)
    error = (steps * scales.transpose(1, 2)[..., None] - exact).abs()
    assert (error <= 0.501 * scales.transpose(1, 2)[..., None]).all()


@needs_kernels
@pytest.mark.parametrize("part", range(3), ids=["query", "key", "value"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@torch.inference_mode()
def test_what_is_not_finite_makes_every_later_token_not_finite(part, value):
    model, ids = spread_model(), torch.arange(20)
    whole = QuantizedModel(model, "int8", n_layer=1)
    kv = whole._new_cache(len(ids))
    whole.hidden(ids[:3], ids[:3], [native.span(kv, 0, 3)])
    bias = model.h[0].attn.c_attn.bias
    bias[part * CONFIG.n_embd + 40] = value
    bad = QuantizedModel(model, "int8", n_layer=1)
    assert not bad.hidden(ids[3:4], ids[3:4], [native.span(kv, 3, 1)]).isfinite().any()
    later = whole.hidden(ids[4:], ids[4:], [native.span(kv, 4, 16)])
    assert later.isfinite().any() == (part == 0)  # queries are not kept


@needs_kernels
@torch.inference_mode()
def test_each_row_is_changed_by_its_own_adapter_alone():
    model, ids = spread_model(), torch.arange(6)
    whole, adapters = QuantizedModel(model, "int8"), list[Adapter]()
    for i, targets in enumerate([("q", "v"), ("k", "o", "fc", "proj"), ("fc",), ("q", "k", "v", "o")]):
        lora = LoraConfig(rank=3 + i, targets=targets)
        adapted = add_lora(copy.deepcopy(model), lora, i)
        for _, layer in lora_layers(adapted):
            layer.lora_B.data.normal_(generator=torch.Generator().manual_seed(i)).mul_(1e37 if i == 3 else 0.5)
        state = {name: value for name, value in adapted.state_dict().items() if "lora_" in name}
        adapters.append(make_adapter(model.config, lora, state, whole.adapter_dtype, CPU))
        if i < 3:  # alone, and as the model itself computes it
            found = whole.hidden(ids, ids, None, whole.stack(adapters).for_rows([adapters[i]] * 6))
            expected = hidden_states(adapted, ids)
            assert (found - expected).norm() < 0.03 * expected.norm()
            assert (found - whole.hidden(ids, ids)).norm() > 0.3 * expected.norm()
    stack, kinds = whole.stack(adapters), [adapters[0], None, adapters[1], adapters[2], adapters[3], adapters[0]]
    caches = [whole._new_cache(1) for _ in kinds]
    together = whole.hidden(ids, ids, [native.span(kv, 0, 1) for kv in caches], stack.for_rows(kinds))
    for i, adapter in enumerate(kinds):
        alone = whole.hidden(ids[i : i + 1], ids[i : i + 1], None, stack.for_rows([adapter]))
        assert torch.equal(alone[0].nan_to_num(), together[i].nan_to_num())
    plain = whole.hidden(ids[1:2], ids[1:2])
    assert torch.equal(together[1:2], plain)
    assert not together[4].isfinite().all()


@needs_kernels
def test_the_most_likely_tokens_are_those_of_torch():
    logits = random(9, 1003)
    logits[1, 40], logits[2, 1002], logits[3, 7], logits[4, 0] = float("nan"), 99.0, float("inf"), -float("inf")
    logits[5] = -float("inf")
    logits[6, [3, 500]] = 50.0
    expected = sampling.most_likely(logits)
    assert expected[[1, 3, 5]].tolist() == [-1] * 3
    expected[6] = 3
    assert torch.equal(native.most_likely(logits), expected)


DRAWS = [
    *[
        {},
        {"top_k": 1},
        {"top_k": 40},
        {"top_k": 5000},
        {"top_p": 0.9},
        {"top_p": 1e-6},
        {"min_p": 0.1},
        {"min_p": 1.0},
    ],
    *[{"top_k": 40, "top_p": 0.5}, {"top_k": 300, "top_p": 0.95, "min_p": 0.02}, {"temperature": 1e-40}],
    {"temperature": 1e39},
]


@needs_kernels
@pytest.mark.parametrize("controls", DRAWS, ids=str)
@pytest.mark.parametrize("width", [5, 64, 3001])
def test_the_drawn_tokens_are_those_of_torch(controls, width):
    config = GenerationConfig(**{"temperature": 0.8} | controls)
    for spread in (0.1, 3.0, 20.0):
        logits = random(width) * spread
        logits[width // 2] = -torch.inf  # as by a grammar
        numbers = torch.rand(99, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).tolist()
        numbers += [0.0, 1 - 2**-53]
        found = native.draw([logits] * len(numbers), [config] * len(numbers), numbers)
        expected = sampling.draw([logits] * len(numbers), [config] * len(numbers), numbers)
        # an exponential rounds differently, so a number at the limit between two tokens may draw either
        assert (found != expected).sum() <= 2
        assert (sampling.distribution(logits[None], [config])[0, found] > 0).sum() >= len(found) - 2


@needs_kernels
def test_a_token_is_drawn_alike_beside_other_rows_even_nan():
    rows = [random(1003), torch.full((1003,), torch.nan), random(1003, seed=1), torch.full((1003,), -torch.inf)]
    configs = [GenerationConfig(temperature=1.0, **controls) for controls in DRAWS[2:6]]
    together = native.draw(rows, configs, [0.3, 0.5, 0.7, 0.9])
    alone = [
        native.draw([row], [config], [n]) for row, config, n in zip(rows, configs, [0.3, 0.5, 0.7, 0.9], strict=True)
    ]
    assert torch.equal(together, torch.cat(alone))


@needs_kernels
def test_completions_are_the_same_alone_together_in_chunks_and_from_two_engines(tmp_path, monkeypatch):
    model = GPT2(CONFIG, torch.Generator().manual_seed(0)).eval()
    targets = (LoraConfig().targets, ("fc",))  # with and without GELU behind an adapter's product
    adapters = [save_random_adapter(GPT2(CONFIG), LoraConfig(targets=each), 1, tmp_path / each[0]) for each in targets]
    prompts = [*random_prompts(7), [5] * 40, [5] * 40]
    configs = mixed_configs(len(prompts))

    def complete(max_batch):
        with Engine(model, max_batch, "int8") as engine:
            assert engine._model.is_native
            for i, adapter in enumerate(adapters):
                engine.load_adapter(str(i), adapter)
            names = [[None, "0", "1"][i % 3] for i in range(len(prompts))]
            requests = [engine.submit(*one) for one in zip(prompts, configs, names, strict=True)]
            return [request.result() for request in requests]

    alone = complete(1)
    assert len({tuple(tokens) for tokens in alone}) > 3
    with ThreadPoolExecutor(2) as pool:  # the kernels' threads serve one engine at a time
        assert list(pool.map(complete, (4, 9))) == [alone, alone]
    monkeypatch.setattr(scheduler, "PREFILL_TOKENS", 5)
    monkeypatch.setattr(kv_cache.AlignedRowCache, "SPARE", 2)
    assert complete(5) == alone


@needs_kernels
def test_shapes_that_the_kernels_do_not_know_are_decoded_without_them():
    assert native.is_available(CONFIG)
    unknown = ({"n_head": 8}, {"n_embd": 24, "n_head": 1}, {"activation_function": "relu"}, {"n_positions": 16385})
    for change in unknown:
        config = GPT2Config(**{**vars(CONFIG), **change})
        assert not native.is_available(config)
        if not has_onednn_int8():
            continue
        with Engine(GPT2(config, torch.Generator().manual_seed(0)).eval(), 2, "int8") as engine:
            assert len(engine.submit([1, 2], GenerationConfig(max_new_tokens=4)).result()) == 4
