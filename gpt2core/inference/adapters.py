"""Multi-LoRA: each row of a step goes through its own adapter, or none.

Rows are isolated by selection, not by multiplication with 0, since 0 * NaN is NaN: a row's products with the first
matrices of other adapters are replaced by 0, whatever they are, and the second matrices are checked to be finite.

Shape letters: N rows (tokens) of a step; R ranks of all adapters of a step together.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from gpt2core.config import GPT2Config, LoraConfig
from gpt2core.inference.native import Deltas
from gpt2core.linear import linear
from gpt2core.lora import TARGET_LAYERS
from gpt2core.tensors import is_finite, to_device


@dataclass(frozen=True, eq=False)
class Adapter:
    """A loaded adapter. Compared by identity: loading the same files twice gives two adapters."""

    matrices: Mapping[tuple[int, str], tuple[Tensor, Tensor]]  # (layer, path) -> A (rank, in) and scaled B (out, rank)


def make_adapter(
    config: GPT2Config, lora: LoraConfig, state: Mapping[str, Tensor], dtype: torch.dtype, device: torch.device
) -> Adapter:
    """Prepare an adapter, as `gpt2core.checkpoint.read_adapter` returns it, for an `AdapterStack`.

    Raises:
        ValueError: the adapter uses DoRA, or a weight is NaN or infinite, before or after scaling and conversion to
            `dtype`.
    """
    if lora.dora:
        raise ValueError(
            "the adapter uses DoRA, which is only served merged: merge_lora(model), save_pretrained(model, directory) "
            "and serve that directory, or train with lora.dora: false"
        )
    matrices = {}
    for path in {TARGET_LAYERS[target][0] for target in lora.targets}:
        targets = [
            target for target, (layer, _, _) in TARGET_LAYERS.items() if layer == path and target in lora.targets
        ]
        for layer in range(config.n_layer):
            name = f"h.{layer}.{path}"
            a, b = _dense(lora, state[f"{name}.lora_A"], state[f"{name}.lora_B"], targets)
            pair = a.to(device, dtype).contiguous(), b.to(device, dtype).contiguous()
            if not all(map(is_finite, pair)):
                raise ValueError(
                    f"the adapter has NaN or infinite values in {name}, scaled by {lora.scaling} as "
                    f"{str(dtype).removeprefix('torch.')}; the training that made it diverged"
                )
            matrices[layer, path] = pair
    return Adapter(matrices)


def _dense(lora: LoraConfig, a: Tensor, b: Tensor, targets: Sequence[str]) -> tuple[Tensor, Tensor]:
    """A (n * rank, in) and scaled B (out, n * rank) of one layer; B is zero outside the adapted blocks of `out`."""
    n, width, rank = b.shape
    n_blocks = TARGET_LAYERS[targets[0]][2]
    dense = b.new_zeros(n, rank, n_blocks, width)
    for pair, target in enumerate(targets):
        dense[pair, :, TARGET_LAYERS[target][1]] = lora.scaling * b[pair].T
    return a.flatten(0, 1), dense.flatten(2).flatten(0, 1).T


class AdapterStack:
    """Adapters side by side: per layer one matrix A (R, in) and one B (out, R), in which each adapter owns some ranks.

    All rows of a step are multiplied with all of its adapters and keep the products of their own: two matrix products
    per layer, at a cost that grows with the sum of the ranks.
    """

    def __init__(
        self, adapters: Sequence[Adapter], dtype: torch.dtype, device: torch.device, is_native: bool = False
    ) -> None:
        """`is_native`: computed by native.py, row by row with the row's own adapter alone."""
        self.adapters, self.dtype, self.device = tuple(adapters), dtype, device
        self.deltas: dict[tuple[int, str], Deltas] | None = None
        if is_native:
            keys = {key for adapter in adapters for key in adapter.matrices}
            self.deltas = {key: Deltas([adapter.matrices.get(key) for adapter in adapters]) for key in keys}
            return
        self.matrices: dict[tuple[int, str], tuple[Tensor, Tensor]] = {}
        self.owner: dict[str, Tensor] = {}  # path -> (R), the index of the adapter that each rank belongs to
        for path in sorted({path for adapter in adapters for _, path in adapter.matrices}):
            ranks = [len(one.matrices[0, path][0]) if (0, path) in one.matrices else 0 for one in adapters]
            owners = [i for i, n in enumerate(ranks) for _ in range(n)]
            self.owner[path] = to_device(torch.tensor(owners), device)
        for layer, path in sorted({key for adapter in adapters for key in adapter.matrices}):
            parts = [one.matrices[layer, path] for one in adapters if (layer, path) in one.matrices]
            self.matrices[layer, path] = (
                parts[0] if len(parts) == 1 else (torch.cat([a for a, _ in parts]), torch.cat([b for _, b in parts], 1))
            )

    def indices(self, adapters: Sequence[Adapter | None]) -> list[int]:
        """The index in this stack of the adapter of each row; -1 is the base model."""
        index = {adapter: i for i, adapter in enumerate(self.adapters)}
        return [-1 if adapter is None else index[adapter] for adapter in adapters]

    def for_rows(self, adapters: Sequence[Adapter | None]) -> "RowAdapters":
        """For a step whose rows use these adapters of the stack; None is the base model."""
        if len(self.adapters) == 1 and None not in adapters and self.deltas is None:
            return RowAdapters(self, None)
        return RowAdapters(self, to_device(torch.tensor(self.indices(adapters)), self.device))


class RowAdapters:
    """Which adapter each row of a step uses."""

    def __init__(self, stack: AdapterStack, rows: Tensor | None) -> None:
        """`rows` (N): index in the stack of each row's adapter, -1 for the base model; None: all use the only one."""
        self._stack, self._rows = stack, rows
        self._others = dict[str, Tensor]()  # path -> (N, R), True for ranks of other adapters
        if rows is not None and stack.deltas is None:
            self._others = {path: rows[:, None] != owner for path, owner in stack.owner.items()}

    def changes(self, layer: int, path: str) -> bool:
        """Whether an adapter of the step may change the results of this matrix."""
        return (layer, path) in (self._stack.matrices if self._stack.deltas is None else self._stack.deltas)

    def add_delta_(self, y: Tensor, layer: int, path: str, x: Tensor) -> None:
        """Add each row's own low-rank product to y (N, out), in place; x is (N, in)."""
        if self._stack.deltas is not None:
            if delta := self._stack.deltas.get((layer, path)):
                delta.add_(y, x, cast(Tensor, self._rows))
        elif path in self._stack.owner:
            a, b = self._stack.matrices[layer, path]
            low = linear(x, a)  # (N, R)
            y.add_(linear(low.masked_fill_(self._others[path], 0.0) if self._others else low, b))
