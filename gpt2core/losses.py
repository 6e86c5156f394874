"""Cross-entropy of the labeled tokens of packed examples, for training, validation and evaluation."""

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from gpt2core import cuda
from gpt2core.batching import IGNORED, Batch, pack, uses_varlen
from gpt2core.data import Example
from gpt2core.model import GPT2, eval_mode


def batch_losses(model: GPT2, batch: Batch) -> Tensor:
    """Compute the cross-entropy (n) of the n labels, in fp32; it is 0 for IGNORED labels.

    The head and the last MLP compute only the tokens before a label.
    """
    hidden = model.hidden(batch.input_ids, batch.sequences, positions=batch.positions, keep=batch.labeled)
    logits, labels = model.padded_head(hidden.flatten(0, -2)), batch.labels.flatten()
    kernels = cuda.loss_kernels_for(logits) if logits.requires_grad else None
    if kernels is not None:
        return cast(Tensor, _CrossEntropy.apply(logits, labels, kernels))
    return F.cross_entropy(logits.float(), labels, ignore_index=IGNORED, reduction="none")


class _CrossEntropy(torch.autograd.Function):
    """Cross-entropy by a CUDA kernel, which overwrites the logits with their gradients in the forward pass.

    torch's operators write seven tensors of the logits' size, most of them in fp32.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, kernels: cuda.Kernels) -> Tensor:
        losses = kernels.cross_entropy_(logits, labels)
        ctx.save_for_backward(logits)
        return losses

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (gradients,) = ctx.saved_tensors
        return gradients.detach().mul_(grad[:, None]), None, None


@torch.no_grad()
def token_losses(model: GPT2, examples: Sequence[Example], batch_size: int, loss_on: str) -> list[tuple[float, int]]:
    """Return (summed negative log-likelihood in nats, number of its tokens) of each example, without dropout."""
    weight = model.wte.weight
    use_varlen = uses_varlen(weight.device, weight.dtype, model.config.head_width)
    sums: list[Tensor] = []
    with eval_mode(model):
        for start in range(0, len(examples), batch_size):
            part = examples[start : start + batch_size]
            batch = pack(part, loss_on, weight.device, use_varlen=use_varlen)
            losses = batch_losses(model, batch)
            assert batch.owners is not None
            totals = torch.zeros(len(part), dtype=torch.float64, device=weight.device)
            sums.append(totals.index_add_(0, batch.owners, losses.double()))
    counts = [len(example.input_ids) - (example.prompt_length if loss_on == "response" else 1) for example in examples]
    loss_sums: list[float] = torch.cat(sums).tolist() if sums else []  # the only wait for a GPU
    return list(zip(loss_sums, counts, strict=True))
