"""y = x W^T + b on a CPU by oneDNN, forward and backward: in fp32, and in bf16 with prepacked weights.

torch sends fp32 products to MKL, which uses only the vector units of Intel's processors: on an AMD EPYC with AVX-512,
it reaches 45 % of oneDNN's throughput (`docs/decisions/0012-fp32-matrix-products.md`). On a processor without bf16
instructions, bf16 products are computed in fp32 and rounded: the same sums, four times as fast.
"""

from typing import Any, NamedTuple, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from gpt2core.kernels import has_bf16_instructions, has_onednn, onednn_linear, prepack

MIN_MULTIPLICATIONS = 2**20  # multiplications; below this, oneDNN's call overhead is larger than its gain
MIN_ROWS = 32  # rows of x; below this, converting a bf16 weight to fp32 takes longer than it saves


class PrepackedWeight(NamedTuple):
    """A frozen weight matrix, prepacked in oneDNN's memory layout.

    Without prepacking, oneDNN reorders the weight in every product, for a twelfth of the time. There are two copies,
    since the forward and the backward product read different layouts.
    """

    weight: Tensor
    transposed: Tensor

    @classmethod
    def make(cls, weight: Tensor) -> Self:
        """Prepack a weight (out, in) in bf16."""
        return cls(prepack(weight), prepack(weight.t()))


class Linear(nn.Linear):
    """`nn.Linear`, computed by `linear`."""

    prepacked: PrepackedWeight | None = None  # replaces the weight in training runs that do not change it

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight if self.prepacked is None else self.prepacked, self.bias)


def linear(x: Tensor, weight: Tensor | PrepackedWeight, bias: Tensor | None = None) -> Tensor:
    """Compute `F.linear`, with another order of summation: (..., out) for x (..., in) and weight (out, in).

    With a prepacked weight, x must have the weight's dtype, and the bias gets no gradient.
    """
    if isinstance(weight, PrepackedWeight):
        return cast(Tensor, _PrepackedLinear.apply(x, weight, bias))
    if _is_for_onednn(x, weight):
        if torch.is_grad_enabled():
            return cast(Tensor, _Linear.apply(x, weight, bias))
        return _product(x, weight, bias)
    return F.linear(x, weight, bias)


def _is_for_onednn(x: Tensor, weight: Tensor) -> bool:
    """Return whether `_product` is faster than torch."""
    if x.device.type != "cpu" or x.dtype != weight.dtype or torch.is_autocast_enabled("cpu") or not has_onednn():
        return False
    if x.dtype == torch.bfloat16:
        return x.numel() >= MIN_ROWS * x.shape[-1] and not has_bf16_instructions()
    return x.dtype == torch.float32 and x.numel() * len(weight) >= MIN_MULTIPLICATIONS


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute the product in fp32, and convert it to x's dtype."""
    return onednn_linear(x.float(), weight.float(), None if bias is None else bias.float()).to(x.dtype)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        x_needs_grad, weight_needs_grad, bias_needs_grad = ctx.needs_input_grad
        inputs, grads = x.flatten(0, -2), grad.flatten(0, -2)  # (N, in), (N, out)
        weight_grad = None
        if weight_needs_grad:  # oneDNN copies its first operand: pass the smaller one first
            n_out, n_in = weight.shape
            weight_grad = _product(grads.t(), inputs.t()) if n_out < n_in else _product(inputs.t(), grads.t()).t()
        x_grad = _product(grad, weight.t()) if x_needs_grad else None
        return x_grad, weight_grad, grads.sum(0) if bias_needs_grad else None


class _PrepackedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, prepacked: PrepackedWeight, bias: Tensor | None) -> Tensor:
        ctx.transposed = prepacked.transposed
        return onednn_linear(x, prepacked.weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return onednn_linear(grad, ctx.transposed), None, None
