"""Weight formats: each predicts as the model does, and "auto" chooses the fastest of them that does."""

import gc
import shutil
import weakref

import pytest
import torch
import torch.nn.functional as F

from gpt2core.checkpoint import load_pretrained
from gpt2core.config import GenerationConfig, GPT2Config
from gpt2core.data import Example
from gpt2core.engine import Engine
from gpt2core.inference import quantized
from gpt2core.inference.quantized import QuantizedModel, quantize_fastest, supported_formats
from gpt2core.kernels import has_onednn_int8
from gpt2core.losses import token_losses
from gpt2core.metrics import perplexity
from gpt2core.model import GPT2
from tests.gpt2core.conftest import TINY

CPU = torch.device("cpu")
FORMATS = supported_formats(GPT2Config(**TINY), CPU)
needs_int8 = pytest.mark.skipif("int8" not in FORMATS, reason="no int8 kernel on this processor")
needs_torchs_int8 = pytest.mark.skipif(
    not has_onednn_int8(), reason="torch has no exact int8 product on this processor"
)


def logits_of(model: GPT2, weights: str, ids: torch.Tensor) -> torch.Tensor:
    whole = QuantizedModel(model, weights)
    with torch.inference_mode():
        return whole.logits(whole.hidden(ids, torch.arange(len(ids))))


@pytest.fixture
def without_kernels(monkeypatch):
    """As where the native kernels are not compiled, or do not run."""
    monkeypatch.setattr(quantized.native, "is_available", lambda config: False)


@needs_torchs_int8
def test_without_the_kernels_int8_is_computed_by_torch(without_kernels, model):
    test_logits_are_those_of_the_model(model, "int8")
    test_perplexity_is_within_one_percent_of_the_model(model, "int8")
    config = GenerationConfig(max_new_tokens=6)
    prompts = [[1, 2, 3], [4] * 9, [5]]
    with Engine(model, 1, "int8") as engine:
        alone = [engine.submit(prompt, config).result() for prompt in prompts]
    with Engine(model, 3, "int8") as engine:
        requests = [engine.submit(prompt, config) for prompt in prompts]
        assert [request.result() for request in requests] == alone


@pytest.mark.parametrize("weights", FORMATS)
def test_logits_are_those_of_the_model(model, weights):
    ids = torch.randint(97, (40,), generator=torch.Generator().manual_seed(0))
    atol = 1e-5 if weights == "fp32" else 0.06  # logits are about 2; bf16 has 8 bits, int8 7 and a sign
    torch.testing.assert_close(logits_of(model, weights, ids), model(ids[None])[0], rtol=0, atol=atol)


@pytest.mark.parametrize("weights", FORMATS)
def test_the_weights_are_a_copy(tiny_gpt2_dir, tmp_path, weights):
    directory = shutil.copytree(tiny_gpt2_dir, tmp_path / "checkpoint")
    ids = torch.randint(97, (40,), generator=torch.Generator().manual_seed(0))
    expected = logits_of(load_pretrained(directory), weights, ids)
    whole = QuantizedModel(load_pretrained(directory, mapped=True), weights)
    file = directory / "model.safetensors"
    with file.open("r+b") as opened:  # in place: the mapped model changes
        opened.write(bytes(file.stat().st_size))
    with torch.inference_mode():
        assert torch.equal(whole.logits(whole.hidden(ids, torch.arange(len(ids)))), expected)


@pytest.mark.parametrize("weights", FORMATS[1:])
def test_perplexity_is_within_one_percent_of_the_model(model, weights):
    sequences = [torch.randint(97, (64,), generator=torch.Generator().manual_seed(i)) for i in range(8)]
    plain = perplexity(token_losses(model, [Example(ids.tolist(), 1) for ids in sequences], 8, "all"))
    losses = [
        (float(F.cross_entropy(logits_of(model, weights, ids)[:-1], ids[1:], reduction="sum")), 63) for ids in sequences
    ]
    assert perplexity(losses) == pytest.approx(plain, rel=0.01)


@needs_torchs_int8
def test_int8_rows_of_zeros_and_with_an_outlier_do_not_affect_each_other():
    weight = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))
    project = quantized._projection(weight, torch.ones(8), "int8")
    x = torch.randn(3, 16, generator=torch.Generator().manual_seed(1))
    x[0], x[1, 3] = 0.0, 1e4
    y = project(x)
    assert torch.equal(y[0], torch.ones(8))
    expected = x @ weight.T + 1
    assert ((y - expected).norm(dim=1) <= 0.02 * expected.norm(dim=1)).all()  # at most half of one of 127 steps off
    assert torch.equal(y[2], project(x[2:])[0])


