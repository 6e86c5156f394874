"""Training batches: examples as tensors, packed into rows to avoid padding."""

from array import array
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gpt2core.data import Example
from gpt2core.model import Sequences
from gpt2core.tensors import to_device

IGNORED = -100  # the label of a token that does not count in the loss, as in torch's cross_entropy
SHARED, PADDING = -1, -2  # instead of an example's index: a token of the shared prefix, and padding
ROW_TOKENS = 512  # approximate length of a packed row: attention's cost grows with its square


class Batch(NamedTuple):
    """Examples in G rows of T tokens; no example attends to another, and a shared prefix is stored once per row."""

    input_ids: Tensor  # (G, T), padded on the right
    labels: Tensor  # (G, T): the next token, IGNORED where it does not count in the loss
    n_tokens: int  # without padding; a shared prefix counts once per example
    labelled: Tensor | None = None  # (N) indices of the labels that count in the flattened rows; None: all of them
    positions: Tensor | None = None  # (G, T) within the example; None: each row is one text from position 0
    example: Tensor | None = None  # (G, T) index of the token's example, SHARED or PADDING; None: rows have no examples
    sequences: Sequences | None = None  # for variable-length attention, instead of an attention mask

    @property
    def n_labels(self) -> int:
        """Labels that count in the loss: known on the host, whatever device the tensors are on."""
        return self.labels.numel() if self.labelled is None else len(self.labelled)

    def to(self, device: torch.device | str) -> "Batch":
        """The batch on a device."""
        tensors = {name: part for name, part in self._asdict().items() if isinstance(part, Tensor)}
        moved: dict[str, Any] = {name: to_device(tensor, device) for name, tensor in tensors.items()}
        if self.sequences is not None:
            own = self.sequences
            keys = None if own.keys is None else to_device(own.keys, device)
            ends_q, ends_k = to_device(own.ends_q, device), to_device(own.ends_k, device)
            moved["sequences"] = replace(own, keys=keys, ends_q=ends_q, ends_k=ends_k)
        return self._replace(**moved)


def pack(
    examples: Sequence[Example],
    loss_on: str,
    device: torch.device | str = "cpu",
    share_prefix: bool = True,
    as_sequences: bool = False,
) -> Batch:
    """Pack the examples into rows of about ROW_TOKENS.

    Args:
        share_prefix: compute the tokens that all examples start with (every prompt has the same preamble) once per row.
            That changes no loss and no gradient, and applies only to tokens whose successor is not a label.
        as_sequences: also describe the examples for `varlen_attention`, on devices that have it.
    """
    first = [example.prompt_length if loss_on == "response" else 1 for example in examples]  # first token with a loss
    shared = _common_prefix(examples, min(first) - 1) if share_prefix and len(examples) > 1 else 0
    lengths = [len(example.input_ids) - 1 - shared for example in examples]  # the last token is only ever a label
    n_rows = min(-(-sum(lengths) // max(ROW_TOKENS - shared, 1)), len(examples))
    rows: list[list[int]] = [[] for _ in range(n_rows)]
    loads = [0] * len(rows)
    for i in sorted(range(len(examples)), key=lambda i: -lengths[i]):  # longest first, into the least loaded row
        row = loads.index(min(loads))
        rows[row].append(i)
        loads[row] += lengths[i]

    T = shared + max(loads)
    # as arrays: a tensor operation per example takes the host longer than a GPU takes for the step
    input_ids, labels, positions, example = (array("q") for _ in range(4))
    for members, load in zip(rows, loads, strict=True):
        input_ids.extend(examples[0].input_ids[:shared])
        labels.extend([IGNORED] * shared)
        positions.extend(range(shared))
        example.extend([SHARED] * shared)
        for i in members:
            ids = examples[i].input_ids
            input_ids.extend(ids[shared:-1])
            labels.extend([IGNORED] * (first[i] - 1 - shared))
            labels.extend(ids[first[i] :])
            positions.extend(range(shared, shared + lengths[i]))
            example.extend([i] * lengths[i])
        padding = T - shared - load
        for column, value in ((input_ids, 0), (labels, IGNORED), (positions, 0), (example, PADDING)):
            column.extend([value] * padding)
    columns = [torch.frombuffer(one, dtype=torch.long).view(-1, T) for one in (input_ids, labels, positions, example)]
    n_tokens = sum(lengths) + shared * len(examples)
    one_example_per_row = n_rows == len(examples)
    labelled = (columns[1] != IGNORED).flatten().nonzero()[:, 0]
    return Batch(
        columns[0],
        columns[1],
        n_tokens,
        labelled,
        None if one_example_per_row else columns[2],
        columns[3],
        _sequences(rows, lengths, shared) if as_sequences and not one_example_per_row else None,
    ).to(device)


def _sequences(rows: Sequence[Sequence[int]], lengths: Sequence[int], shared: int) -> Sequences:
    """For rows of examples with these lengths after the shared prefix. Prefix and padding of a row are sequences too.

    The queries of all of them are the flattened rows in order.
    """
    T = shared + max(sum(lengths[i] for i in members) for members in rows)
    n_queries, n_keys, keys = [0], [0], array("q")

    def add(prefix: range, own: range) -> None:
        if own:  # no sequence of no tokens: not every kernel may take it
            n_queries.append(len(own))
            n_keys.append(len(prefix) + len(own))
            keys.extend(prefix)
            keys.extend(own)

    for row, members in enumerate(rows):
        start = row * T + shared
        prefix, nothing = range(row * T, start), range(0)
        add(nothing, prefix)
        for i in members:
            add(prefix, range(start, start + lengths[i]))
            start += lengths[i]
        add(nothing, range(start, (row + 1) * T))
    ends_q, ends_k = (torch.tensor(n).cumsum(0, dtype=torch.int32) for n in (n_queries, n_keys))
    index = torch.frombuffer(keys, dtype=torch.long) if shared else None
    return Sequences(index, ends_q, ends_k, max(n_queries), max(n_keys))


def attention_mask(example: Tensor) -> Tensor:
    """True where a token may attend, (G, T, T): to earlier tokens of its own example and of the shared prefix."""
    T = example.shape[1]
    causal = torch.ones(T, T, dtype=torch.bool, device=example.device).tril()
    return causal & ((example[:, :, None] == example[:, None]) | (example[:, None] == SHARED))


def _common_prefix(examples: Sequence[Example], at_most: int) -> int:
    """Number of tokens, `at_most` that many, that all examples start with."""
    smallest, largest = min(example.input_ids for example in examples), max(example.input_ids for example in examples)
    for i, (one, other) in enumerate(zip(smallest[:at_most], largest[:at_most], strict=False)):
        if one != other:
            return i
    return at_most
