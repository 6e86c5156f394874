"""int8 decoding by native.c: matrix products fused with what surrounds them, low-rank deltas, attention.

The library is compiled when the project or the image of the steps is built (setup.py), and is copied into each Bento.
Where it is missing, or the processor or the shape of the model does not suit it, `quantized` computes with torch alone.

Weights have one scale per row of W; activations one scale and zero point per row of x, found at run time, so that rows
stay independent. The integer sums are exact, and all else of a row is computed by the same instructions in the same
order whatever other rows there are: results do not depend on the batch, to the bit.

Shape letters: N rows (tokens) of a step; H, D as in model.py.
"""

import ctypes
import logging
import sys
from collections.abc import Sequence
from functools import cache
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from gpt2core.config import GPT2Config
from gpt2core.inference.kernels import has_vnni, on_huge_pages

logger = logging.getLogger(__name__)

NAME = "gpt2core/inference/_native.abi3.so"
INTERFACE = 1  # as in native.c: a library that was compiled from another version is not used
CACHE_DTYPE = torch.float16  # of keys and values: half the bytes that attention reads, at 11 bits
HEAD_WIDTHS = (16, 32, 64)  # that the attention is compiled for
TILE = 64  # rows of W that are stored together


def is_available(config: GPT2Config) -> bool:
    """Whether the library, the processor and the shape of the model allow it."""
    suits = (
        config.n_embd % 16 == 0
        and config.mlp_width % 16 == 0
        and config.n_embd // config.n_head in HEAD_WIDTHS
        and config.activation_function in ("gelu_new", "gelu_pytorch_tanh")
    )
    return suits and has_vnni() and _is_compiled()


@cache
def _is_compiled() -> bool:
    file = library_file()
    if file is not None and getattr(ctypes.CDLL(str(file)), "interface", int)() == INTERFACE:
        return True
    logger.warning(
        "int8 without its kernels, which are missing or old, is half as fast: `pip install -e .` builds them"
    )
    return False


def library_file() -> Path | None:
    """The compiled kernels: beside this module or, in the image of the steps, in the environment."""
    candidates = (Path(__file__).parents[2] / NAME, Path(sys.prefix) / "lib" / NAME)
    return next((file for file in candidates if file.is_file()), None)


@cache
def _functions() -> ctypes.CDLL:
    library = ctypes.CDLL(str(library_file()))
    library.set_threads(ctypes.c_int(torch.get_num_threads()))
    return library


class Norm(Protocol):
    """A layer norm: weight and bias (C), in fp32."""

    weight: Tensor
    bias: Tensor
    eps: float


class _Matrix(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("weights", "scale", "bias", "sums")),
        *((name, ctypes.c_int64) for name in ("n_in", "n_out", "n_tiles")),
    )


class _Product(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("matrix", "x", "norm_weight", "norm_bias")),
        *(("eps", ctypes.c_float), ("applies_gelu", ctypes.c_int32), ("adds", ctypes.c_int32), ("n", ctypes.c_int64)),
        *((name, ctypes.c_void_p) for name in ("y", "normed", "q", "step", "zero")),
    )


class _Sequence(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("k", "v")),
        *((name, ctypes.c_int64) for name in ("layer_stride", "head_stride", "past", "n", "row")),
    )


class _Attention(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("qkv", "y", "sequences")),
        *((name, ctypes.c_int64) for name in ("n_sequences", "n_heads", "width", "layer")),
        ("scale", ctypes.c_float),
    )


class _LowRank(ctypes.Structure):
    _fields_ = (("a", ctypes.c_void_p), ("b", ctypes.c_void_p), ("rank", ctypes.c_int64))


class _Logits(ctypes.Structure):
    _fields_ = (
        ("logits", ctypes.c_void_p),
        ("n", ctypes.c_int64),
        ("width", ctypes.c_int64),
        ("tokens", ctypes.c_void_p),
    )


class _Delta(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "y", "adapters", "rows")),
        *((name, ctypes.c_int64) for name in ("n", "n_in", "n_out")),
    )


class Scratch:
    """Memory that the products of one model share. One step at a time may use it."""

    def __init__(self, widest: int) -> None:
        """`widest`: inputs of a product at most."""
        _functions()  # in the thread that makes the model: the engine's has one thread of torch's
        self._widest, self._n = widest, 0
        self.reserve(1)

    def reserve(self, n: int) -> None:
        """Allocate memory for n rows, unless there is as much."""
        if n > self._n:
            self._n, size = n, n * self._widest
            self._tensors = (
                *(torch.empty(size), torch.empty(size, dtype=torch.uint8)),
                *(torch.empty(n), torch.empty(n, dtype=torch.int32)),
            )
            self.addresses = tuple(one.data_ptr() for one in self._tensors)

    def normed(self, n: int, width: int) -> Tensor:
        """(n, width), what the last product's norm returned."""
        return self._tensors[0][: n * width].view(n, width)


