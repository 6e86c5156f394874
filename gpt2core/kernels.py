"""Every private or platform-specific call of gpt2core: oneDNN operators, the OpenMP runtime, anonymous memory.

Written against torch 2.13. `tests/gpt2core/test_kernels.py` fails if an operator was removed or has another signature.
It also fails if torch's public API can do the same, so that the workaround can be removed.
"""

import ctypes
import gc
import logging
import mmap
import os
import platform
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from math import prod
from threading import Lock
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor

logger = logging.getLogger(__name__)

T = TypeVar("T")


def has_onednn(dtype: torch.dtype = torch.float32) -> bool:
    """Return whether torch was built with oneDNN, and oneDNN has products of this dtype on this processor.

    It has none in bf16 for x86 processors without AVX-512. Private because torch has no public test for it.
    """
    if not torch.backends.mkldnn.is_available():
        return False
    return dtype != torch.bfloat16 or cast(bool, torch.ops.mkldnn._is_mkldnn_bf16_supported())


@cache
def has_bf16_instructions() -> bool:
    """Return whether oneDNN computes bf16 products with bf16 instructions of this processor.

    On x86 processors without these instructions, oneDNN's bf16 products have a fifth of its fp32 throughput. The calls
    are private because `torch.cpu.get_capabilities`, the public one, may be missing in torch 2.11.
    """
    if not has_onednn(torch.bfloat16):
        return False
    is_x86 = platform.machine().lower() in ("x86_64", "amd64")
    return not is_x86 or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def has_onednn_int8() -> bool:
    """Return whether oneDNN has an exact int8 matrix product (`int8_product`) on this processor.

    On x86 processors without VNNI it adds two products in 16 bits, which is too few: such sums are cut off.
    """
    return "onednn" in torch.backends.quantized.supported_engines and has_vnni()


def has_vnni() -> bool:
    """Return whether the processor has AVX-512 VNNI, int8 products. The public test may be missing in torch 2.11."""
    return cast(bool, torch.cpu._is_vnni_supported())


def has_avx2() -> bool:
    """Return whether the processor has AVX2 and FMA."""
    return torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")


def onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute x W^T + b with oneDNN for x (..., in) and W (out, in), plain or from `prepack`.

    Private because torch sends fp32 products to MKL, which does not use AVX-512 on AMD processors. The public route,
    `F.linear(x.to_mkldnn(), ...).to_dense()`, copies both operands; `torch.backends.mkldnn.matmul.fp32_precision`
    computes in bf16 (docs/decisions/0012-fp32-matrix-products.md).
    """
    return cast(Tensor, torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], ""))


def prepack(weight: Tensor) -> Tensor:
    """Return W (out, in) in oneDNN's memory layout, for `onednn_linear`.

    Private because torch has no public prepacked layout for its inference kernels. Without prepacking, each bf16 call
    reorders the weight again: one row of 768 -> 3,072 takes 353 us instead of 238 us.
    """
    return cast(Tensor, torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), None))


def prepack_int8(weight: Tensor) -> Tensor:
    """Return an int8 matrix W (out, in) in oneDNN's memory layout, for `int8_product`."""
    return cast(Tensor, torch.ops.onednn.qlinear_prepack(weight, None))


def int8_product(x: Tensor, packed: Tensor, scale: Tensor, zero_points: Tensor) -> Tensor:
    """Compute (x - 128) W^T * scale in fp32 for uint8 x (N, in).

    Private because torch's public dynamic quantization (`torch.ao.quantization.quantize_dynamic`) uses one scale for
    all rows of x: an outlier of one request would change the results of the others.

    Args:
        packed: `prepack_int8(W)`.
        scale, zero_points: (out), one per row of W; the zero points are int32.
    """
    bias, output_scale, output_zero_point = None, 1.0, 0
    output = (bias, output_scale, output_zero_point, torch.float32)
    y = torch.ops.onednn.qlinear_pointwise(x, 1.0, 128, packed, scale, zero_points, *output, "none", [], "")
    return cast(Tensor, y)


