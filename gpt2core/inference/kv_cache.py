"""The engine's key-value caches: for prompts being processed, requests being decoded, and shared prompt prefixes.

Shape letters: B rows, W columns attended to; T, S, C, H and D as in model.py.
"""

from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Sequence
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

from gpt2core import cuda
from gpt2core.config import GPT2Config
from gpt2core.inference.adapters import Adapter
from gpt2core.inference.native import CACHE_DTYPE, Span, n_heads_with_scales
from gpt2core.inference.request import Request
from gpt2core.kernels import lazy_zeros, varlen_attention
from gpt2core.tensors import int_tensor, to_device

# Tokens per block, the unit in which prompts share cached prefixes. Blocks are larger on a GPU: each block is one copy,
# and launching a copy takes about 30 us, longer than a GPU takes to compute a few tokens.
BLOCK, BLOCK_CUDA = 8, 64


def new_cache(shape: Sequence[int], dtype: torch.dtype, device: torch.device, zeros: bool = False) -> Tensor:
    """Allocate memory for keys and values (..., H, T, D).

    The layout in memory is (T, H, D) for the int8 kernels (CACHE_DTYPE), because they read token by token; it has
    additional heads for the scales. Otherwise it is (H, T, D), which is faster with torch's attention.

    Args:
        zeros: fill with zeros; on a CPU, only pages that are written take physical memory. False: uninitialized.
    """
    *outer, H, T, D = shape
    by_token = dtype == CACHE_DTYPE
    stored = (*outer, T, n_heads_with_scales(H, D), D) if by_token else shape
    cache = lazy_zeros(stored, dtype, device) if zeros else torch.empty(stored, dtype=dtype, device=device)
    return cache.transpose(-3, -2) if by_token else cache


class PrefillCache:
    """A prompt being processed, with the keys and values (n_layer, 2, H, T, D) of its first `length` tokens."""

    def __init__(
        self, request: Request, config: GPT2Config, dtype: torch.dtype, device: torch.device, prefix: Sequence[Tensor]
    ) -> None:
        """
        Args:
            prefix: the blocks that `PrefixCache.find` returned for the prompt.
        """
        self.request = request
        shape = (config.n_layer, 2, config.n_head, len(request.input_ids), config.head_width)
        self.kv = new_cache(shape, dtype, device)
        self.length = 0
        for block in prefix:
            self.kv[..., self.length : self.length + block.shape[-2], :] = block
            self.length += block.shape[-2]

    @property
    def remaining(self) -> int:
        """Number of prompt tokens that are not processed yet."""
        return len(self.request.input_ids) - self.length

    def attend(self, layer: int, qkv: Tensor, scale: float) -> Tensor:
        """Compute causal attention (T, C) of the next T tokens from qkv (T, 3, H, D); store their keys and values."""
        S, T = self.length, len(qkv)
        q = qkv[:, 0].transpose(0, 1)  # (H, T, D)
        self.kv[layer, :, :, S : S + T] = qkv[:, 1:].permute(1, 2, 0, 3)
        k, v = self.kv[layer, :, :, : S + T]  # two of (H, S + T, D)
        mask = None if S == 0 or T == 1 else torch.ones(T, S + T, dtype=torch.bool, device=q.device).tril(S)
        y = F.scaled_dot_product_attention(
            q[None], k[None], v[None], attn_mask=mask, is_causal=S == 0 and T > 1, scale=scale
        )
        return y[0].transpose(0, 1).flatten(1)

    def advance(self, n: int) -> None:
        """Mark n more tokens as processed. Call it after the last layer."""
        self.length += n


class PrefillBatch:
    """The next tokens of several prompts, with one attention call per layer for all of them (`varlen_attention`).

    It replaces the `attend` of the individual caches. One buffer of M tokens becomes the memory of all caches: for each
    prompt the cached tokens, then the next ones.
    """

    def __init__(self, prefills: Sequence[PrefillCache], n_new: Sequence[int]) -> None:
        """
        Args:
            n_new: number of next tokens of each prompt, at least one.
        """
        n_layer, _, H, _, D = prefills[0].kv.shape
        n_keys = [prefill.length + n for prefill, n in zip(prefills, n_new, strict=True)]
        self._kv = prefills[0].kv.new_empty(n_layer, sum(n_keys), 2, H, D)
        places = list[int]()
        for prefill, n, end, kv in zip(prefills, n_new, accumulate(n_keys), self._kv.split(n_keys, 1), strict=True):
            places += range(end - n, end)
            if prefill.length:
                kv[:, : prefill.length] = prefill.kv[..., : prefill.length, :].permute(0, 3, 1, 2, 4)
            prefill.kv = kv.permute(0, 2, 3, 1, 4)
        self._places = to_device(int_tensor(places), self._kv.device)
        self._ends_q, self._ends_k = (
            to_device(torch.tensor([0, *accumulate(n)], dtype=torch.int32), self._kv.device) for n in (n_new, n_keys)
        )
        self._max_q, self._max_k = max(n_new), max(n_keys)

    def attend(self, layer: int, qkv: Tensor, scale: float) -> Tensor:
        """Compute causal attention (N, C) of all next tokens from qkv (N, 3, H, D); store their keys and values."""
        kv = self._kv[layer].index_copy_(0, self._places, qkv[:, 1:])
        limits = self._ends_q, self._ends_k, self._max_q, self._max_k
        return varlen_attention(qkv[:, 0], kv[:, 0], kv[:, 1], *limits, scale).flatten(1)


