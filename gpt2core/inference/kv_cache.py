"""Keys and values in the engine: of prompts being read, of replies being written, of how prompts begin.

Letters in the shape comments: B rows, W columns that are looked at; T, S, C, H and D as in model.py.
"""

import mmap
from collections import OrderedDict
from collections.abc import Sequence
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from gpt2core.inference.quantized import PackedModel
from gpt2core.inference.request import Adapter, Request

BLOCK = 16  # tokens; prompts that begin alike share keys and values by blocks


class Prefill:
    """A prompt that is being read, and the keys and values of its first `length` tokens: (n_layer, 2, H, T, D)."""

    def __init__(self, request: Request, packed: PackedModel, device: torch.device, found: Sequence[Tensor]) -> None:
        self.request = request
        config = packed.config
        shape = (config.n_layer, 2, config.n_head, len(request.input_ids), config.n_embd // config.n_head)
        self.kv = torch.empty(shape, dtype=packed.dtype, device=device)
        self.length = 0
        for block in found:
            self.kv[..., self.length : self.length + BLOCK, :] = block
            self.length += BLOCK

    @property
    def left(self) -> int:
        return len(self.request.input_ids) - self.length

    def attend(self, layer: int, qkv: Tensor, scale: float) -> Tensor:
        """Attention (T, C) of the next T tokens, of qkv (T, 3, H, D), to all up to themselves."""
        S, T = self.length, len(qkv)
        q = qkv[:, 0].transpose(0, 1)  # (H, T, D)
        self.kv[layer, :, :, S : S + T] = qkv[:, 1:].permute(1, 2, 0, 3)
        k, v = self.kv[layer, :, :, : S + T]  # two of (H, S + T, D)
        mask = None if S == 0 or T == 1 else torch.ones(T, S + T, dtype=torch.bool, device=q.device).tril(S)
        y = F.scaled_dot_product_attention(
            q[None], k[None], v[None], attn_mask=mask, is_causal=S == 0 and T > 1, scale=scale
        )
        return y[0].transpose(0, 1).flatten(1)


class Rows:
    """Replies that are being decoded: a row each, all of which end at one column of the cache.

    Positions are embedded before the first layer, so the column that a token's keys lie in is free: every step appends
    one column for all rows, whatever their lengths. kv is (n_layer, max_batch, 2, H, columns, D).
    """

    SPARE = 256  # columns to grow into before the rows are moved back to the start
    ALIGN = 64  # where they may end then: a prompt that is a little longer than all before moves nothing

    def __init__(self, packed: PackedModel, max_batch: int, device: torch.device) -> None:
        config = packed.config
        self.shape = (config.n_layer, max_batch, 2, config.n_head, 0, config.n_embd // config.n_head)
        self.kv = torch.zeros(self.shape, dtype=packed.dtype, device=device)
        self.requests: list[Request | None] = []  # of each row; None: left, and not yet taken again
        self.lengths: list[int] = []  # tokens in the cache
        self.end = 0
        self._mask: Tensor | None = None
        # of this step and each layer: the new column (B, 2, H, D), and the keys and values (B, H, W, D) up to it
        self._new: Sequence[Tensor] = ()
        self._k: Sequence[Tensor] = ()
        self._v: Sequence[Tensor] = ()

    @property
    def n_active(self) -> int:
        return sum(request is not None for request in self.requests)

    def inputs(self) -> tuple[list[int], list[int], list[Adapter | None]]:
        """The last token of each row, its position, and the row's adapter."""
        ids = [0 if request is None else request.tokens[-1] for request in self.requests]
        positions = [
            0 if request is None else length for request, length in zip(self.requests, self.lengths, strict=True)
        ]
        return ids, positions, [None if request is None else request.adapter for request in self.requests]

    def open_column(self) -> None:
        """Make room for one more token of each row, and see which columns each may look at."""
        if not self.requests:
            return
        if self.end == self.kv.shape[4]:
            self._move(max(self.lengths))
        n, longest = len(self.requests), max(self.lengths)
        seen = self.kv[:, :n, :, :, self.end - longest : self.end + 1]  # (n_layer, B, 2, H, W, D)
        self._new, self._k, self._v = seen[..., -1, :].unbind(), seen[:, :, 0].unbind(), seen[:, :, 1].unbind()
        self._mask = None
        if min(self.lengths) < longest:
            lengths = torch.tensor(self.lengths, device=self.kv.device)[:, None]
            back = torch.arange(
                longest, -1, -1, device=self.kv.device
            )  # of each column, how far it is before the new one
            self._mask = (back <= lengths)[:, None, None]  # (B, 1, 1, W)

    def attend(self, layer: int, qkv: Tensor, scale: float) -> Tensor:
        """Attention (B, C) of one token a row, of qkv (B, 3, H, D)."""
        self._new[layer].copy_(qkv[:, 1:])
        q = qkv[:, 0, :, None]  # (B, H, 1, D)
        y = F.scaled_dot_product_attention(q, self._k[layer], self._v[layer], attn_mask=self._mask, scale=scale)
        return y.flatten(1)

    def close_column(self) -> None:
        if self.requests:
            self.end += 1
            self.lengths = [0 if r is None else n + 1 for r, n in zip(self.requests, self.lengths, strict=True)]

    def join(self, prefill: Prefill) -> None:
        """Give a prompt that has been read a row, the first free one."""
        row = next((i for i, request in enumerate(self.requests) if request is None), len(self.requests))
        if row == len(self.requests):
            self.requests.append(None)
            self.lengths.append(0)
        self.requests[row], self.lengths[row] = prefill.request, prefill.length
        if self.end < prefill.length:
            self._move(max(self.lengths))
        self.kv[:, row, :, :, self.end - prefill.length : self.end] = prefill.kv

    def leave(self, row: int) -> None:
        self.requests[row], self.lengths[row] = None, 0

    def clear(self) -> None:
        self.requests, self.lengths, self.end = [], [], 0

    def compact(self) -> None:
        """Drop free rows at the end; where half of the rows are free, move the last ones into them."""
        while self.requests:
            if self.requests[-1] is None:
                self.requests.pop()
                self.lengths.pop()
            elif 2 * self.n_active <= len(self.requests):
                row, last = self.requests.index(None), len(self.requests) - 1
                columns = slice(self.end - self.lengths[last], self.end)
                self.kv[:, row, :, :, columns] = self.kv[:, last, :, :, columns]
                self.requests[row], self.lengths[row] = self.requests[last], self.lengths[last]
                self.leave(last)
            else:
                return
        self.clear()

    def _move(self, end: int) -> None:
        """Put what the rows hold behind column 0, so that they end at `end` or soon after, with columns to spare."""
        end = -(-end // self.ALIGN) * self.ALIGN
        n, held = len(self.requests), min(self.end, end)
        window = self.kv[:, :n, ..., self.end - held : self.end, :]
        if end + self.SPARE > self.kv.shape[4]:
            shape = (*self.shape[:4], end + self.SPARE, self.shape[5])
            self.kv = _zeros(shape, self.kv.dtype, self.kv.device)
        else:
            window = window.clone()
        self.kv[:, :n, ..., end - held : end, :] = window
        self.end = end


class PrefixCache:
    """Keys and values of how prompts begin, by blocks of tokens, those used last; the oldest goes first.

    A block's key is the adapter and all tokens up to its end, as its keys and values follow from these alone.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes, self.bytes = max_bytes, 0
        self.blocks: OrderedDict[tuple[Adapter | None, tuple[int, ...]], Tensor] = OrderedDict()

    def __len__(self) -> int:
        return len(self.blocks)

    def find(self, adapter: Adapter | None, input_ids: Sequence[int]) -> list[Tensor]:
        """The blocks (n_layer, 2, H, BLOCK, D) that the prompt begins with; its last token is never among them."""
        found = []
        for end in range(BLOCK, len(input_ids), BLOCK):
            key = adapter, tuple(input_ids[:end])
            if key not in self.blocks:
                break
            self.blocks.move_to_end(key)
            found.append(self.blocks[key])
        return found

    def keep(self, prefill: Prefill) -> None:
        request = prefill.request
        for end in range(BLOCK, len(request.input_ids), BLOCK):
            key = request.adapter, tuple(request.input_ids[:end])
            if key in self.blocks:
                continue
            block = prefill.kv[..., end - BLOCK : end, :].clone()
            self.blocks[key] = block
            self.bytes += block.nbytes
        while self.bytes > self.max_bytes:
            _, block = self.blocks.popitem(last=False)
            self.bytes -= block.nbytes


def _zeros(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros, since what a row must not look at has to be finite all the same; on a processor no memory until used."""
    if device.type != "cpu":
        return torch.zeros(*shape, dtype=dtype, device=device)
    pages = mmap.mmap(-1, prod(shape) * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(pages, dtype=dtype).view(*shape)
