"""int8 decoding by native.c: all layers of a step in one call, with attention and the low-rank products of adapters.

native.c is compiled with avx512.h for processors with AVX-512 VNNI, and with avx2.h for others (vectors.h), when the
project or the step image is built (setup.py). Both libraries are copied into each Bento. If they are missing, or do not
support the processor or the model's shape, `quantized` uses torch alone, or refuses int8.

Weights have one scale per row of W. Activations have one scale and zero point per row of x, computed at run time, so
that rows stay independent. The integer sums are exact. Everything else in a row is computed by the same instructions in
the same order regardless of the other rows. Results are therefore bit-identical in any batch.

Shape letters: N rows (tokens) of a step; C, H, D as in model.py.
"""

import ctypes
import logging
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from gpt2core.config import GenerationConfig, GPT2Config, LoraTarget
from gpt2core.kernels import has_avx2, has_vnni, zeros_in_huge_pages
from gpt2core.lora import LAYER_PATHS, TARGET_LAYERS
from gpt2core.sampling import sampling_values

logger = logging.getLogger(__name__)

# The libraries and the tests of processors for them, the fastest first
LIBRARIES = {
    "gpt2core/inference/_native_avx512.abi3.so": has_vnni,
    "gpt2core/inference/_native_avx2.abi3.so": has_avx2,
}
INTERFACE = 8  # the same number as in native.c: a library that was compiled from another version is not used
CACHE_DTYPE = torch.int8  # dtype of cached keys and values, which have one scale per token and head
ADAPTER_DTYPE = torch.bfloat16  # dtype of low-rank matrices; its error is far below the error of int8 weights
HEAD_WIDTHS = (16, 32, 64)  # head widths that the attention is compiled for
MAX_INPUTS = 2**16  # inputs of a matrix: the sum of more products may exceed 32 bits
MAX_POSITIONS = 16384  # longest sequence: its attention scores are on the stack of a thread
ROWS = 512  # rows of W that are quantized at a time; whole tiles
LANES = 16  # floats in a vector
RANKS = 4  # the rank of an adapter is padded to a multiple of this


def is_available(config: GPT2Config) -> bool:
    """Return whether the library, the processor and the shape of the model allow the kernels."""
    suits = (
        config.n_embd % 16 == config.mlp_width % 16 == 0
        and max(config.n_embd, config.mlp_width) <= MAX_INPUTS
        and config.head_width in HEAD_WIDTHS
        and config.n_positions <= MAX_POSITIONS
        and config.activation_function in ("gelu_new", "gelu_pytorch_tanh")
    )
    return suits and library_name() is not None


@cache
def library_name() -> str | None:
    """Return the one of LIBRARIES to use: the fastest for this processor that is compiled. None: there is none."""
    suiting = [name for name, suits in LIBRARIES.items() if suits()]
    found = next((name for name in suiting if _is_current(name)), None)
    if suiting and found is None:
        logger.warning(
            "the int8 kernels are missing or outdated, so int8 is slow or refused; `pip install -e .` builds them"
        )
    return found


def library_files() -> dict[str, Path]:
    """Return the compiled libraries: next to this module or, in the step image, in the Python environment."""
    candidates = {name: (Path(__file__).parents[2] / name, Path(sys.prefix) / "lib" / name) for name in LIBRARIES}
    return {name: file for name, files in candidates.items() for file in files[::-1] if file.is_file()}


def _is_current(name: str) -> bool:
    file = library_files().get(name)
    return file is not None and getattr(ctypes.CDLL(str(file)), "interface", int)() == INTERFACE


class _Library(NamedTuple):
    functions: ctypes.CDLL
    tile: int  # rows of W that are stored together
    group: torch.dtype  # int16 or int32: holds two or four weights that are stored together


def _library() -> _Library:
    return _load(library_name() or "")


@cache
def _load(name: str) -> _Library:
    functions = ctypes.CDLL(str(library_files()[name]))
    functions.set_threads(ctypes.c_int(torch.get_num_threads()))
    tile, group = (ctypes.c_int.in_dll(functions, constant).value for constant in ("tile", "group"))
    return _Library(functions, tile, {2: torch.int16, 4: torch.int32}[group])


def _functions() -> ctypes.CDLL:
    return _library().functions