@needs_int8
def test_auto_takes_the_fastest_format_that_keeps_perplexity(model, monkeypatch, caplog):
    seconds = {"fp32": 3.0, "bf16": 2.0, "int8": 1.0}
    cost = {"bf16": 0.001, "int8": 0.002}
    monkeypatch.setattr(quantized, "MIN_WEIGHTS_TO_QUANTIZE", 0)
    monkeypatch.setattr(quantized, "_step_seconds", lambda whole, n: seconds[whole.weights])
    monkeypatch.setattr(quantized, "has_bf16_instructions", lambda: True)
    monkeypatch.setattr(quantized, "_perplexity_cost", lambda model, whole: cost[whole.weights])
    assert quantize_fastest(model, 16).weights == "int8"
    cost["int8"] = 0.2
    with caplog.at_level("WARNING", "gpt2core.inference.quantized"):
        fallback = quantize_fastest(model, 16)
    assert (fallback.weights, fallback.perplexity_increase) == ("bf16", cost["bf16"])
    assert "weights int8 rejected: faster, but perplexity rises by 20.0 %" in caplog.text
    monkeypatch.setattr(quantized, "has_bf16_instructions", lambda: False)
    del seconds["bf16"]  # emulated, and not measured
    assert quantize_fastest(model, 16).weights == "fp32"
    seconds["int8"] = 2.9  # not fast enough to be worth it
    cost["int8"] = 0.0
    assert quantize_fastest(model, 16).weights == "fp32"


def test_auto_serves_a_small_model_in_fp32_as_it_was_evaluated(model, monkeypatch):
    monkeypatch.setattr(quantized, "_step_seconds", lambda whole, n: pytest.fail("measured"))
    assert quantize_fastest(model, 16).weights == "fp32"


@needs_int8
def test_the_perplexity_check_detects_outlier_channels_that_int8_cannot_represent():
    config = GPT2Config(vocab_size=97, n_positions=64, n_embd=32, n_layer=2, n_head=2, initializer_range=0.2)
    model = GPT2(config, torch.Generator().manual_seed(0)).train()
    good = quantized._perplexity_cost(model, QuantizedModel(model, "int8"))
    for block in model.h:  # one channel dominates all others, as in large models
        block.ln_1.weight.data[3] = block.ln_2.weight.data[3] = 1000.0
        block.attn.c_attn.weight.data[:, 3] = block.mlp.c_fc.weight.data[:, 3] = 1e-4
    assert good < 0.01 < quantized._perplexity_cost(model, QuantizedModel(model, "int8"))
    assert all(module.training for module in model.modules())


def test_bf16_weights_are_computed_in_fp32_on_a_processor_without_bf16_products(model, monkeypatch):
    monkeypatch.setattr(quantized, "has_onednn", lambda dtype=torch.float32: dtype == torch.float32)
    test_logits_are_those_of_the_model(model, "bf16")
    assert QuantizedModel(model, "bf16").dtype == torch.float32


def test_int8_without_an_exact_product_is_refused(without_kernels, model, monkeypatch):
    monkeypatch.setattr(quantized, "has_onednn_int8", lambda: False)  # as on a processor with AVX2 only
    assert supported_formats(model.config, CPU) == ["fp32", "bf16"]
    with pytest.raises(ValueError, match="int8 has no kernel for this model on this device or processor"):
        QuantizedModel(model, "int8")


def test_an_unknown_format_is_refused(model):
    with pytest.raises(ValueError, match="weights is 'int4'; it must be one of fp32, bf16, int8"):
        QuantizedModel(model, "int4")


@pytest.mark.parametrize("weights", FORMATS)
def test_the_engine_does_not_keep_the_original_model_alive(tiny_gpt2_dir, weights):
    model = load_pretrained(tiny_gpt2_dir)
    layers = [weakref.ref(layer) for layer in model.modules()]
    engine = Engine(model, 2, weights)
    del model
    gc.collect()
    assert [layer() for layer in layers if layer() is not None] == []
    assert engine.weights == weights
