"""Attention of sequences packed into one row. They do not attend to each other; their shared prefix is stored once.

The row is the shared prefix, then the remaining tokens of each sequence. Shape letters: N tokens of the row, of which
the first P are the prefix; S sequences; C, H and D as in model.py. In `PaddedSequences`, S counts the sequences of one
group, and they are padded to L tokens.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from gpt2core.kernels import softmax_gradient, varlen_attention
from gpt2core.tensors import int_tensor, to_device

DENSE = 256  # up to this many keys, plain matrix products are faster than torch's attention, above all backward


@dataclass(frozen=True)
class VarlenSequences:
    """Attention by `varlen_attention` (bf16 on a GPU).

    The prefix is a sequence of its own. Its keys and values are repeated before those of every other sequence. For
    P = 2 and sequences of 1 and 2 further tokens, the row is (0 1 2 3 4) and the M = 9 keys are (0 1, 0 1 2, 0 1 3 4).
    """

    shared: int  # P
    keys: Tensor  # (M): index of each key's token in the row
    # (P * (S + 1) + N - P): position among the M keys: first of all S + 1 copies of the prefix, then of other tokens
    key_index: Tensor
    ends_q: Tensor  # (S + 2), or (S + 1) without a prefix: arguments of `varlen_attention`
    ends_k: Tensor
    max_q: int  # upper bound of a sequence's length, a multiple of LIMIT so that few shapes of CUDA graphs occur
    max_k: int

    LIMIT = 128

    @classmethod
    def make(cls, shared: int, lengths: Sequence[int]) -> Self:
        """Prepare attention for a prefix of `shared` tokens and sequences with these numbers of further tokens."""
        prefix = range(shared)
        keys = [*prefix]  # as in the class: the token of each key
        prefix_keys, other_keys = [*prefix], list[int]()  # positions among the keys
        for start, length in zip(accumulate(lengths, initial=shared), lengths, strict=False):
            copy_end = len(keys) + shared  # the sequence's keys are a copy of the prefix, then its other tokens
            prefix_keys += range(len(keys), copy_end)
            other_keys += range(copy_end, copy_end + length)
            keys += [*prefix, *range(start, start + length)]
        n_queries = [shared, *lengths] if shared else [*lengths]  # not every kernel accepts an empty sequence
        n_keys = [shared, *(shared + length for length in lengths)] if shared else n_queries
        ends_q, ends_k = (torch.tensor([0, *n]).cumsum(0, dtype=torch.int32) for n in (n_queries, n_keys))
        max_q, max_k = (-(-max(n) // cls.LIMIT) * cls.LIMIT for n in (n_queries, n_keys))
        return cls(shared, int_tensor(keys), int_tensor(prefix_keys + other_keys), ends_q, ends_k, max_q, max_k)

    def to(self, device: torch.device | str) -> Self:
        keys, key_index = to_device(self.keys, device), to_device(self.key_index, device)
        ends_q, ends_k = to_device(self.ends_q, device), to_device(self.ends_k, device)
        return replace(self, keys=keys, key_index=key_index, ends_q=ends_q, ends_k=ends_k)

    def attend(self, qkv: Tensor, scale: float) -> Tensor:
        """Compute the attention (1, N, C) for qkv (1, N, 3, H, D)."""
        # The gradient of split and unbind is one copy; the gradient of an index is zeros, a copy and an addition.
        q, kv = qkv.squeeze(0).split([1, 2], 1)  # (N, 1, H, D), (N, 2, H, D)
        k, v = (_RepeatPrefix.apply(kv, self) if self.shared else kv).unbind(1)  # two of (M, H, D)
        limits = (self.ends_q, self.ends_k, self.max_q, self.max_k)
        y = varlen_attention(q.squeeze(1), k, v, *limits, scale)  # (N, H, D)
        return y.flatten(1)[None]


class _RepeatPrefix(torch.autograd.Function):
    """Repeat the keys and values of the prefix before those of each sequence.

    The backward pass gathers and sums; autograd's backward pass of an index would sort all indices, which is slower.
    """

    @staticmethod
    def forward(ctx: Any, kv: Tensor, sequences: VarlenSequences) -> Tensor:
        """Return the keys and values (M, 2, H, D) of kv (N, 2, H, D)."""
        ctx.sequences = sequences
        return kv.index_select(0, sequences.keys)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        P, S = ctx.sequences.shared, len(ctx.sequences.ends_q) - 2
        prefix_grads, other_grads = grad.index_select(0, ctx.sequences.key_index).tensor_split([P * (S + 1)])
        return torch.cat([prefix_grads.unflatten(0, (S + 1, P)).sum(0), other_grads]), None


@dataclass(frozen=True)
class PaddedSequences:
    """Attention in groups of sequences of similar length. Each group is padded to its longest sequence."""

    shared: int  # P
    groups: tuple[Tensor, ...]  # (S, L) each: index in the row of the token at each position, 0 for padding
    order: Tensor  # (N): index of each token of the row in the concatenated outputs of the prefix and all groups

    @classmethod
    def make(cls, shared: int, lengths: Sequence[int]) -> Self:
        """Prepare attention for a prefix of `shared` tokens and sequences with these numbers of further tokens.

        Args:
            lengths: the longest first.
        """
        groups, order, start, offset = list[Tensor](), list(range(shared)), shared, shared
        remaining = deque(lengths)
        while remaining:
            rows, longest = list[list[int]](), remaining[0]
            while remaining and 2 * remaining[0] >= longest:
                length = remaining.popleft()
                rows.append([*range(start, start + length), *[0] * (longest - length)])
                order += range(offset, offset + length)
                start, offset = start + length, offset + longest
            groups.append(torch.tensor(rows, dtype=torch.long))
        return cls(shared, tuple(groups), int_tensor(order))

    def to(self, device: torch.device | str) -> Self:
        groups = tuple(to_device(index, device) for index in self.groups)
        return replace(self, groups=groups, order=to_device(self.order, device))

    def attend(self, qkv: Tensor, scale: float) -> Tensor:
        """Compute the attention (1, N, C) for qkv (1, N, 3, H, D)."""
        flat = qkv.squeeze(0)
        if self.shared + max(index.shape[1] for index in self.groups) <= DENSE:
            return cast(Tensor, _DenseAttention.apply(flat, self, scale))[None]
        outputs = []
        for q, k, v in self.split(flat):
            L, n_keys = q.shape[2], k.shape[2]
            bias = _causal_bias(q, k) if n_keys > L else None
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, is_causal=bias is None, scale=scale)
            outputs.append(y.transpose(1, 2).flatten(2).flatten(0, 1))
        return torch.cat(outputs).index_select(0, self.order)[None]

    def split(self, qkv: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield q (S, H, L, D), and k and v (S, H, P + L, D), of the prefix and then of each group.

        They are gathered from qkv (N, 3, H, D). The prefix is one sequence: its q, k and v are (1, H, P, D).
        """
        prefix = qkv[: self.shared].permute(1, 2, 0, 3).contiguous()[:, None]  # (3, 1, H, P, D)
        if self.shared:
            yield prefix[0], prefix[1], prefix[2]
        for index in self.groups:
            group = qkv.index_select(0, index.flatten()).unflatten(0, index.shape)  # (S, L, 3, H, D)
            q, *kv = group.permute(2, 0, 3, 1, 4).contiguous()  # (S, H, L, D) each
            k, v = (torch.cat([p.expand(len(q), -1, -1, -1), x], 2) for p, x in zip(prefix[1:], kv, strict=True))
            yield q, k, v


