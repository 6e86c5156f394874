"""The processes that train one model together, if there are several (`torch.distributed`)."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import nn


def rank_and_size() -> tuple[int, int]:
    """Return the rank of this process, and the number of processes."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def summed(*values: float) -> list[float]:
    """Return the values, each summed over the processes."""
    if not dist.is_initialized():
        return list(values)
    total = torch.tensor(values, dtype=torch.float64, device="cuda" if dist.get_backend() == "nccl" else "cpu")
    dist.all_reduce(total)
    return total.tolist()


def sum_gradients(weights: Sequence[nn.Parameter]) -> None:
    """Replace the gradients by their sums over the processes."""
    if not dist.is_initialized():
        return
    for weight in weights:
        if weight.grad is None:  # this process had no example in the batch
            weight.grad = torch.zeros_like(weight)
    grads = [weight.grad for weight in weights if weight.grad is not None]
    flat = torch.cat([grad.flatten() for grad in grads])
    dist.all_reduce(flat)
    for grad, part in zip(grads, flat.split([grad.numel() for grad in grads]), strict=True):
        grad.copy_(part.view_as(grad))  # in place: a CUDA graph adds to this tensor