class RowCache(ABC):
    """Requests being decoded, one row each. kv is (n_layer, max_batch, 2, H, columns, D).

    Subclasses decide at which columns a row's tokens are. Position embeddings are added before the first layer, so the
    column of a token does not have to be its position.
    """

    def __init__(self, config: GPT2Config, dtype: torch.dtype, device: torch.device, max_batch: int) -> None:
        self._shape = (config.n_layer, max_batch, 2, config.n_head, config.head_width)
        self._dtype, self._device = dtype, device
        self.kv = self._allocate(0)
        self.requests: list[Request | None] = []  # request of each row; None: the row is free
        self.lengths: list[int] = []  # number of cached tokens of each row

    @property
    def n_active(self) -> int:
        return sum(request is not None for request in self.requests)

    def inputs(self) -> tuple[list[int], list[int], list[Adapter | None]]:
        """Return each row's last token, the position of this token, and the adapter."""
        ids = [0 if request is None else request.tokens[-1] for request in self.requests]
        positions = [
            0 if request is None else length for request, length in zip(self.requests, self.lengths, strict=True)
        ]
        return ids, positions, [None if request is None else request.adapter for request in self.requests]

    @abstractmethod
    def attend(self, layer: int, qkv: Tensor, scale: float) -> Tensor:
        """Compute attention (B, C) of one new token per row from qkv (B, 3, H, D); store their keys and values."""

    def end_step(self) -> None:
        """Count the new token of each row. Call it after the last layer."""
        self.lengths = [0 if r is None else n + 1 for r, n in zip(self.requests, self.lengths, strict=True)]

    def add(self, prefill: PrefillCache) -> None:
        """Assign the first free row to a completely processed prompt, and copy its keys and values there."""
        row = next((i for i, request in enumerate(self.requests) if request is None), len(self.requests))
        if row == len(self.requests):
            self.requests.append(None)
            self.lengths.append(0)
        self.requests[row], self.lengths[row] = prefill.request, prefill.length
        self._write(row, prefill.kv)

    def remove(self, row: int) -> None:
        """Free the row."""
        self.requests[row], self.lengths[row] = None, 0

    def clear(self) -> None:
        """Free all rows, also in the middle of a step."""
        self.requests, self.lengths = [], []

    def compact(self) -> None:
        """Remove free rows at the end.

        While half of the rows or more are free, move the last row to the first free one.
        """
        while self.requests:
            if self.requests[-1] is None:
                self.requests.pop()
                self.lengths.pop()
            elif 2 * self.n_active <= len(self.requests):
                row, last = self.requests.index(None), len(self.requests) - 1
                self.requests[row], self.lengths[row] = self.requests[last], self.lengths[last]
                self._write(row, self.kv[:, last, :, :, self._columns(last)])
                self.remove(last)
            else:
                return

    @abstractmethod
    def _columns(self, row: int) -> slice:
        """Return the columns of the row's own tokens."""

    def _write(self, row: int, kv: Tensor) -> None:
        """Set the keys and values (n_layer, 2, H, T, D) of all the row's tokens."""
        self.kv[:, row, :, :, self._columns(row)] = kv

    def _allocate(self, columns: int) -> Tensor:
        """Allocate zeros, so that rows that are never used take no physical memory on a CPU."""
        *rows, D = self._shape
        return new_cache((*rows, columns, D), self._dtype, self._device, zeros=True)


