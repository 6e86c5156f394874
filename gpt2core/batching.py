"""Training batches: examples packed into one row, without padding or, for CUDA graphs, with a few tokens of it."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gpt2core.data import Example
from gpt2core.kernels import has_varlen_attention
from gpt2core.sequences import PaddedSequences, Sequences, VarlenSequences
from gpt2core.tensors import int_tensor, to_device

IGNORED = -100  # a label without a loss, as in F.cross_entropy
# Sizes of padded batches are rounded up to multiples: a 16th of the tokens and half of the labels at the last power of
# two, at least of these. A shape costs two slow steps, so few shapes save more than padding costs.
LEAST_TOKENS, LEAST_LABELS = 4096, 1024
PADDING = 64  # tokens in a sequence of padding, about; a long one would raise the longest sequence of the batch


class Batch(NamedTuple):
    """Token ids in B rows of T tokens. Examples are packed into one row, with their shared prefix stored once."""

    input_ids: Tensor  # (B, T)
    labels: Tensor  # (n): the next tokens that count in the loss, and IGNORED
    n_tokens: int  # a shared prefix counts once per example
    labeled: Tensor | None = None  # (n) index of the token before each label in the flattened rows; None: all tokens
    owners: Tensor | None = None  # (n) the index of each label's example
    positions: Tensor | None = None  # (B, T) within the example; None: each row is one text
    sequences: Sequences | None = None  # which tokens of the row attend to which
    n_ignored: int = 0  # of the labels: IGNORED, at the end

    @property
    def n_labels(self) -> int:
        """Labels that count in the loss."""
        return self.labels.numel() - self.n_ignored

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
    padded: bool = False,
) -> Batch:
    """Pack the examples into one row, the longest first.

    Args:
        share_prefix: compute the prefix that all examples share (such as the prompt's preamble) only once. Losses and
            gradients do not change. The prefix ends before the first token with a label.
        use_varlen: with `VarlenSequences` instead of `PaddedSequences`; what `uses_varlen` returns.
        padded: with `use_varlen`, round the numbers of tokens and labels up to few values (buckets), by at most 6 % and
            13 %. What is added does not change the loss.
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
    texts, n_tokens, n_labels = [lengths[i] for i in order], sum(lengths) + shared * len(examples), len(labels)
    if padded:
        step = _bucket_step(max(len(input_ids), LEAST_TOKENS), 16)
        n_texts = -(-step // PADDING)
        n = n_texts + -(len(input_ids) + n_texts) % step  # at least one token in each
        texts += [n // n_texts + (i < n % n_texts) for i in range(n_texts)]
        input_ids += [0] * n
        positions += [0] * n
        n_ignored = -n_labels % _bucket_step(max(n_labels, LEAST_LABELS), 2)
        labels += [IGNORED] * n_ignored
        labeled += [len(input_ids) - 1] * n_ignored
        owners += [0] * n_ignored
    kind = VarlenSequences if use_varlen else PaddedSequences
    return Batch(
        int_tensor(input_ids)[None],
        int_tensor(labels),
        n_tokens,
        int_tensor(labeled),
        int_tensor(owners),
        int_tensor(positions)[None],
        kind.make(shared, texts),
        len(labels) - n_labels,
    ).to(device)


def _bucket_step(n: int, n_buckets: int) -> int:
    """What to round n up to a multiple of: there are `n_buckets` of them between two powers of two."""
    return max(1, 2 ** (n.bit_length() - 1) // n_buckets)


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