def lazy_zeros(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return zeros. On a CPU, a page takes no physical memory until something is written to it.

    `torch.zeros` writes to every page, so a cache that reserves columns for many requests would occupy all its pages.
    """
    if device.type != "cpu" or not prod(shape):
        return torch.zeros(*shape, dtype=dtype, device=device)
    pages = mmap.mmap(-1, prod(shape) * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(pages, dtype=dtype).view(*shape)


def zeros_in_huge_pages(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Return zeros in pages of 2 MiB if Linux provides them; reading a matrix of int8 weights is then a fifth faster.

    The reason is that the processor's prefetchers stop at the end of a page. torch and its allocator have no call for
    huge pages.
    """
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.zeros(*shape, dtype=dtype)
    page, n_bytes = 2**21, prod(shape) * dtype.itemsize
    pages = mmap.mmap(-1, n_bytes + page, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    pages.madvise(mmap.MADV_HUGEPAGE)
    whole = torch.frombuffer(pages, dtype=torch.uint8)
    start = -whole.data_ptr() % page
    return whole[start : start + n_bytes].view(dtype).view(*shape)


@cache
@torch.inference_mode(False)  # also enables gradients
def has_varlen_attention(device: torch.device, head_width: int) -> bool:
    """Return whether `varlen_attention` works on the device: compare it, forward and backward, with masked attention.

    The comparison runs once. It is needed because the API is young: torch 2.10 has another signature, and the alignment
    of the causal mask with more keys than queries is not documented.
    """
    if device.type != "cuda":
        return False
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, 2, head_width, generator=generator).to(device, torch.bfloat16).requires_grad_()

    # two sequences: 5 queries with 9 keys, and 7 queries with 7 keys; the inputs are views, as in training
    qkv, kv, weight = random(12, 3), random(16, 2), random(12)
    q, k, v = qkv[:, 0], kv[:, 0], kv[:, 1]
    ends_q, ends_k = (torch.tensor(ends, dtype=torch.int32).to(device) for ends in ([0, 5, 12], [0, 9, 16]))
    mask = torch.block_diag(torch.ones(5, 9).tril(4), torch.ones(7, 7).tril()).bool().to(device)
    try:
        found = varlen_attention(q, k, v, ends_q, ends_k, 7, 9, scale=0.3)
        heads = q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1)
        expected = F.scaled_dot_product_attention(*heads, attn_mask=mask, scale=0.3).transpose(0, 1)
        for one, other in zip(
            (found, *torch.autograd.grad((found * weight).sum(), (qkv, kv))),
            (expected, *torch.autograd.grad((expected * weight).sum(), (qkv, kv))),
            strict=True,
        ):
            torch.testing.assert_close(one, other, rtol=0.05, atol=0.05)  # two roundings to the 8 bits of bf16
    except Exception as error:  # training then pads records of similar length
        reason = str(error).partition("\n")[0]
        logger.warning("records are trained in padded groups, which is slower: %s", reason)
        return False
    return True


def varlen_attention(
    q: Tensor, k: Tensor, v: Tensor, ends_q: Tensor, ends_k: Tensor, max_q: int, max_k: int, scale: float
) -> Tensor:
    """Compute causal attention (N, H, D) of concatenated sequences, in bf16 on a GPU.

    The causal mask is aligned to the end of a sequence: its last query attends to all of its keys.

    Args:
        q, k, v: (N, H, D), and twice (M, H, D).
        ends_q, ends_k: cumulative sequence lengths, int32 and starting with 0, like flash-attention's cu_seqlens:
            sequence i has the queries ends_q[i] to ends_q[i + 1].
        max_q, max_k: the largest number of queries and of keys of a sequence, or an upper bound.
    """
    from torch.nn.attention.varlen import varlen_attn  # not in every version of torch, and slow to import

    y = varlen_attn(q, k, v, ends_q, ends_k, max_q, max_k, scale=scale, window_size=(-1, 0))
    return cast(Tensor, y)


def softmax_gradient(grad: Tensor, y: Tensor) -> Tensor:
    """Compute the gradient of softmax's input from `grad`, the gradient of its output y (..., n).

    Private because public operators take three passes, and round to y's dtype after each of them.
    """
    return cast(Tensor, torch._softmax_backward_data(grad, y, -1, y.dtype))


_CAPTURING = Lock()  # a process can capture one graph at a time


@cache
def _capture_stream(device: torch.device) -> "torch.cuda.Stream":
    """Return the device's stream for captures. All graphs use the same stream, so that they can share memory."""
    return torch.cuda.Stream(device)


