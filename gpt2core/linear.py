"""y = W x + b on a processor in fp32, by oneDNN, as bf16 is by itself.

Torch gives fp32 products to MKL, which knows the vector units of one maker's processors: on an AMD EPYC with AVX-512 it
reaches 45 % of what oneDNN does (`docs/decisions/0012-fp32-products-by-onednn.md`).
"""

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

SMALL = 2**20  # multiplications; below, what it takes to call oneDNN is more than it saves


class Linear(nn.Linear):
    """`nn.Linear`, through `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """What `F.linear` computes, in another order of summation: (..., out) of x (..., in) and weight (out, in)."""
    if (
        x.dtype != torch.float32
        or weight.dtype != torch.float32
        or x.device.type != "cpu"
        or x.numel() * len(weight) < SMALL
        or torch.is_autocast_enabled("cpu")
        or not torch.backends.mkldnn.is_available()
    ):
        return F.linear(x, weight, bias)
    if not torch.is_grad_enabled():
        return _product(x, weight, bias)
    return cast(Tensor, _Linear.apply(x, weight, bias))


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return cast(Tensor, torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], ""))


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        wants_x, wants_weight, wants_bias = ctx.needs_input_grad
        inputs, grads = x.flatten(0, -2), grad.flatten(0, -2)  # (N, in), (N, out)
        of_weight = None
        if wants_weight:  # oneDNN copies what comes first: the smaller of the two
            out, width = weight.shape
            of_weight = _product(grads.t(), inputs.t()) if out < width else _product(inputs.t(), grads.t()).t()
        return _product(grad, weight.t()) if wants_x else None, of_weight, grads.sum(0) if wants_bias else None