class Int8Linear:
    """x W^T + b, from W (out, in) in fp32."""

    def __init__(self, weight: Tensor, bias: Tensor | None, scratch: Scratch) -> None:
        self.shape = n_out, n_in = weight.shape
        padding = -n_out % TILE
        scale = (weight.abs().amax(1) / 127).clamp(min=1e-30)  # (out)
        whole = F.pad((weight / scale[:, None]).round().to(torch.int8), (0, 0, 0, padding))
        self._tensors = (
            on_huge_pages(whole.view(-1, TILE, n_in // 4, 4).transpose(1, 2)),
            F.pad(scale, (0, padding)),
            F.pad(weight.new_zeros(n_out) if bias is None else bias.float(), (0, padding)),
            whole.sum(1, dtype=torch.int32),
        )
        self._matrix = _Matrix(*(one.data_ptr() for one in self._tensors), n_in, n_out, len(self._tensors[0]))
        self._call, self._scratch = _Product(ctypes.addressof(self._matrix)), scratch

    def __call__(self, x: Tensor, norm: Norm | None = None, gelu: bool = False, add_to: Tensor | None = None) -> Tensor:
        """(N, out) for x (N, in), all in fp32.

        Args:
            norm: applied to x first.
            gelu: applied to the result, by its tanh form.
            add_to: (N, out), contiguous, to which the result is added in place.
        """
        x, n, call, scratch = x.contiguous(), x.size(0), self._call, self._scratch
        scratch.reserve(n)
        y = torch.empty(n, self.shape[0]) if add_to is None else add_to
        call.x, call.y, call.n, call.applies_gelu, call.adds = x.data_ptr(), y.data_ptr(), n, gelu, add_to is not None
        call.norm_weight = None if norm is None else norm.weight.data_ptr()
        if norm is not None:
            call.norm_bias, call.eps = norm.bias.data_ptr(), norm.eps
        call.normed, call.q, call.step, call.zero = scratch.addresses
        _functions().product(ctypes.byref(call))
        return y


def most_likely(logits: Tensor) -> Tensor:
    """`gpt2core.sampling.most_likely` for contiguous logits (N, V) in fp32; of several, the first."""
    tokens = torch.empty(len(logits), dtype=torch.long)
    call = _Logits(logits.data_ptr(), *logits.shape, tokens.data_ptr())
    _functions().most_likely(ctypes.byref(call))
    return tokens


def gelu_(x: Tensor) -> None:
    """Apply GELU by its tanh form to contiguous x in place, rounded as `Int8Linear` rounds it."""
    _functions().gelu_rows(ctypes.c_void_p(x.data_ptr()), ctypes.c_int64(x.numel()))


class Span(NamedTuple):
    """Keys and values of one sequence in a cache of CACHE_DTYPE, whose last dimensions are (..., tokens, D)."""

    k: int  # address of its first token's keys, of the first layer and head
    v: int
    layer_stride: int  # in elements, of k and of v
    head_stride: int
    past: int  # tokens that it holds
    n: int  # new tokens, which are written behind them


class CachedAttention:
    """Causal attention of a step's new tokens to what the caches hold of their sequences, and to each other."""

    def __init__(self, spans: Sequence[Span], scales: Sequence[float]) -> None:
        """`spans`: in the order of the step's tokens. `scales`: of each layer."""
        rows = accumulate((span.n for span in spans), initial=0)
        self._sequences = (_Sequence * len(spans))(
            *(_Sequence(*span, row) for span, row in zip(spans, rows, strict=False))
        )
        self._scales = scales
        self._call = _Attention(sequences=ctypes.addressof(self._sequences), n_sequences=len(spans))

    def __call__(self, layer: int, qkv: Tensor) -> Tensor:
        """(N, C) for contiguous qkv (N, 3, H, D); the caches of `layer` get the new keys and values."""
        n, _, n_heads, width = qkv.shape
        y, call = torch.empty(n, n_heads * width), self._call
        call.qkv, call.y, call.n_heads, call.width = qkv.data_ptr(), y.data_ptr(), n_heads, width
        call.layer, call.scale = layer, self._scales[layer]
        _functions().attend(ctypes.byref(call))
        return y


class Deltas:
    """The low-rank products of several adapters with one layer."""

    def __init__(self, pairs: Sequence[tuple[Tensor, Tensor] | None]) -> None:
        """Per adapter: A (rank, in) and B (out, rank), contiguous; None: it does not change this layer."""
        self._kept = [None if pair is None else (pair[0], pair[1].T.contiguous()) for pair in pairs]
        self._table = (_LowRank * len(pairs))(
            *(
                _LowRank() if pair is None else _LowRank(*(one.data_ptr() for one in pair), len(pair[0]))
                for pair in self._kept
            )
        )

    def add_(self, y: Tensor, x: Tensor, rows: Tensor) -> None:
        """Add each row's own product to y (N, out); x is (N, in), rows (N) int64: its adapter, or -1 for none."""
        call = _Delta(x.data_ptr(), y.data_ptr(), ctypes.addressof(self._table), rows.data_ptr())
        call.n, call.n_in, call.n_out = len(x), x.shape[1], y.shape[1]
        _functions().add_deltas(ctypes.byref(call))