class LayerNormWeights(Protocol):
    """A layer norm: weight and bias (C), in fp32."""

    weight: Tensor
    bias: Tensor
    eps: float


class BlockWeights(Protocol):
    """A layer of the model."""

    ln_1: LayerNormWeights
    ln_2: LayerNormWeights
    scale: float  # scale of the attention scores

    @property
    def projections(self) -> "Sequence[Int8Linear]":
        """The four matrices: attention input, attention output, MLP input, MLP output."""


def _fields(kind: type, *names: str) -> list[tuple[str, type]]:
    return [(name, kind) for name in names]


class _Matrix(ctypes.Structure):
    _fields_ = [
        *_fields(ctypes.c_void_p, "weights", "scale", "bias", "sums"),
        *_fields(ctypes.c_int64, "n_in", "n_out", "n_tiles"),
    ]


class _Scratch(ctypes.Structure):
    _fields_ = _fields(ctypes.c_void_p, "normed", "q", "scale", "zero")


class _Product(ctypes.Structure):
    _fields_ = [
        *_fields(ctypes.c_void_p, "matrix", "x", "norm_weight", "norm_bias", "y"),
        ("scratch", _Scratch),
        ("n", ctypes.c_int64),
        ("eps", ctypes.c_float),
        *_fields(ctypes.c_int32, "applies_gelu", "adds"),
    ]


class _LowRank(ctypes.Structure):
    _fields_ = [*_fields(ctypes.c_void_p, "a", "b"), *_fields(ctypes.c_int64, "rank", "first", "width")]


class _Layer(ctypes.Structure):
    _fields_ = [("matrices", ctypes.c_void_p * 4), ("norms", ctypes.c_void_p * 4), ("scale", ctypes.c_float)]


class _Step(ctypes.Structure):
    _fields_ = [
        *_fields(ctypes.c_void_p, "layers", "sequences", "adapters", "rows", "x", "qkv", "y", "a"),
        ("scratch", _Scratch),
        *_fields(ctypes.c_int64, "n", "n_layers", "n_sequences", "n_adapters", "n_heads", "width"),
        ("eps", ctypes.c_float),
    ]


class _Logits(ctypes.Structure):
    _fields_ = [
        ("logits", ctypes.c_void_p),
        *_fields(ctypes.c_int64, "n", "width"),
        ("tokens", ctypes.c_void_p),
    ]


class _Draw(ctypes.Structure):
    _fields_ = [
        *_fields(ctypes.c_void_p, "logits", "weights"),
        *_fields(ctypes.c_int64, "width", "top_k"),
        *_fields(ctypes.c_double, "top_p", "number"),
        *_fields(ctypes.c_float, "temperature", "min_p"),
        ("token", ctypes.c_int64),
    ]


class Scratch:
    """Scratch memory that the products of one model share. Only one step at a time may use it."""

    def __init__(self, width: int, mlp_width: int) -> None:
        """Allocate memory for one row of a model with this width and MLP width."""
        _functions()  # the library must load in this thread: the engine's thread has only one thread of torch
        self._width, self._mlp_width, self._n = width, mlp_width, 0
        self.reserve(1)

    def reserve(self, n: int) -> None:
        """Allocate memory for n rows, if less is allocated."""
        if n > self._n:
            self._n, widest = n, max(self._width, self._mlp_width)
            inputs = torch.empty(n, widest, dtype=torch.int16)  # or bytes
            quantized = inputs, torch.empty(n), torch.empty(n, dtype=torch.int32)
            self._for_products = torch.empty(n, self._width), *quantized
            self._for_layers = tuple(torch.empty(n, k) for k in (3 * self._width, self._width, self._mlp_width))
            self.of_product = _Scratch(*(tensor.data_ptr() for tensor in self._for_products))
            self.of_layers = [tensor.data_ptr() for tensor in self._for_layers]


