"""GPT2 against transformers with the same random weights, and against itself with padding and cache."""

import json
import re
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from gpt2core.checkpoint import load_pretrained, save_pretrained
from gpt2core.config import GPT2Config
from gpt2core.engine import Engine
from gpt2core.model import GPT2, KVCache, eval_mode, pad_bias, pad_rows

# Both sides sum the same fp32 numbers in different order; logits here are 1 to 10, so errors are near 1e-6.
TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}
# GPT2 against itself: only the shapes of the matrix products differ.
SELF_TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}
CONV1D = ("c_attn.weight", "c_proj.weight", "c_fc.weight")

CONFIGS = {
    "plain": {},
    "one layer, one head": {"n_layer": 1, "n_head": 1},
    "four layers, eight heads": {"n_layer": 4, "n_head": 8},
    "narrow MLP": {"n_inner": 17},
    "wide MLP": {"n_inner": 200},
    "gelu": {"activation_function": "gelu"},
    "relu": {"activation_function": "relu"},
    "gelu_pytorch_tanh": {"activation_function": "gelu_pytorch_tanh"},
    "unscaled attention": {"scale_attn_weights": False},
    "attention by inverse layer": {"n_layer": 3, "scale_attn_by_inverse_layer_idx": True},
    "only inverse layer": {"n_layer": 3, "scale_attn_weights": False, "scale_attn_by_inverse_layer_idx": True},
    "large epsilon": {"layer_norm_epsilon": 0.1},
}


