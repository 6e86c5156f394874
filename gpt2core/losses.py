"""Cross-entropy of the labelled tokens of packed examples: for training, validation and evaluation."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from gpt2core.batching import Batch, attention_mask, pack
from gpt2core.data import Example
from gpt2core.model import GPT2, Sequences, evaluating


def batch_losses(model: GPT2, batch: Batch) -> Tensor:
    """Cross-entropy (N) at the N labelled positions, in fp32. The head sees only them."""
    mask: Tensor | Sequences | None = batch.sequences
    if mask is None and batch.positions is not None and batch.example is not None:
        mask = attention_mask(batch.example)
    hidden = model.hidden(batch.input_ids, mask, positions=batch.positions).flatten(0, 1)  # (G * T, C)
    labels = batch.labels.flatten()
    if batch.labelled is not None:
        hidden, labels = hidden[batch.labelled], labels[batch.labelled]
    return F.cross_entropy(model.head(hidden).float(), labels, reduction="none")


@torch.no_grad()
def token_losses(model: GPT2, examples: Sequence[Example], batch_size: int, loss_on: str) -> list[tuple[float, int]]:
    """(Summed negative log-likelihood in nats, number of tokens it counts) of each example, without dropout."""
    device = model.wte.weight.device
    sums: list[Tensor] = []
    with evaluating(model):
        for start in range(0, len(examples), batch_size):
            part = examples[start : start + batch_size]
            batch = pack(part, loss_on, device)
            losses = batch_losses(model, batch)
            assert batch.example is not None
            rows = batch.example.flatten()[batch.labelled]  # index of the example that each loss belongs to
            per_row = torch.zeros(len(part), dtype=torch.float64, device=device)
            sums.append(per_row.index_add_(0, rows, losses.double()))
    counts = [len(one.input_ids) - (one.prompt_length if loss_on == "response" else 1) for one in examples]
    found: list[float] = torch.cat(sums).tolist() if sums else []  # waits for a GPU once
    return list(zip(found, counts, strict=True))
