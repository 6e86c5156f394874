"""The int8 kernels: compiled where they can be, right, and independent of what else a step computes."""

import platform
from concurrent.futures import ThreadPoolExecutor
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
from gpt2core.inference.kernels import has_vnni
from gpt2core.inference.kv_cache import PrefillCache
from gpt2core.inference.request import Request
from gpt2core.model import GPT2
from gpt2core.sampling import Sampler
from tests.gpt2core.decoding import mixed_configs, random_prompts, save_random_adapter

CPU = torch.device("cpu")
CONFIG = GPT2Config(vocab_size=97, n_positions=64, n_embd=64, n_layer=2, n_head=2, initializer_range=0.2)
needs_vnni = pytest.mark.skipif(not has_vnni(), reason="this processor has no AVX-512 VNNI")


@pytest.mark.skipif(
    (platform.system(), platform.machine()) != ("Linux", "x86_64"), reason="the kernels are for Linux on x86-64"
)
def test_the_installation_compiled_the_kernels():
    assert native.library_file() is not None, "pip install --verbose -e . shows why"


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


@needs_vnni
@settings(max_examples=30, deadline=None)
@given(n=st.integers(1, 20), n_in=st.sampled_from([16, 64, 208]), n_out=st.integers(1, 150), seed=st.integers(0, 99))
def test_a_product_is_the_exact_one_of_the_quantized_operands(n, n_in, n_out, seed):
    x, weight, bias = random(n, n_in, seed=seed), random(n_out, n_in, seed=seed + 1), random(n_out, seed=seed + 2)
    linear = native.Int8Linear(weight, bias, native.Scratch(n_in))
    expected = quantized_product(x, weight, bias)
    # a value halfway between two steps may be rounded either way: one step of one weight
    atol = 1e-4 + float(weight.abs().max() * (x.amax() - x.amin()) / 255)
    torch.testing.assert_close(linear(x).double(), expected, rtol=1e-5, atol=atol)
    norm = SimpleNamespace(weight=random(n_in, seed=seed + 3), bias=random(n_in, seed=seed + 4), eps=1e-5)
    normed = F.layer_norm(x, (n_in,), norm.weight, norm.bias, norm.eps)
    exact = normed.double() @ weight.double().T + bias
    tolerance = 0.03 * float(exact.abs().max() + normed.norm(dim=1).max() * weight.norm(dim=1).max())
    torch.testing.assert_close(linear(x, norm).double(), exact, rtol=0, atol=tolerance)
    added = random(n, n_out, seed=seed + 5)
    together = added + F.gelu(linear(x, norm), approximate="tanh")
    torch.testing.assert_close(linear(x, norm, gelu=True, add_to=added), together, rtol=1e-5, atol=1e-5)


@needs_vnni
def test_a_row_has_the_same_bits_alone_and_among_others():
    weight, bias, x = random(130, 64), random(130), random(23, 64)
    x[3], x[5, 7], x[11, 0] = 0.0, 1e30, float("nan")
    linear = native.Int8Linear(weight, bias, native.Scratch(64))
    norm = SimpleNamespace(weight=random(64), bias=random(64), eps=1e-5)
    for options in ({}, {"norm": norm, "gelu": True}):
        together = linear(x, **options)
        for n in range(1, 9):
            parts = [linear(part.contiguous(), **options) for part in x.split(n)]
            assert torch.equal(torch.cat(parts).nan_to_num(7.0), together.nan_to_num(7.0))
    assert torch.equal(linear(x)[3], bias)
    assert linear(x)[11].isnan().all()
    assert linear(torch.full((1, 64), float("inf"))).isnan().all()


@needs_vnni
@pytest.mark.parametrize("width", native.HEAD_WIDTHS)
def test_attention_is_that_of_torch_and_does_not_depend_on_how_a_prompt_is_divided(width):
    config = GPT2Config(vocab_size=97, n_positions=64, n_embd=3 * width, n_layer=2, n_head=3)
    qkv, layer, scale = random(40, 3, 3, width), 1, 0.2
    request = Request([1] * 40, Sampler(GenerationConfig(), [1], CPU), 1, None, None, None, None)

    def attend(sizes):
        cache, parts, start = PrefillCache(request, config, native.CACHE_DTYPE, CPU, []), [], 0
        for n in sizes:
            parts.append(native.CachedAttention([cache.span(n)], [1.0, scale])(layer, qkv[start : start + n]))
            cache.advance(n)
            start += n
        return torch.cat(parts)

    q, k, v = qkv.permute(1, 2, 0, 3)
    expected = F.scaled_dot_product_attention(q, k.half().float(), v.half().float(), is_causal=True, scale=scale)
    whole = attend([40])
    torch.testing.assert_close(whole, expected.transpose(0, 1).flatten(1), rtol=1e-4, atol=1e-5)
    assert torch.equal(attend([7, 1, 1, 25, 6]), whole)


@needs_vnni
def test_a_delta_is_the_low_rank_product_of_the_rows_own_adapter():
    pairs = [
        (random(4, 32), random(48, 4)),
        None,
        (random(9, 32), random(48, 9)),
        (random(2, 32) * 3e38, random(48, 2)),
    ]
    rows, x = torch.tensor([0, -1, 2, 1, 3, 0]), random(6, 32)
    y = expected = random(6, 48, seed=1)
    y = y.clone()
    native.Deltas(pairs).add_(y, x, rows)
    for i, pair in enumerate(pairs[a] if a >= 0 else None for a in rows.tolist()):
        row = expected[i] if pair is None else expected[i] + pair[1] @ (pair[0] @ x[i])
        torch.testing.assert_close(y[i].nan_to_num(), row.nan_to_num(), rtol=1e-4, atol=1e-4)


@needs_vnni
def test_the_most_likely_tokens_are_those_of_torch():
    logits = random(9, 1003)
    logits[1, 40], logits[2, 1002], logits[3, 7], logits[4, 0] = float("nan"), 99.0, float("inf"), -float("inf")
    logits[5] = -float("inf")
    logits[6, [3, 500]] = 50.0
    expected = sampling.most_likely(logits)
    assert expected[[1, 3, 5]].tolist() == [-1] * 3
    expected[6] = 3
    assert torch.equal(native.most_likely(logits), expected)


@needs_vnni
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
    monkeypatch.setattr(kv_cache.RowCache, "SPARE", 2)
    assert complete(5) == alone


@needs_vnni
def test_shapes_that_the_kernels_do_not_know_are_decoded_without_them():
    assert native.is_available(CONFIG)
    for change in ({"n_head": 8}, {"n_embd": 24, "n_head": 1}, {"activation_function": "relu"}):
        config = GPT2Config(**{**vars(CONFIG), **change})
        assert not native.is_available(config)
        with Engine(GPT2(config, torch.Generator().manual_seed(0)).eval(), 2, "int8") as engine:
            assert len(engine.submit([1, 2], GenerationConfig(max_new_tokens=4)).result()) == 4