def tokens(*shape, seed=0):
    return torch.randint(97, shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def pair(make_hf, tmp_path_factory):
    """A function: config fields -> transformers' model, and GPT2 with the same weights."""

    def make(**config):
        hf = make_hf(**config)
        directory = tmp_path_factory.mktemp("model")
        hf.save_pretrained(directory)
        return hf, load_pretrained(directory)

    return make


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_logits_are_those_of_transformers(pair, config):
    hf, ours = pair(**config)
    ids = tokens(3, 64)
    with torch.no_grad():
        torch.testing.assert_close(ours(ids), hf(ids).logits, **TOLERANCE)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_gradients_of_all_parameters_are_those_of_transformers(pair, config):
    hf, ours = pair(**config)
    ids = tokens(3, 20)
    hf(ids, labels=ids).loss.backward()
    F.cross_entropy(ours(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    expected = {name.removeprefix("transformer."): parameter.grad for name, parameter in hf.named_parameters()}
    found = {name: parameter.grad for name, parameter in ours.named_parameters()}
    assert found.keys() == expected.keys()
    for name, grad in found.items():
        assert grad.any(), name
        torch.testing.assert_close(grad.T if name.endswith(CONV1D) else grad, expected[name], rtol=1e-3, atol=1e-5)


def test_the_compared_configs_have_different_logits(pair):
    ids = tokens(1, 16)
    variants = [{}] + [CONFIGS[name] for name in ("gelu", "relu", "unscaled attention", "large epsilon")]
    logits = [pair(**config)[1](ids) for config in variants]
    for i, one in enumerate(logits):
        for other in logits[:i]:
            assert (one - other).abs().max() > 2e-4  # otherwise the comparisons above would prove nothing


def padded(rows, side):
    width = max(map(len, rows))
    ids, mask = torch.full((len(rows), width), 5), torch.zeros(len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        where = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        ids[i, where], mask[i, where] = row, 1
    return ids, mask


@pytest.mark.parametrize("dtype", [torch.long, torch.bool])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_does_not_change_the_logits_of_a_row(model, side, dtype):
    rows = [tokens(n, seed=n) for n in (1, 7, 12)]
    ids, mask = padded(rows, side)
    logits = model(ids, mask.to(dtype))
    for i, row in enumerate(rows):
        torch.testing.assert_close(logits[i, mask[i].bool()], model(row[None])[0], **SELF_TOLERANCE)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_logits_are_those_of_transformers(pair, side):
    hf, ours = pair()
    ids, mask = padded([tokens(n, seed=n) for n in (2, 9)], side)
    expected = hf(ids, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0)).logits
    torch.testing.assert_close(ours(ids, mask)[mask.bool()], expected[mask.bool()], **TOLERANCE)


def test_a_mask_of_ones_equals_no_mask(model):
    ids = tokens(2, 10)
    torch.testing.assert_close(model(ids, torch.ones_like(ids)), model(ids), **SELF_TOLERANCE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.bool])
def test_a_mask_may_have_any_type_of_number(model, dtype):
    mask = torch.tensor([[1] * 9, [0] * 4 + [1] * 5])
    assert torch.equal(model(tokens(2, 9), mask.to(dtype)), model(tokens(2, 9), mask))


def test_a_fully_padded_row_has_finite_logits_and_gradients(model):
    ids = tokens(2, 6)
    mask = torch.ones_like(ids)
    mask[1] = 0
    logits = model(ids, mask)
    assert logits.isfinite().all()
    logits[0].sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    torch.testing.assert_close(logits[0], model(ids[:1])[0], **SELF_TOLERANCE)


def cached(model, ids, mask, steps):
    """Logits of all columns, computed with a cache in pieces of the given lengths."""
    cache, start, pieces = KVCache(model, len(ids), ids.shape[1]), 0, []
    for length in steps:
        end = start + length
        pieces.append(model(ids[:, start:end], None if mask is None else mask[:, :end], cache))
        assert cache.length == end
        start = end
    return torch.cat(pieces, 1)


STEPS = [[20], [1] * 20, [12, *[1] * 8], [7, 6, 7], [1, 5, 1, 13], [10, 10]]


@pytest.mark.parametrize("steps", STEPS, ids=str)
def test_cached_logits_equal_those_of_one_pass(model, steps):
    ids = tokens(3, 20)
    torch.testing.assert_close(cached(model, ids, None, steps), model(ids), **SELF_TOLERANCE)


@pytest.mark.parametrize("steps", STEPS, ids=str)
def test_cached_logits_of_left_padded_rows_equal_those_of_each_row_alone(model, steps):
    rows = [tokens(n, seed=n) for n in (20, 9, 14)]
    ids, mask = padded(rows, "left")
    logits = cached(model, ids, mask, steps)
    for i, row in enumerate(rows):
        torch.testing.assert_close(logits[i, mask[i].bool()], model(row[None])[0], **SELF_TOLERANCE)


def test_cached_logits_are_those_of_transformers_with_its_cache(pair):
    hf, ours = pair()
    ids = tokens(2, 12)
    prefix = hf(ids[:, :8], use_cache=True)
    rest = hf(ids[:, 8:], past_key_values=prefix.past_key_values).logits
    torch.testing.assert_close(cached(ours, ids, None, [8, 4])[:, 8:], rest, **TOLERANCE)


@pytest.mark.parametrize("keep", [[1], [2, 0], [0, 0, 1]], ids=str)
def test_keep_selects_and_orders_the_rows_of_the_cache(model, keep):
    ids, keep = tokens(3, 10), torch.tensor(keep)
    cache = KVCache(model, 3, 10)
    model(ids[:, :6], None, cache)
    cache.keep(keep)
    torch.testing.assert_close(model(ids[keep, 6:], None, cache), model(ids[keep])[:, 6:], **SELF_TOLERANCE)


@pytest.mark.parametrize("cached_tokens", [0, 4, 10])
def test_more_columns_than_the_capacity_are_refused(model, cached_tokens):
    cache = KVCache(model, 1, 10)
    if cached_tokens:
        model(tokens(1, cached_tokens), None, cache)
    with pytest.raises(ValueError, match="11 tokens are more than the cache's capacity of 10"):
        model(tokens(1, 11 - cached_tokens), None, cache)


def test_a_refused_step_leaves_the_cache_usable(model):
    ids, cache = tokens(1, 10), KVCache(model, 1, 10)
    model(ids[:, :9], None, cache)
    with pytest.raises(ValueError, match="capacity"):
        model(tokens(1, 2), None, cache)
    torch.testing.assert_close(model(ids[:, 9:], None, cache), model(ids)[:, 9:], **SELF_TOLERANCE)


@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("cached_tokens", [0, 40, 64])
def test_more_tokens_than_n_positions_are_refused(model, cached_tokens, mask):
    cache = KVCache(model, 1, 100)
    if cached_tokens:
        model(tokens(1, cached_tokens), None, cache)
    with pytest.raises(ValueError, match="65 tokens are more than n_positions=64"):
        model(tokens(1, 65 - cached_tokens), torch.ones(1, 65, dtype=torch.long) if mask else None, cache)


@pytest.mark.parametrize("shape", [(12,), (1, 2, 3)])
def test_input_that_is_not_a_batch_of_rows_is_refused(model, shape):
    with pytest.raises(ValueError, match=rf"input_ids has the shape {re.escape(str(shape))}; it must be \(B, T\)"):
        model(tokens(*shape))


def test_padding_uses_no_positions(model):
    row = tokens(64)
    ids = torch.cat([torch.zeros(3, dtype=torch.long), row])[None]
    mask = torch.ones_like(ids)
    mask[:, :3] = 0
    torch.testing.assert_close(model(ids, mask)[:, 3:], model(row[None]), **SELF_TOLERANCE)


@pytest.mark.parametrize("mask", [False, True])
def test_a_token_does_not_affect_earlier_logits(model, mask):
    ids = tokens(1, 16)
    attention_mask = torch.ones_like(ids) if mask else None
    before = model(ids, attention_mask)
    for position in range(16):
        changed = ids.clone()
        changed[0, position] = (ids[0, position] + 1) % 97
        after = model(changed, attention_mask)
        torch.testing.assert_close(after[:, :position], before[:, :position], **SELF_TOLERANCE)
        assert not torch.allclose(after[:, position:], before[:, position:], atol=1e-3)


def test_the_head_is_the_token_embedding(model):
    ids = tokens(1, 4)
    assert not any("head" in name for name, _ in model.named_parameters())
    torch.testing.assert_close(model(ids), model.hidden(ids) @ model.wte.weight.T, **SELF_TOLERANCE)
    with torch.no_grad():
        hidden = model.hidden(ids)
        model.wte.weight[96] += 1.0
        torch.testing.assert_close(model.head(hidden)[..., 96], hidden @ model.wte.weight[96], **SELF_TOLERANCE)


def test_a_padded_head_gives_the_same_losses_and_gradients():
    generator = torch.Generator().manual_seed(0)
    weight, hidden = (torch.randn(n, 8, generator=generator).requires_grad_() for n in (97, 5))
    labels = torch.tensor([0, 96, 3, -100, 50])
    logits = F.linear(hidden, pad_rows(weight), pad_bias(97, weight))
    assert logits.shape == (5, 128)
    found, expected = (F.cross_entropy(x, labels, reduction="none") for x in (logits, hidden @ weight.T))
    torch.testing.assert_close(found, expected)
    grads = [torch.autograd.grad(one.sum(), (hidden, weight)) for one in (found, expected)]
    torch.testing.assert_close(*grads)


def test_bf16_logits_are_close_to_fp32(model):
    ids = tokens(2, 16)
    exact = model(ids)
    rough = model.bfloat16()(ids)
    assert rough.dtype == torch.bfloat16
    # 8 bits of mantissa: a relative error of 2**-8 per operation, about ten operations deep
    assert (rough.float() - exact).norm() / exact.norm() < 0.03


def test_the_cache_has_the_dtype_of_the_model(model):
    ids = tokens(1, 10)
    model.bfloat16()
    torch.testing.assert_close(cached(model, ids, None, [6, 4]), model(ids), rtol=0.05, atol=0.1)  # bf16, see above
    assert KVCache(model, 1, 2).k.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("preset", "count"),
    [("gpt2", 124_439_808), ("gpt2-medium", 354_823_168), ("gpt2-large", 774_030_080), ("gpt2-xl", 1_557_611_200)],
)
def test_presets_have_the_published_number_of_parameters(preset, count):
    with torch.device("meta"):
        model = GPT2(GPT2Config.preset(preset))
    assert sum(parameter.numel() for parameter in model.parameters()) == count


def init(config, seed):
    return GPT2(config, torch.Generator().manual_seed(seed)).state_dict()


def test_initial_weights_depend_on_the_generator_only(tiny_config):
    torch.manual_seed(1)
    first = init(tiny_config, 0)
    torch.manual_seed(2)
    second, other = init(tiny_config, 0), init(tiny_config, 1)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["wte.weight"], other["wte.weight"])