def capture_graph(compute: Callable[[], T], device: torch.device, pool: Any = None) -> "tuple[torch.cuda.CUDAGraph, T]":
    """Capture `compute` as a CUDA graph; return the graph and its outputs, tensors that each replay writes.

    Args:
        pool: memory pool of another graph to share; the two graphs must never run at the same time. None: a new pool.

    Raises:
        RuntimeError: the device cannot capture `compute`. The current stream is restored.
    """
    graph = torch.cuda.CUDAGraph()
    # torch.cuda.graph would wait for the device and empty the allocator's caches each time, which takes about 100 ms
    with _CAPTURING, torch.cuda.device(device), torch.cuda.stream(_capture_stream(device)):
        if pool is None:
            gc.collect()  # autograd nodes in reference cycles keep the stream of earlier steps: the capture would fail
            torch.cuda.empty_cache()  # graphs cannot use memory that torch's allocator has cached
            pool = torch.cuda.graph_pool_handle()
        was_enabled = gc.isenabled()  # not before: a capture of another thread disables it
        gc.disable()  # during a capture, the garbage collector must not free another graph
        try:
            graph.capture_begin(pool=pool, capture_error_mode="thread_local")  # other threads may use the device
            outputs = compute()
            graph.capture_end()
        except BaseException:
            _discard_capture(graph, device, pool)
            raise
        finally:
            if was_enabled:
                gc.enable()
    return graph, outputs


def _discard_capture(graph: "torch.cuda.CUDAGraph", device: torch.device, pool: Any) -> None:
    """End a capture that has failed, and release its memory.

    Private because torch's `capture_end` of an invalid capture raises before it tells the allocator and the generator
    of random numbers. The allocator would then keep the memory, and not free cached memory if an allocation fails
    later. The generator (torch 2.11) would still count for the graph, and fail in the next dropout.
    """
    with suppress(RuntimeError):  # its message says only that the capture has failed
        graph.capture_end()
    with suppress(RuntimeError):  # the capture was valid, so the graph releases its memory itself
        torch._C._cuda_endAllocateToPool(device.index, pool)
        torch._C._cuda_releasePool(device.index, pool)
        generator = torch.cuda.default_generators[device.index]
        generator.graphsafe_set_state(generator.clone_state())  # the copy does not belong to a graph


@contextmanager
def returning_freed_memory() -> Iterator[None]:
    """Context manager within which the memory of freed tensors is returned to the operating system at once.

    Otherwise glibc's allocator keeps freed blocks of up to 32 MiB, and seldom reuses them for aligned blocks such as
    torch's. Quantizing gpt2-medium took 1.9 GB that way, and the process kept them. torch has no call for it.
    """
    set_option = getattr(ctypes.CDLL(None), "mallopt", lambda option, value: 0)  # only glibc has mallopt
    trim_threshold, mmap_threshold = -1, -3
    set_option(mmap_threshold, 2**18)
    try:
        yield
    finally:
        # mallopt disables glibc's dynamic thresholds. glibc itself would set these values after freeing a large block.
        set_option(mmap_threshold, 2**25)
        set_option(trim_threshold, 2**26)


def release_openmp_workers() -> None:
    """End the OpenMP worker threads of the calling thread; they start again when the thread computes.

    GNU's OpenMP keeps workers for every thread that ever computed. If there are more workers than cores, all of them
    sleep between operations: a step of gpt2 takes 9.4 ms instead of 5.8 ms (two cores). torch has no call for it.
    """
    if (openmp := _openmp()) is not None:
        openmp.omp_pause_resource_all(1)  # omp_pause_soft: OpenMP 5.0, section 3.2.44


def limit_openmp_threads() -> None:
    """Make torch use a single thread for operations of the calling thread, which also uses the thread pool of native.c.

    OpenMP's workers keep their core for a while after each operation, when the pool needs it. Private because
    `torch.set_num_threads` also sets the number for threads that start later.
    """
    if (openmp := _openmp()) is not None:
        openmp.omp_set_num_threads(1)


@cache
def _openmp() -> ctypes.CDLL | None:
    """Return the GNU OpenMP runtime that torch has loaded; None: torch uses another runtime."""
    try:
        return ctypes.CDLL("libgomp.so.1", mode=os.RTLD_NOW | os.RTLD_NOLOAD)
    except (OSError, AttributeError):
        return None