class _DenseAttention(torch.autograd.Function):
    """Attention as plain matrix products, with its own backward pass.

    Gradients of the prefix's keys and values are summed over all sequences. This backward pass gathers the gradients by
    index; autograd's would add each of them into a tensor of zeros.
    """

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, sequences: PaddedSequences, scale: float) -> Tensor:
        """Return the attention (N, C) for qkv (N, 3, H, D)."""
        saved, outputs = list[Tensor](), []
        for q, k, v in sequences.split(qkv):
            weights = ((q * scale) @ k.transpose(2, 3)).add_(_causal_bias(q, k)).softmax(-1)
            weights = weights.to(q.dtype)  # (S, H, L, P + L); fp32 under autocast
            outputs.append((weights @ v).transpose(1, 2).flatten(2).flatten(0, 1))
            saved += q, k, v, weights
        ctx.save_for_backward(*saved)
        ctx.sequences, ctx.scale = sequences, scale
        return torch.cat(outputs).index_select(0, sequences.order)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        saved, sequences = ctx.saved_tensors, ctx.sequences
        groups = [saved[i : i + 4] for i in range(0, len(saved), 4)]  # q, k, v and weights; the prefix is the first
        sizes = [len(q) * q.shape[2] for q, *_ in groups]  # S * L
        y_grads = grad.new_zeros(sum(sizes), grad.shape[1]).index_copy_(0, sequences.order, grad).split(sizes)
        qkv_grads = list[Tensor]()
        prefix_grad = grad.new_zeros(2, *groups[0][0].shape[1:])  # (2, H, P, D): of k and v as parts of the groups
        for (q, k, v, weights), y_grad in zip(groups, y_grads, strict=True):
            S, H, L, D = q.shape
            y_grad = y_grad.view(S, L, H, D).transpose(1, 2).contiguous()
            q_grad, k_grad, v_grad = _dense_gradients(q, k, v, weights, y_grad, ctx.scale)
            P = k.shape[2] - L  # 0 for the prefix itself
            if P:
                prefix_grad += torch.stack([k_grad[:, :, :P].sum(0), v_grad[:, :, :P].sum(0)])
            qkv_grad = torch.stack([q_grad, k_grad[:, :, P:], v_grad[:, :, P:]])  # (3, S, H, L, D)
            qkv_grads.append(qkv_grad.permute(1, 3, 0, 2, 4).flatten(0, 1))  # (S * L, 3, H, D)
        result = torch.cat(qkv_grads).index_select(0, sequences.order)  # (N, 3, H, D)
        if sequences.shared:
            result[: sequences.shared, 1:] += prefix_grad.permute(2, 0, 1, 3)
        return result, None, None


def _dense_gradients(
    q: Tensor, k: Tensor, v: Tensor, weights: Tensor, y_grad: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients dQ, dK and dV of Y = A V with A = softmax(scale Q K^T + bias), for the gradient dY.

    dV = A^T dY, dS = scale softmax'(dY V^T), dQ = dS K and dK = dS^T Q.
    """
    score_grad = softmax_gradient(y_grad @ v.transpose(2, 3), weights).mul_(scale)  # (S, H, L, P + L)
    return score_grad @ k, score_grad.transpose(2, 3) @ q, weights.transpose(2, 3) @ y_grad


Sequences = VarlenSequences | PaddedSequences


def _causal_bias(q: Tensor, k: Tensor) -> Tensor:
    """Return the bias (L, P + L) of the scores of q (S, H, L, D) and k (S, H, P + L, D): -inf for keys after the query.

    Padding is at the end of a sequence, so no token before it attends to it.
    """
    L, n_keys = q.shape[2], k.shape[2]
    return torch.full((L, n_keys), -torch.inf, dtype=q.dtype, device=q.device).triu(n_keys - L + 1)
