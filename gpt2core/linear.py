"""y = x W^T + b on a CPU through oneDNN, forward and backward: in fp32, and in bf16 with packed weights.

torch sends fp32 products to MKL, which uses the vector units of one vendor's processors only: on an AMD EPYC with
AVX-512 it reaches 45 % of oneDNN's throughput (`docs/decisions/0012-fp32-products-by-onednn.md`).
"""

from typing import Any, NamedTuple, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from gpt2core.kernels import has_onednn, onednn_linear, prepack

SMALL = 2**20  # multiplications; below this, the call overhead of oneDNN exceeds what it saves


class Packed(NamedTuple):
    """A frozen matrix in oneDNN's layout, which otherwise each product makes again: a twelfth of its time.

    Two copies, since the forward and the backward product read it in different layouts.
    """

    weight: Tensor
    transposed: Tensor

    @classmethod
    def make(cls, weight: Tensor) -> Self:
        """From weight (out, in) in bf16."""
        return cls(prepack(weight), prepack(weight.t()))


class Linear(nn.Linear):
    """`nn.Linear`, computed by `linear`."""

    packed: Packed | None = None  # instead of the weight, during a training that does not change it

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight if self.packed is None else self.packed, self.bias)


def linear(x: Tensor, weight: Tensor | Packed, bias: Tensor | None = None) -> Tensor:
    """`F.linear` with another order of summation: (..., out) for x (..., in) and weight (out, in).

    A packed weight takes x of its own dtype, and a bias without gradient.
    """
    if isinstance(weight, Packed):
        return cast(Tensor, _PackedLinear.apply(x, weight, bias))
    if (
        x.dtype != torch.float32
        or weight.dtype != torch.float32
        or x.device.type != "cpu"
        or x.numel() * len(weight) < SMALL
        or torch.is_autocast_enabled("cpu")
        or not has_onednn()
    ):
        return F.linear(x, weight, bias)
    if not torch.is_grad_enabled():
        return onednn_linear(x, weight, bias)
    return cast(Tensor, _Linear.apply(x, weight, bias))


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return onednn_linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        x_needs_grad, weight_needs_grad, bias_needs_grad = ctx.needs_input_grad
        inputs, grads = x.flatten(0, -2), grad.flatten(0, -2)  # (N, in), (N, out)
        weight_grad = None
        if weight_needs_grad:  # oneDNN copies its first operand: make that the smaller one
            n_out, n_in = weight.shape
            weight_grad = (
                onednn_linear(grads.t(), inputs.t()) if n_out < n_in else onednn_linear(inputs.t(), grads.t()).t()
            )
        x_grad = onednn_linear(grad, weight.t()) if x_needs_grad else None
        return x_grad, weight_grad, grads.sum(0) if bias_needs_grad else None


class _PackedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: Packed, bias: Tensor | None) -> Tensor:
        ctx.transposed = packed.transposed
        return onednn_linear(x, packed.weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return onednn_linear(grad, ctx.transposed), None, None