class Int8Linear:
    """Compute x W^T + b with W (out, in) quantized to int8, one scale per row."""

    def __init__(self, weight: Tensor, bias: Tensor | None, scratch: Scratch) -> None:
        self.shape = n_out, n_in = weight.shape
        _, tile, group = _library()
        n_tiles, n_groups = -(-n_out // tile), n_in // group.itemsize
        tiles = zeros_in_huge_pages((n_tiles, n_groups, tile), group)
        scale, padded_bias, sums = torch.zeros(3, n_tiles * tile)
        if bias is not None:
            padded_bias[:n_out] = bias
        rows = torch.empty(min(n_out, ROWS), n_in)
        for first in range(0, n_out, ROWS):
            part = weight[first : first + ROWS]
            quantized, at = rows[: len(part)].copy_(part), slice(first, first + len(part))
            scale[at] = (torch.maximum(quantized.amax(1), -quantized.amin(1)) / 127).clamp(min=1e-30)
            quantized.div_(scale[at, None]).round_()
            sums[at] = quantized.sum(1)  # exact in fp32 for up to 2**17 numbers of at most 127
            padded = F.pad(quantized.to(torch.int8), (0, 0, 0, -len(quantized) % tile))
            stored = padded.view(group).view(-1, tile, n_groups)
            tiles[first // tile :][: len(stored)] = stored.transpose(1, 2)
        self._tensors = tiles, scale, padded_bias, sums.to(torch.int32)
        self._matrix = _Matrix(*(tensor.data_ptr() for tensor in self._tensors), n_in, n_out, n_tiles)
        self.address = ctypes.addressof(self._matrix)
        self._scratch = scratch

    def __call__(self, x: Tensor, norm: LayerNormWeights | None = None) -> Tensor:
        """Return (N, out) for x (N, in), both in fp32. If `norm` is given, it is applied to x first."""
        x, n = x.contiguous(), len(x)
        y = torch.empty(n, self.shape[0])
        self._scratch.reserve(n)
        call = _Product(self.address, x.data_ptr(), y=y.data_ptr(), scratch=self._scratch.of_product, n=n)
        if norm is not None:
            call.norm_weight, call.norm_bias, call.eps = norm.weight.data_ptr(), norm.bias.data_ptr(), norm.eps
        _functions().product(ctypes.byref(call))
        return y


def most_likely(logits: Tensor) -> Tensor:
    """Compute `gpt2core.sampling.most_likely` of contiguous logits (N, V) in fp32; ties go to the lowest token id."""
    tokens = torch.empty(len(logits), dtype=torch.long)
    call = _Logits(logits.data_ptr(), *logits.shape, tokens.data_ptr())
    _functions().most_likely(ctypes.byref(call))
    return tokens


def draw(scores: Sequence[Tensor], configs: Sequence[GenerationConfig], numbers: Sequence[float]) -> Tensor:
    """Compute `gpt2core.sampling.draw` of contiguous scores in fp32."""
    width = len(scores[0])
    weights = torch.empty(len(scores), 2, width)
    draws = (_Draw * len(scores))()
    for row, logits, row_weights, config, number in zip(draws, scores, weights, configs, numbers, strict=True):
        row.logits, row.weights, row.width, row.number = logits.data_ptr(), row_weights.data_ptr(), width, number
        row.temperature, row.top_k, row.top_p, row.min_p = sampling_values(config, width)
    _functions().draw(draws, ctypes.c_int64(len(draws)))
    return torch.tensor([row.token for row in draws])


def n_heads_with_scales(n_head: int, head_width: int) -> int:
    """Return the number of heads to allocate per token in a cache of CACHE_DTYPE.

    The scales (one fp32 number per head) are stored after the model's heads, in the bytes of additional heads.
    """
    return n_head + -(-n_head * torch.float32.itemsize // head_width)


class Span(NamedTuple):
    """Location of one sequence in a cache of CACHE_DTYPE: tokens in order, all heads of a token next to each other."""

    k: int  # address of the first token's keys in the first layer
    v: int  # address of the first token's values in the first layer
    layer_stride: int  # bytes from one layer to the next, for keys and for values
    past: int  # number of cached tokens
    n: int  # number of new tokens, whose keys and values are written after the cached ones


def span(kv: Tensor, past: int, n: int) -> Span:
    """Return the `Span` of a cache (n_layer, 2, H, T, D) that holds a single sequence."""
    keys, values = kv[0, :, 0]
    return Span(keys.data_ptr(), values.data_ptr(), kv.stride(0), past, n)


class LowRankMatrices:
    """The low-rank matrices of one adapter in one buffer, in the order in which a step reads them."""

    def __init__(self, matrices: Mapping[tuple[int, LoraTarget], tuple[Tensor, Tensor]]) -> None:
        """
        Args:
            matrices: (layer, target) -> A (rank, in) and B (width, rank), in ADAPTER_DTYPE.
        """
        parts, shapes = list[Tensor](), {}
        for layer, target in sorted(matrices, key=lambda key: (key[0], list(TARGET_LAYERS).index(key[1]))):
            a, b = matrices[layer, target]
            padding = (0, 0, 0, -len(a) % RANKS)
            a, b = F.pad(a, padding).unflatten(0, (-1, RANKS)), F.pad(b.T, padding)
            parts += a.unflatten(2, (-1, LANES)).transpose(1, 2), b.unflatten(1, (-1, LANES)).transpose(0, 1)
            shapes[layer, target] = b.shape  # (rank, width)
        flat = torch.cat([part.flatten() for part in parts])
        self._kept = zeros_in_huge_pages(flat.shape, flat.dtype).copy_(flat)
        self.entries: dict[tuple[int, LoraTarget], _LowRank] = {}
        address = self._kept.data_ptr()
        for i, ((layer, target), (rank, width)) in enumerate(shapes.items()):
            b_address = address + parts[2 * i].nbytes
            self.entries[layer, target] = _LowRank(
                address, b_address, rank, TARGET_LAYERS[target].position * width, width
            )
            address = b_address + parts[2 * i + 1].nbytes


class AdapterTable:
    """Table of the low-rank matrices of several adapters: [n_layer][matrices][adapters][slices of the output]."""

    def __init__(self, adapters: Sequence[LowRankMatrices], n_layer: int) -> None:
        most_slices = max(layer.n_slices for layer in TARGET_LAYERS.values())
        self.n_adapters, self._kept = len(adapters), adapters
        self._table = (_LowRank * (n_layer * len(LAYER_PATHS) * len(adapters) * most_slices))()
        for i, adapter in enumerate(adapters):
            for (layer, target), entry in adapter.entries.items():
                path, position, _ = TARGET_LAYERS[target]
                matrix = layer * len(LAYER_PATHS) + LAYER_PATHS.index(path)
                self._table[(matrix * len(adapters) + i) * most_slices + position] = entry
        self.address = ctypes.addressof(self._table)


class RowAdapters(NamedTuple):
    """The adapter of each row of a step."""

    table: AdapterTable
    rows: Tensor  # (N) int64: index of each row's adapter in the table; -1: no adapter


class Layers:
    """The transformer blocks of a model, computed by one call of native.c."""

    def __init__(self, blocks: Sequence[BlockWeights], n_head: int, scratch: Scratch) -> None:
        self._kept, self._scratch, self._n_head = blocks, scratch, n_head
        self._layers = (_Layer * len(blocks))()
        for layer, block in zip(self._layers, blocks, strict=True):
            layer.matrices[:] = [matrix.address for matrix in block.projections]
            layer.norms[:] = [p.data_ptr() for norm in (block.ln_1, block.ln_2) for p in (norm.weight, norm.bias)]
            layer.scale = block.scale

    def __call__(self, x: Tensor, spans: Sequence[Span], adapters: RowAdapters | None = None) -> Tensor:
        """Return the hidden states (N, C) after all layers.

        Args:
            x: the tokens' embeddings (N, C), in fp32 and contiguous. They are overwritten by the result.
            spans: location in the cache of each sequence, in the order of the tokens. The keys and values of the new
                tokens are written there.
        """
        n, C = x.shape
        self._scratch.reserve(n)
        starts = accumulate((sequence.n for sequence in spans), initial=0)
        numbers = [number for sequence, start in zip(spans, starts, strict=False) for number in (*sequence, start)]
        sequences = (ctypes.c_int64 * len(numbers))(*numbers)
        call = _Step(
            *(ctypes.addressof(self._layers), ctypes.addressof(sequences)),
            *((None, None) if adapters is None else (adapters.table.address, adapters.rows.data_ptr())),
            *(x.data_ptr(), *self._scratch.of_layers),
            self._scratch.of_product,
            *(n, len(self._layers), len(spans), 0 if adapters is None else adapters.table.n_adapters),
            *(self._n_head, C // self._n_head, self._kept[0].ln_1.eps),
        )
        _functions().step(ctypes.byref(call))
        return x
