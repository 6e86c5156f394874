"""Multi-LoRA: each row of a step uses its own adapter, or none.

A row never reads another adapter's product: rows are isolated by selection, not by multiplication with 0, since 0 * NaN
is NaN. All weights are also checked to be finite.

Shape letters: N rows (tokens) of a step; R sum of the ranks of all adapters of a step.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from gpt2core.config import GPT2Config, LoraConfig, LoraTarget
from gpt2core.inference import native
from gpt2core.linear import linear
from gpt2core.lora import LAYER_PATHS, TARGET_LAYERS, layer_targets, widen_b
from gpt2core.tensors import int_tensor, is_finite, to_device


@dataclass(frozen=True, eq=False)
class Adapter:
    """A loaded adapter. Adapters are compared by identity: loading the same files twice gives two adapters."""

    matrices: Mapping[
        tuple[int, LoraTarget], tuple[Tensor, Tensor]
    ]  # (layer, target) -> A (rank, in), scaled B (width, rank)

    @cached_property
    def for_kernels(self) -> native.LowRankMatrices:
        return native.LowRankMatrices(self.matrices)


def make_adapter(
    config: GPT2Config, lora: LoraConfig, state: Mapping[str, Tensor], dtype: torch.dtype, device: torch.device
) -> Adapter:
    """Prepare an adapter for a stack.

    Args:
        lora, state: the results of `gpt2core.adapter_files.read_adapter`.

    Raises:
        ValueError: the adapter uses DoRA, or a weight is NaN or infinite, before or after scaling and conversion to
            `dtype`.
    """
    if lora.dora:
        raise ValueError(
            "the adapter uses DoRA, which is only served merged: merge_lora(model), save_pretrained(model, directory) "
            "and serve that directory, or train with lora.dora: false"
        )
    matrices: dict[tuple[int, LoraTarget], tuple[Tensor, Tensor]] = {}
    for path in {TARGET_LAYERS[target].path for target in lora.targets}:
        for layer in range(config.n_layer):
            name = f"h.{layer}.{path}"
            a, b = state[f"{name}.lora_A"].to(device, dtype), (lora.scaling * state[f"{name}.lora_B"]).to(device, dtype)
            if not (is_finite(a) and is_finite(b)):
                raise ValueError(
                    f"the adapter has NaN or infinite values in {name}, scaled by {lora.scaling} as "
                    f"{str(dtype).removeprefix('torch.')}; the training that made it diverged"
                )
            matrices |= {(layer, target): (a[i], b[i]) for i, target in enumerate(layer_targets(path, lora.targets))}
    return Adapter(matrices)


class AdapterStack:
    """Adapters concatenated along the rank: for each matrix of the model one A (R, in) and one B (out, R).

    Every row is multiplied with all adapters of the step and keeps only the products of its own adapter. This takes two
    matrix products per layer, whose cost grows with the sum of the ranks. B is zero outside the outputs that a target
    changes.
    """

    def __init__(self, adapters: Sequence[Adapter], device: torch.device) -> None:
        self.adapters, self.device = tuple(adapters), device
        self._index = _index_of(adapters)
        self.matrices: dict[tuple[int, str], tuple[Tensor, Tensor]] = {}
        self.owner: dict[str, Tensor] = {}  # path -> (R): index of each rank's adapter
        n_layer = 1 + max(layer for adapter in adapters for layer, _ in adapter.matrices)
        for path in LAYER_PATHS:
            adapted = [
                (i, target)
                for i, adapter in enumerate(adapters)
                for target in layer_targets(path)
                if (0, target) in adapter.matrices
            ]
            if not adapted:
                continue
            rank_owners = [i for i, target in adapted for _ in range(len(adapters[i].matrices[0, target][0]))]
            self.owner[path] = to_device(torch.tensor(rank_owners), device)
            for layer in range(n_layer):
                pairs = [(target, *adapters[i].matrices[layer, target]) for i, target in adapted]
                wide = [widen_b(b[None], [target]) for target, _, b in pairs]
                self.matrices[layer, path] = torch.cat([a for _, a, _ in pairs]), torch.cat(wide, 1)

    def indices(self, adapters: Sequence[Adapter | None]) -> list[int]:
        """Return the index in this stack of each row's adapter; -1 is the base model."""
        return [self._index[adapter] for adapter in adapters]

    def for_rows(self, adapters: Sequence[Adapter | None]) -> "RowAdapters":
        """Prepare a step whose rows use these adapters of the stack; None is the base model."""
        if len(self.adapters) == 1 and None not in adapters:
            return RowAdapters(self, None)
        return RowAdapters(self, to_device(int_tensor(self.indices(adapters)), self.device))


def _index_of(adapters: Sequence[Adapter]) -> dict[Adapter | None, int]:
    return {None: -1} | {adapter: i for i, adapter in enumerate(adapters)}


class RowAdapters:
    """The adapter of each row of a step."""

    def __init__(self, stack: AdapterStack, rows: Tensor | None) -> None:
        """
        Args:
            rows: (N), index in the stack of each row's adapter, or -1 for the base model. None: the stack has one
                adapter, and all rows use it.
        """
        self._stack = stack
        self._others = dict[str, Tensor]()  # path -> (N, R): True for ranks of other adapters
        if rows is not None:
            self._others = {path: rows[:, None] != owner for path, owner in stack.owner.items()}

    def add_delta_(self, y: Tensor, layer: int, path: str, x: Tensor) -> None:
        """Add each row's own low-rank product to y (N, out), in place; x is (N, in)."""
        if path in self._stack.owner:
            a, b = self._stack.matrices[layer, path]
            low = linear(x, a)  # (N, R)
            y.add_(linear(low.masked_fill_(self._others[path], 0.0) if self._others else low, b))


class NativeAdapterStack:
    """Adapters for native.py, which computes only the products of each row's own adapter."""

    def __init__(self, adapters: Sequence[Adapter], n_layer: int) -> None:
        self.adapters, self._index = tuple(adapters), _index_of(adapters)
        self._table = native.AdapterTable([adapter.for_kernels for adapter in adapters], n_layer)

    def for_rows(self, adapters: Sequence[Adapter | None]) -> native.RowAdapters:
        """Prepare a step whose rows use these adapters of the stack; None is the base model."""
        return native.RowAdapters(self._table, torch.tensor([self._index[adapter] for adapter in adapters]))