def test_initial_weights_use_the_global_generator_by_default(tiny_config):
    torch.manual_seed(3)
    first = GPT2(tiny_config).state_dict()
    torch.manual_seed(3)
    second = GPT2(tiny_config).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(("std", "n_layer"), [(0.02, 2), (0.1, 8)])
def test_initial_weights_have_the_standard_deviation_of_the_paper(std, n_layer):
    config = GPT2Config(n_layer=n_layer, n_head=2, n_embd=64, n_positions=128, vocab_size=97, initializer_range=std)
    for name, weight in init(config, 0).items():
        if name.endswith("bias"):
            assert not weight.any(), name
        elif weight.dim() == 1:
            assert (weight == 1).all(), name
        else:
            residual = name.endswith(("attn.c_proj.weight", "mlp.c_proj.weight"))
            expected = std / (2 * n_layer) ** 0.5 if residual else std
            # at least 4,000 draws: the standard error of the deviation is near 1.1 %, that of the mean near std / 60
            assert weight.std().item() == pytest.approx(expected, rel=0.06), name
            assert abs(weight.mean().item()) < expected / 12, name


def test_evaluating_restores_every_modules_mode_after_an_exception(model):
    model.train()
    model.h[0].eval()
    before = {name: module.training for name, module in model.named_modules()}
    with pytest.raises(ZeroDivisionError), eval_mode(model):
        1 / any(module.training for module in model.modules())
    assert {name: module.training for name, module in model.named_modules()} == before


def test_post_norm_normalizes_after_each_addition_is_saved_under_another_type_and_not_served(tiny_config, tmp_path):
    model = GPT2(replace(tiny_config, norm_position="post"), torch.Generator().manual_seed(0)).eval()
    block, x = model.h[0], torch.randn(2, 5, tiny_config.n_embd, generator=torch.Generator().manual_seed(1))
    y = block.ln_1(x + block.attn(x, None, None))
    assert torch.equal(block(x, None, None), block.ln_2(y + block.mlp(y)))
    ids = torch.tensor([[1, 2, 3]])
    assert torch.equal(load_pretrained(save_pretrained(model, tmp_path))(ids), model(ids))
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "gpt2-post-norm"
    with pytest.raises(ValueError, match="norm_position is 'post'"):
        Engine(model)


@pytest.mark.parametrize(("layer_init", "equal"), [("clone", True), ("fresh", False)])
def test_blocks_start_equal_only_as_clones(tiny_config, layer_init, equal):
    first, second = GPT2(replace(tiny_config, layer_init=layer_init), torch.Generator().manual_seed(0)).h
    assert torch.equal(first.attn.c_attn.weight, second.attn.c_attn.weight) == equal