class AlignedRowCache(RowCache):
    """Rows that all end at the same column.

                          end
        row 0   . . A A A A |        A: the row's own tokens, `lengths[row]` many
        row 1   . . . . A A |        .: columns that attention masks

    Each step appends one column for all rows, independent of their lengths.

    All columns outside a row's own tokens must be finite: attention masks them, but 0 * NaN is NaN. Therefore `remove`
    erases a finished request's columns, and moving rows allocates new memory.
    """

    SPARE = 256  # free columns after a move, before the rows have to be moved to the start again
    ALIGN = 64  # a move rounds `end` up to a multiple of this, so that prompts of similar length need no further move

    def __init__(self, config: GPT2Config, dtype: torch.dtype, device: torch.device, max_batch: int) -> None:
        super().__init__(config, dtype, device, max_batch)
        self.end = 0  # column after the last token of every row: the next one to write
        self._mask: Tensor | None = None
        # Views for the current step, one per layer: the new column (B, 2, H, D), keys and values (B, H, W, D) up to it.
        self._new: Sequence[Tensor] = ()
        self._k: Sequence[Tensor] = ()
        self._v: Sequence[Tensor] = ()

    def begin_step(self) -> None:
        """Reserve a column for the next token of each row and compute which columns each row attends to."""
        self._reserve_column()
        n, longest = len(self.requests), max(self.lengths)
        window = self.kv[:, :n, :, :, self.end - longest : self.end + 1]  # (n_layer, B, 2, H, W, D)
        self._new, self._k, self._v = window[..., -1, :].unbind(), window[:, :, 0].unbind(), window[:, :, 1].unbind()
        self._mask = None
        if min(self.lengths) < longest:
            lengths = torch.tensor(self.lengths, device=self.kv.device)[:, None]
            distance = torch.arange(longest, -1, -1, device=self.kv.device)  # from each column to the new one
            self._mask = (distance <= lengths)[:, None, None]  # (B, 1, 1, W)

    def begin_native_step(self) -> list[Span]:
        """Reserve a column for the next token of each row; native attention uses this instead of `begin_step`."""
        self._reserve_column()
        layer, row, key, _, token, _ = self.kv.stride()
        start, size = self.kv.data_ptr(), self.kv.element_size()
        spans = []
        for i, length in enumerate(self.lengths):
            k = start + size * (i * row + (self.end - length) * token)
            spans.append(Span(k, k + size * key, layer, length, 1))
        return spans

    def _reserve_column(self) -> None:
        if self.end == self.kv.shape[4]:
            self._move(max(self.lengths))

    def attend(self, layer: int, qkv: Tensor, scale: float) -> Tensor:
        self._new[layer].copy_(qkv[:, 1:])
        q = qkv[:, 0, :, None]  # (B, H, 1, D)
        y = F.scaled_dot_product_attention(q, self._k[layer], self._v[layer], attn_mask=self._mask, scale=scale)
        return y.flatten(1)

    def end_step(self) -> None:
        if self.requests:
            self.end += 1
            super().end_step()

    def remove(self, row: int) -> None:
        """Free the row and erase its keys and values."""
        self.kv[:, row, :, :, self._columns(row)] = 0
        super().remove(row)

    def clear(self) -> None:
        super().clear()
        self.end = 0
        self.kv = self._allocate(0)

    def compact(self) -> None:
        """As in `RowCache`. If no row is left, start again at the first column."""
        super().compact()
        if not self.requests:
            self.end = 0

    def _columns(self, row: int) -> slice:
        return slice(self.end - self.lengths[row], self.end)

    def _write(self, row: int, kv: Tensor) -> None:
        if self.end < self.lengths[row]:
            self._move(max(self.lengths))
        super()._write(row, kv)

    def _move(self, end: int) -> None:
        """Move the rows' columns so that they end at `end`, rounded up to ALIGN, with SPARE columns to grow into."""
        end = -(-end // self.ALIGN) * self.ALIGN
        n, n_kept = len(self.requests), min(self.end, end)
        window = self.kv[:, :n, ..., self.end - n_kept : self.end, :]
        if n_kept or end + self.SPARE > self.kv.shape[4]:
            self.kv = self._allocate(max(end + self.SPARE, self.kv.shape[4]))
            self.kv[:, :n, ..., end - n_kept : end, :] = window
        self.end = end


class StaticRowCache(RowCache):
    """Rows at fixed addresses, for steps that are replayed as a CUDA graph: a token's column is its position.

    kv has max_batch rows of n_positions columns from the start, and a step uses the first rows and columns (`shape`).
    The kernels of cuda.py read only the columns of a row's own tokens. Without them, attention reads all columns that
    the step uses, and masks the others. A row is not erased when its request ends, since a step that was launched ahead
    may still write to it.
    """

    WIDTH = 128  # smallest number of columns of a step; larger numbers are powers of two

    def __init__(self, config: GPT2Config, dtype: torch.dtype, device: torch.device, max_batch: int) -> None:
        super().__init__(config, dtype, device, max_batch)
        self.max_batch, self.n_positions = max_batch, config.n_positions
        self.kv = self._allocate(config.n_positions)
        self._rows = torch.arange(max_batch, device=device)
        self._kernels = cuda.kernels_for(config, dtype, device)  # None: attention by torch

    def shape(self) -> tuple[int, int]:
        """Return the numbers of rows and columns of the next step, rounded up so that few different shapes occur."""
        n, width = _power_of_two(len(self.requests)), _power_of_two(max(self.lengths) + 1)
        width = self.n_positions if self._kernels is not None else max(width, self.WIDTH)
        return min(n, self.max_batch), min(width, self.n_positions)

    def begin_step(self, positions: Tensor, width: int) -> None:
        """Prepare `attend` for the next tokens of the first B rows.

        Args:
            positions: (B), position of each row's next token.
            width: number of columns that attention reads without the kernels; above all positions.
        """
        B = len(positions)
        self._new = self._rows[:B], positions  # row and column of each new token
        if self._kernels is not None:
            return
        window = self.kv[:, :B, ..., :width, :]  # (n_layer, B, 2, H, W, D)
        self._windows = window.unbind()
        is_later = torch.arange(width, device=self.kv.device) > positions[:, None]  # (B, W)
        self._bias = torch.zeros(is_later.shape, dtype=self.kv.dtype, device=self.kv.device)
        self._bias = self._bias.masked_fill_(is_later, -torch.inf)[:, None, None]  # (B, 1, 1, W)

    def attend(self, layer: int, qkv: Tensor, scale: float) -> Tensor:
        rows, positions = self._new
        if self._kernels is not None:
            return self._kernels.attend(qkv, self.kv[layer], positions, scale)
        window = self._windows[layer]  # (B, 2, H, W, D)
        window[rows, :, :, positions] = qkv[:, 1:]
        q = qkv[:, 0, :, None]  # (B, H, 1, D)
        y = F.scaled_dot_product_attention(q, window[:, 0], window[:, 1], attn_mask=self._bias, scale=scale)
        return y.flatten(1)

    def _columns(self, row: int) -> slice:
        return slice(0, self.lengths[row])

    def _write(self, row: int, kv: Tensor) -> None:
        if self._kernels is None:  # masked columns must be finite, and earlier requests may have left NaN
            self.kv[:, row].zero_()
        super()._write(row, kv)


class PrefixCache:
    """Keys and values of prompt prefixes in blocks of tokens; the least recently used blocks are evicted.

    The key of a block is the adapter and all tokens up to the block's end, because its keys and values depend on them.
    The memory of evicted blocks is reused and never freed: on a CPU, touching a new page costs more than the copy.
    """

    CHUNK = 32  # number of blocks that are allocated together

    def __init__(self, max_bytes: int, block: int) -> None:
        """
        Args:
            block: tokens per block.
        """
        self._max_bytes, self._bytes, self._block = max_bytes, 0, block
        self._blocks: OrderedDict[tuple[Adapter | None, tuple[int, ...]], Tensor] = OrderedDict()
        self._free: list[Tensor] = []

    @property
    def n_tokens(self) -> int:
        return len(self._blocks) * self._block

    def find(self, adapter: Adapter | None, input_ids: Sequence[int]) -> list[Tensor]:
        """Return the cached blocks (n_layer, 2, H, block, D) at the start of the prompt, never with its last token."""
        blocks = []
        for end in range(self._block, len(input_ids), self._block):
            key = adapter, tuple(input_ids[:end])
            if key not in self._blocks:
                break
            self._blocks.move_to_end(key)
            blocks.append(self._blocks[key])
        return blocks

    def store(self, prefill: PrefillCache) -> None:
        """Copy the blocks of a completely processed prompt into the cache."""
        request = prefill.request
        for end in range(self._block, len(request.input_ids), self._block):
            key, block = (request.adapter, tuple(request.input_ids[:end])), prefill.kv[..., end - self._block : end, :]
            if key not in self._blocks and (place := self._allocate_block(block)) is not None:
                self._blocks[key] = place.copy_(block)

    def drop(self, adapter: Adapter) -> None:
        """Remove all blocks that were computed with the adapter."""
        self._free += [self._blocks.pop(key) for key in [key for key in self._blocks if key[0] is adapter]]

    def _allocate_block(self, block: Tensor) -> Tensor | None:
        """Return memory for a block of this shape; None if max_bytes is less than one block.

        Above max_bytes, the least recently used block is evicted, and its memory is returned.
        """
        n = min(self.CHUNK, (self._max_bytes - self._bytes) // block.nbytes)
        if not self._free and n:
            chunk = block.new_empty(n, *block.transpose(-3, -2).shape).transpose(-3, -2)
            self._free, self._bytes = [*chunk], self._bytes + chunk.nbytes
        if self._free:
            return self._free.pop()
        return self._blocks.popitem(last=False)[1] if self._blocks else None


def _power_of_two(n: int) -> int:
    """Return the smallest power of two that is at least n."""
    return 1 << (n - 1).bit_length()
