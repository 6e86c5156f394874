"""Training batches: examples packed into one row. Only batches for CUDA graphs are padded, by a few tokens."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gpt2core.data import Example
from gpt2core.kernels import has_varlen_attention
from gpt2core.sequences import PaddedSequences, Sequences, VarlenSequences
from gpt2core.tensors import int_tensor, to_device

IGNORED = -100  # label that does not count in the loss, as in F.cross_entropy
# Padded batches round their numbers of tokens and labels up to bucket sizes: 16 per power of two for tokens, and 2 for
# labels. Below MIN_TOKENS and MIN_LABELS, the distance between bucket sizes is constant. The first two
# batches of a shape are slow, so few shapes save more time than the padding costs.
MIN_TOKENS, MIN_LABELS = 4096, 1024
PADDING_LENGTH = 64  # approximate length of a padding sequence; a long one could become the batch's longest sequence


class Batch(NamedTuple):
    """Token ids in B rows of T tokens. `pack` makes one row of all examples and stores their shared prefix once."""

    input_ids: Tensor  # (B, T)
    labels: Tensor  # (n): token ids to predict; the padding labels at the end are IGNORED
    n_tokens: int  # a shared prefix counts once per example
    labeled: Tensor | None = None  # (n): index, in the flattened rows, of the token before each label; None: all tokens
    owners: Tensor | None = None  # (n): index of each label's example
    positions: Tensor | None = None  # (B, T): position of each token in its example; None: each row is one sequence
    sequences: Sequences | None = None  # which tokens of the row attend to which
    n_ignored: int = 0  # number of padding labels

    @property
    def n_labels(self) -> int:
        """Number of labels that count in the loss."""
        return self.labels.numel() - self.n_ignored

    def to(self, device: torch.device | str) -> "Batch":
        """Return the batch on a device."""
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
        use_varlen: use variable-length flash attention (`VarlenSequences`) instead of padded groups
            (`PaddedSequences`). Pass the result of `uses_varlen`.
        padded: round the numbers of tokens and labels up to bucket sizes, by at most 6 % and 13 %; requires
            `use_varlen`. Padding does not change the loss.
    """
    first = [example.prompt_length if loss_on == "response" else 1 for example in examples]  # index of the first label
    shared = _common_prefix(examples, min(first) - 1) if share_prefix and len(examples) > 1 else 0
    row = _Row(examples[0].input_ids[:shared])
    for i in sorted(range(len(examples)), key=lambda i: -len(examples[i].input_ids)):
        row.add(examples[i].input_ids, first[i], i)
    n_tokens, n_labels = sum(row.lengths) + shared * len(examples), len(row.labels)
    if padded:
        row.pad()
    kind = VarlenSequences if use_varlen else PaddedSequences
    return Batch(
        int_tensor(row.input_ids)[None],
        int_tensor(row.labels),
        n_tokens,
        int_tensor(row.labeled),
        int_tensor(row.owners),
        int_tensor(row.positions)[None],
        kind.make(shared, row.lengths),
        len(row.labels) - n_labels,
    ).to(device)


class _Row:
    """The row of `pack`: the shared prefix, then the other tokens of each example. Lists as in `Batch`."""

    def __init__(self, prefix: Sequence[int]) -> None:
        self.shared = len(prefix)
        self.input_ids, self.positions = [*prefix], list(range(len(prefix)))
        self.labels, self.labeled, self.owners = list[int](), list[int](), list[int]()
        self.lengths = list[int]()  # number of each sequence's tokens after the prefix

    def add(self, input_ids: Sequence[int], first_label: int, owner: int) -> None:
        """Add an example, whose last token is a label only."""
        start = len(self.input_ids) - self.shared  # token k >= shared gets the row index start + k
        end = len(input_ids) - 1
        self.input_ids += input_ids[self.shared : -1]
        self.positions += range(self.shared, end)
        self.labels += input_ids[first_label:]
        self.labeled += range(start + first_label - 1, start + end)
        self.owners += [owner] * (len(input_ids) - first_label)
        self.lengths.append(end - self.shared)

    def pad(self) -> None:
        """Round the numbers of tokens and labels up by padding sequences and by labels that are ignored."""
        step = _bucket_step(max(len(self.input_ids), MIN_TOKENS), 16)
        n_sequences = -(-step // PADDING_LENGTH)
        n = n_sequences + -(len(self.input_ids) + n_sequences) % step  # every sequence has at least one token
        self.lengths += [n // n_sequences + (i < n % n_sequences) for i in range(n_sequences)]
        self.input_ids += [0] * n
        self.positions += [0] * n
        n_ignored = -len(self.labels) % _bucket_step(max(len(self.labels), MIN_LABELS), 2)
        self.labels += [IGNORED] * n_ignored
        self.labeled += [len(self.input_ids) - 1] * n_ignored
        self.owners += [0] * n_ignored


def _bucket_step(n: int, n_buckets: int) -> int:
    """Return the step to whose multiples n is rounded up: there are `n_buckets` steps between two powers of two."""
    return max(1, 2 ** (n.bit_length() - 1) // n_buckets)


def uses_varlen(device: torch.device, dtype: torch.dtype, head_width: int) -> bool:
    """Return whether `pack` can use variable-length flash attention: bf16 activations, and support by the device."""
    return dtype == torch.bfloat16 and has_varlen_attention(device, head_width)


def _common_prefix(examples: Sequence[Example], at_most: int) -> int:
    """Return the length of the prefix that all examples share, at most `at_most` tokens."""
    smallest, largest = min(example.input_ids for example in examples), max(example.input_ids for example in examples)
    for i, (first, last) in enumerate(zip(smallest[:at_most], largest[:at_most], strict=False)):
        if first != last:
            return i
    return at_most
