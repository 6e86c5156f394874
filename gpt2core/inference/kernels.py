"""Every private or platform-specific call of gpt2core: oneDNN operators, the OpenMP runtime, anonymous memory.

Written against torch 2.13. `tests/gpt2core/test_kernels.py` fails when an operator is gone or has another signature,
and when torch's public API does the same, so that the workaround can go.
"""

import ctypes
import mmap
import os
from collections.abc import Sequence
from functools import cache
from math import prod
from typing import cast

import torch
from torch import Tensor


def has_onednn() -> bool:
    """Whether torch was built with oneDNN and this processor runs it."""
    return torch.backends.mkldnn.is_available()


def has_int8(device: torch.device) -> bool:
    """Whether oneDNN's int8 matrix product runs on the device: x86 processors only."""
    return device.type == "cpu" and "onednn" in torch.backends.quantized.supported_engines


def onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b by oneDNN for x (..., in) and W (out, in), plain or from `prepack`.

    Private because torch sends fp32 products to MKL, which does not use AVX-512 on AMD processors. The public route,
    `F.linear(x.to_mkldnn(), ...).to_dense()`, copies both operands; `torch.backends.mkldnn.matmul.fp32_precision`
    computes in bf16 (docs/decisions/0012-fp32-products-by-onednn.md).
    """
    return cast(Tensor, torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], ""))


def prepack(weight: Tensor) -> Tensor:
    """W (out, in) in the memory layout that oneDNN reads, for `onednn_linear`.

    Private because torch has no public prepacked layout for its inference kernels; without it, each bf16 call reorders
    the weight again (238 us instead of 353 us for one row of 768 -> 3,072).
    """
    return cast(Tensor, torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), None))


def prepack_int8(weight: Tensor) -> Tensor:
    """An int8 matrix W (out, in) in oneDNN's layout, for `int8_product`."""
    return cast(Tensor, torch.ops.onednn.qlinear_prepack(weight, None))


def int8_product(x: Tensor, packed: Tensor, scale: Tensor, zero_points: Tensor) -> Tensor:
    """(x - 128) W^T * scale in fp32 for uint8 x (N, in), `prepack_int8(W)`, and scale and int32 zero points (out).

    Private because torch's public dynamic quantization (`torch.ao.quantization.quantize_dynamic`) uses one scale for
    all rows of x, so that one request's outlier would change the results of the others.
    """
    bias, output_scale, output_zero_point = None, 1.0, 0
    output = (bias, output_scale, output_zero_point, torch.float32)
    y = torch.ops.onednn.qlinear_pointwise(x, 1.0, 128, packed, scale, zero_points, *output, "none", [], "")
    return cast(Tensor, y)


def lazy_zeros(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros. On a CPU they take no physical memory until they are written.

    `torch.zeros` writes to every page, so a cache that reserves columns for many requests would occupy all of them.
    """
    if device.type != "cpu" or not prod(shape):
        return torch.zeros(*shape, dtype=dtype, device=device)
    pages = mmap.mmap(-1, prod(shape) * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(pages, dtype=dtype).view(*shape)


def release_openmp_workers() -> None:
    """End the OpenMP worker threads of the calling thread; they are started again when it computes.

    GNU's OpenMP keeps workers for every thread that ever computed. When there are more workers than cores, all of them
    sleep between operations: a step of gpt2 takes 9.4 ms instead of 5.8 ms (two cores). torch has no call for it.
    """
    if (openmp := _openmp()) is not None:
        openmp.omp_pause_resource_all(1)  # omp_pause_soft: OpenMP 5.0, section 3.2.44


@cache
def _openmp() -> ctypes.CDLL | None:
    """The GNU OpenMP runtime that torch has loaded; None where it uses another one."""
    try:
        return ctypes.CDLL("libgomp.so.1", mode=os.RTLD_NOW | os.RTLD_NOLOAD)
    except (OSError, AttributeError):
        return None
