"""Attention of many texts in one row of tokens. No text attends to another; what all begin with is there once.

The row is the shared prefix, then the rest of each text. Shape letters: N tokens of the row; P of them are the prefix;
S texts of a group, padded to L tokens; C, H and D as in model.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor

from gpt2core.inference.kernels import varlen_attention
from gpt2core.tensors import to_device

DENSE = 256  # keys; with fewer, plain matrix products are faster than torch's attention, above all backward


@dataclass(frozen=True)
class VarlenSequences:
    """For `varlen_attention`: bf16 on a GPU. The prefix is a sequence of its own, and keys of every text."""

    keys: Tensor | None  # (M) which token each key is of; None: all, in order
    ends_q: Tensor  # as `varlen_attention` takes them
    ends_k: Tensor
    max_q: int
    max_k: int

    @classmethod
    def make(cls, shared: int, lengths: Sequence[int]) -> Self:
        """For a prefix of `shared` tokens and texts of these lengths without it."""
        prefix = range(shared)
        n_queries = [shared, *lengths] if shared else [*lengths]  # not every kernel takes a sequence of no tokens
        n_keys = [shared, *(shared + length for length in lengths)] if shared else n_queries
        keys, start = [*prefix], shared
        for length in lengths:
            keys += [*prefix, *range(start, start + length)]
            start += length
        ends_q, ends_k = (torch.tensor([0, *n]).cumsum(0, dtype=torch.int32) for n in (n_queries, n_keys))
        return cls(torch.tensor(keys) if shared else None, ends_q, ends_k, max(n_queries), max(n_keys))

    def to(self, device: torch.device | str) -> Self:
        keys = None if self.keys is None else to_device(self.keys, device)
        return replace(self, keys=keys, ends_q=to_device(self.ends_q, device), ends_k=to_device(self.ends_k, device))

    def attend(self, qkv: Tensor, scale: float) -> Tensor:
        """Attention (1, N, C) for qkv (1, N, 3, H, D)."""
        # split and unbind: their gradient is one copy; that of an index is zeros, a copy and an addition
        q, kv = qkv[0].split([1, 2], 1)  # (N, 1, H, D), (N, 2, H, D)
        k, v = (kv if self.keys is None else kv[self.keys]).unbind(1)  # two of (M, H, D)
        limits = (self.ends_q, self.ends_k, self.max_q, self.max_k)
        y = varlen_attention(q.squeeze(1), k, v, *limits, scale)  # (N, H, D)
        return y.flatten(1)[None]


@dataclass(frozen=True)
class PaddedSequences:
    """In groups of texts of similar length, each padded to its longest."""

    shared: int
    groups: tuple[Tensor, ...]  # (S, L): the row's token at each position, 0 for padding
    order: Tensor  # (N): where each token of the row is in the groups' outputs, behind those of the prefix

    @classmethod
    def make(cls, shared: int, lengths: Sequence[int]) -> Self:
        """For a prefix of `shared` tokens and texts of these lengths without it, the longest first."""
        groups, order, start, first = list[Tensor](), list(range(shared)), shared, 0
        while first < len(lengths):
            longest = lengths[first]
            members = [length for length in lengths[first:] if 2 * length >= longest]
            index = torch.zeros(len(members), longest, dtype=torch.long)
            for row, length in enumerate(members):
                index[row, :length] = torch.arange(start, start + length)
                offset = shared + sum(map(Tensor.numel, groups)) + row * longest
                order += range(offset, offset + length)
                start += length
            groups.append(index)
            first += len(members)
        return cls(shared, tuple(groups), torch.tensor(order))

    def to(self, device: torch.device | str) -> Self:
        groups = tuple(to_device(index, device) for index in self.groups)
        return replace(self, groups=groups, order=to_device(self.order, device))

    def attend(self, qkv: Tensor, scale: float) -> Tensor:
        """Attention (1, N, C) for qkv (1, N, 3, H, D)."""
        flat = qkv[0]
        prefix = flat[: self.shared].permute(1, 2, 0, 3)  # (3, H, P, D)
        outputs = [_attend(prefix[:1], prefix[1:2], prefix[2:], scale)] if self.shared else []
        for index in self.groups:
            own = flat.index_select(0, index.flatten()).unflatten(0, index.shape)  # (S, L, 3, H, D)
            q, k, v = own.permute(2, 0, 3, 1, 4)  # three of (S, H, L, D)
            if self.shared:
                k, v = (
                    torch.cat([shared.expand(len(index), -1, -1, -1), x], 2)
                    for shared, x in zip(prefix[1:], (k, v), strict=True)
                )
            outputs.append(_attend(q, k, v, scale))
        return torch.cat(outputs).index_select(0, self.order)[None]


Sequences = VarlenSequences | PaddedSequences


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """(S * L, C) for q (S, H, L, D) and k, v (S, H, P + L, D): to the prefix, and to the text's own tokens up to it.

    What is padded comes last, so that no other token attends to it.
    """
    L, n_keys = q.shape[2], k.shape[2]
    bias = torch.full((L, n_keys), -torch.inf, dtype=q.dtype, device=q.device).triu(n_keys - L + 1)
    if n_keys <= DENSE:
        y = ((q * scale) @ k.transpose(2, 3) + bias).softmax(-1) @ v
    else:
        is_causal = n_keys == L
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=None if is_causal else bias, is_causal=is_causal, scale=scale
        )
    return y.transpose(1, 2).flatten(2).flatten(0, 1)
