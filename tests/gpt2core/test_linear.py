"""Products by oneDNN against torch's own in fp64: forward and every gradient."""

import pytest
import torch
import torch.nn.functional as F

from gpt2core import linear as module
from gpt2core.kernels import has_onednn
from gpt2core.linear import MIN_MULTIPLICATIONS, MIN_ROWS, Linear, PrepackedWeight, linear


def tensors(shape, width, dtype=torch.float32, frozen=False):
    """x, W and b; x and W large enough to be multiplied by oneDNN."""
    generator = torch.Generator().manual_seed(0)
    x, w, b = (torch.randn(*size, generator=generator, dtype=dtype) for size in ((*shape, 96), (width, 96), (width,)))
    assert x.numel() * width >= MIN_MULTIPLICATIONS
    return x.requires_grad_(), w.requires_grad_(not frozen), b.requires_grad_(not frozen)


@pytest.mark.parametrize("shape", [(301,), (3, 101), (1, 1, 257)])
@pytest.mark.parametrize("width", [64, 288])  # smaller and larger than the input width
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("frozen", [True, False])
def test_output_and_gradients_are_those_of_f_linear(shape, width, has_bias, frozen):
    x, w, b = tensors(shape, width, frozen=frozen)
    inputs = [t for t in (x, w, b if has_bias else None) if t is not None]
    y = linear(x, w, b if has_bias else None)
    assert y.grad_fn.name() == "_LinearBackward"
    exact = F.linear(*(t.double() for t in inputs))
    torch.testing.assert_close(y, exact.float(), rtol=1e-4, atol=1e-4)
    parameters = [t for t in inputs if t.requires_grad]
    grad = (
        torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).transpose(0, -1).contiguous().transpose(0, -1)
    )
    expected = torch.autograd.grad(exact, parameters, grad.double())
    for found, exact_grad in zip(torch.autograd.grad(y, parameters, grad), expected, strict=True):
        torch.testing.assert_close(found, exact_grad.float(), rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(not has_onednn(torch.bfloat16), reason="oneDNN has no bf16 products on this processor")
@pytest.mark.parametrize("has_bias", [True, False])
def test_prepacked_weights_give_the_output_and_gradient_of_f_linear(has_bias):
    x, w, b = tensors((3, 101), 64, torch.bfloat16, frozen=True)
    bias = b if has_bias else None
    prepacked = PrepackedWeight.make(w)
    assert torch.equal(prepacked.weight.to_dense(), w)
    y, exact = linear(x, prepacked, bias), F.linear(x.double(), w.double(), bias if bias is None else bias.double())
    torch.testing.assert_close(y, exact.bfloat16(), rtol=0.01, atol=0.01)
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    (found,), (expected,) = torch.autograd.grad(y, x, grad), torch.autograd.grad(exact, x, grad.double())
    torch.testing.assert_close(found, expected, rtol=0.01, atol=0.01)


def test_the_result_is_the_same_without_gradients():
    x, w, b = tensors((301,), 64)
    with torch.inference_mode():
        assert torch.equal(linear(x, w, b), linear(x.detach().requires_grad_(False), w, b))
        torch.testing.assert_close(linear(x, w, b), F.linear(x, w, b))


def test_an_expanded_gradient_is_supported():
    x, w, b = tensors((301,), 64)
    linear(x, w, b).sum().backward()  # its gradient is an expanded tensor
    torch.testing.assert_close(b.grad, torch.full((64,), 301.0))
    torch.testing.assert_close(x.grad, w.detach().sum(0).expand(301, 96), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("frozen", [True, False])
def test_bf16_without_instructions_is_computed_in_fp32_and_rounded(monkeypatch, frozen):
    monkeypatch.setattr(module, "has_bf16_instructions", lambda: False)
    inputs = tensors((301,), 64, torch.bfloat16, frozen)
    wide = [t.detach().float().requires_grad_(t.requires_grad) for t in inputs]
    y, exact = linear(*inputs), linear(*wide)
    assert torch.equal(y, exact.bfloat16())
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    needed = 1 if frozen else 3
    found = torch.autograd.grad(y, inputs[:needed], grad)
    expected = torch.autograd.grad(exact, wide[:needed], grad.float())
    for one, other in zip(found[:2], expected[:2], strict=True):
        assert torch.equal(one, other.bfloat16())
    if not frozen:  # the gradient of the bias is summed in bf16
        torch.testing.assert_close(found[2].float(), expected[2], rtol=0.02, atol=0.2)


@pytest.mark.parametrize(("dtype", "has"), [(torch.bfloat16, True), (torch.float64, False)])
def test_other_dtypes_are_computed_by_torch(monkeypatch, dtype, has):
    monkeypatch.setattr(module, "has_bf16_instructions", lambda: has)
    x, w, b = tensors((301,), 64, dtype)
    assert torch.equal(linear(x, w, b), F.linear(x, w, b))


def test_few_rows_of_bf16_are_computed_by_torch(monkeypatch):
    monkeypatch.setattr(module, "has_bf16_instructions", lambda: False)
    x, w, b = tensors((301,), 64, torch.bfloat16)
    few = x[: MIN_ROWS - 1]
    assert torch.equal(linear(few, w, b), F.linear(few, w, b))


def test_autocast_is_computed_by_torch():
    x, w, b = tensors((301,), 64)
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x, w, b).dtype == torch.bfloat16


def test_small_products_are_computed_by_torch():
    layer = Linear(8, 8)
    x = torch.randn(2, 8)
    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))
