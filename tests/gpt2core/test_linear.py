"""oneDNN's products beside torch's own, in fp64: forward, and every gradient."""

import pytest
import torch
import torch.nn.functional as F

from gpt2core.linear import SMALL, Linear, linear


def tensors(shape, width, dtype=torch.float32, frozen=False):
    """x, W and b; the first two with so many numbers that their product is not small."""
    generator = torch.Generator().manual_seed(0)
    x, w, b = (torch.randn(*size, generator=generator, dtype=dtype) for size in ((*shape, 96), (width, 96), (width,)))
    assert x.numel() * width >= SMALL
    return x.requires_grad_(), w.requires_grad_(not frozen), b.requires_grad_(not frozen)


@pytest.mark.parametrize("shape", [(301,), (3, 101), (1, 1, 257)])
@pytest.mark.parametrize("width", [64, 288])  # fewer than what goes in, and more
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("frozen", [True, False])
def test_it_is_f_linear_and_so_are_its_gradients(shape, width, has_bias, frozen):
    x, w, b = tensors(shape, width, frozen=frozen)
    inputs = [t for t in (x, w, b if has_bias else None) if t is not None]
    y = linear(x, w, b if has_bias else None)
    assert y.grad_fn.name() == "_LinearBackward"
    exact = F.linear(*(t.double() for t in inputs))
    torch.testing.assert_close(y, exact.float(), rtol=1e-4, atol=1e-4)
    wanted = [t for t in inputs if t.requires_grad]
    up = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).transpose(0, -1).contiguous().transpose(0, -1)
    expected = torch.autograd.grad(exact, wanted, up.double())
    for own, other in zip(torch.autograd.grad(y, wanted, up), expected, strict=True):
        torch.testing.assert_close(own, other.float(), rtol=1e-4, atol=1e-4)


def test_without_gradients_it_is_the_same_product():
    x, w, b = tensors((301,), 64)
    with torch.inference_mode():
        assert torch.equal(linear(x, w, b), linear(x.detach().requires_grad_(False), w, b))
        torch.testing.assert_close(linear(x, w, b), F.linear(x, w, b))


def test_a_gradient_that_is_one_number_everywhere():
    x, w, b = tensors((301,), 64)
    linear(x, w, b).sum().backward()  # an expanded tensor, without memory of its own
    torch.testing.assert_close(b.grad, torch.full((64,), 301.0))
    torch.testing.assert_close(x.grad, w.detach().sum(0).expand(301, 96), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes_are_torchs(dtype):
    x, w, b = tensors((301,), 64, dtype)
    assert torch.equal(linear(x, w, b), F.linear(x, w, b))


def test_autocast_is_torchs():
    x, w, b = tensors((301,), 64)
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x, w, b).dtype == torch.bfloat16


def test_what_is_small_is_torchs():
    layer = Linear(8, 8)
    x = torch.randn(2, 8)
    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))
