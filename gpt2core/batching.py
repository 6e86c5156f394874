"""Training batches: examples packed into one row, without padding."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gpt2core.data import Example
from gpt2core.kernels import has_varlen_attention
from gpt2core.sequences import PaddedSequences, Sequences, VarlenSequences
from gpt2core.tensors import int_tensor, to_device


class Batch(NamedTuple):
    """Token ids in B rows of T tokens. Examples are packed into one row, with their shared prefix stored once."""

    input_ids: Tensor  # (B, T)
    labels: Tensor  # (n): the next tokens that count in the loss
    n_tokens: int  # a shared prefix counts once per example
    labeled: Tensor | None = None  # (n) index of the token before each label in the flattened rows; None: all tokens
    owners: Tensor | None = None  # (n) the index of each label's example
    positions: Tensor | None = None  # (B, T) within the example; None: each row is one text
    sequences: Sequences | None = None  # which tokens of the row attend to which

    def to(self, device: torch.device | str) -> "Batch":
        """The batch on a device."""
        moved: dict[str, Any] = {
            name: part.to(device) if isinstance(part, Sequences) else to_device(part, device)
            for name, part in self._asdict().items()
            if isinstance(part, Tensor | Sequences)
        }
        return self._replace(**moved)


def pack(
    examples: Sequence[Example],
    loss_on: str,
    device: torch.device | str = "cpu",
    share_prefix: bool = True,
    use_varlen: bool = False,
) -> Batch:
    """Pack the examples into one row, the longest first.

    Args:
        share_prefix: compute the prefix that all examples share (such as the prompt's preamble) only once. Losses and
            gradients do not change. The prefix ends before the first token with a label.
        use_varlen: for `varlen_attention`, if `uses_varlen`.
    """
    first = [example.prompt_length if loss_on == "response" else 1 for example in examples]  # first token with a loss
    shared = _common_prefix(examples, min(first) - 1) if share_prefix and len(examples) > 1 else 0
    lengths = [len(example.input_ids) - 1 - shared for example in examples]  # the last token is only ever a label
    input_ids, positions = [*examples[0].input_ids[:shared]], list(range(shared))
    labels, labeled, owners = list[int](), list[int](), list[int]()
    order = sorted(range(len(examples)), key=lambda i: -lengths[i])
    for i in order:
        ids, start = examples[i].input_ids, len(input_ids) - shared  # where the example would begin without sharing
        input_ids += ids[shared:-1]
        positions += range(shared, len(ids) - 1)
        labels += ids[first[i] :]
        labeled += range(start + first[i] - 1, start + len(ids) - 1)
        owners += [i] * (len(ids) - first[i])
    kind = VarlenSequences if use_varlen else PaddedSequences
    return Batch(
        int_tensor(input_ids)[None],
        int_tensor(labels),
        sum(lengths) + shared * len(examples),
        int_tensor(labeled),
        int_tensor(owners),
        int_tensor(positions)[None],
        kind.make(shared, [lengths[i] for i in order]),
    ).to(device)


def uses_varlen(device: torch.device, dtype: torch.dtype, head_width: int) -> bool:
    """What `pack` gets as `use_varlen`, for activations of this dtype."""
    return dtype == torch.bfloat16 and has_varlen_attention(device, head_width)


def _common_prefix(examples: Sequence[Example], at_most: int) -> int:
    """Number of tokens, `at_most` that many, that all examples start with."""
    smallest, largest = min(example.input_ids for example in examples), max(example.input_ids for example in examples)
    for i, (one, other) in enumerate(zip(smallest[:at_most], largest[:at_most], strict=False)):
        if one != other:
            return i
    return at_most
