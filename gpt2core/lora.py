"""LoRA (arXiv:2106.09685): a wrapper around the linear layers of a target. Independent of file formats.

q, k and v share one fused matrix, `c_attn`; adapting one of them changes only its third of the output. rsLoRA is
another `LoraConfig.scaling`, LoRA+ another learning rate (`gpt2core.optimizers`), DoRA a branch in `LoraLinear`.
"""

from collections.abc import Collection, Iterator, Sequence
from math import sqrt
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpt2core.config import LORA_TARGETS, LoraConfig, LoraTarget
from gpt2core.model import GPT2


class LayerSlice(NamedTuple):
    """One of the equal slices of a linear layer's output."""

    path: str  # of the layer within its transformer block
    position: int  # of this slice, from 0
    n_slices: int


TARGET_LAYERS: dict[LoraTarget, LayerSlice] = {
    "q": LayerSlice("attn.c_attn", 0, 3),
    "k": LayerSlice("attn.c_attn", 1, 3),
    "v": LayerSlice("attn.c_attn", 2, 3),
    "o": LayerSlice("attn.c_proj", 0, 1),
    "fc": LayerSlice("mlp.c_fc", 0, 1),
    "proj": LayerSlice("mlp.c_proj", 0, 1),
}
LAYER_PATHS = tuple(dict.fromkeys(layer.path for layer in TARGET_LAYERS.values()))


def add_lora(model: GPT2, config: LoraConfig, seed: int | None = None) -> GPT2:
    """Wrap the target layers, in place, and freeze all other weights. Outputs do not change: lora_B starts at zero.

    Args:
        seed: seed of lora_A's initial values; None: draw them from torch's default generator.

    Raises:
        ValueError: the model has LoRA layers already.
    """
    if any(True for _ in lora_layers(model)):
        raise ValueError("the model has LoRA layers already; remove_lora(model) first")
    model.requires_grad_(False)
    generator = None if seed is None else torch.Generator(model.wte.weight.device).manual_seed(seed)
    for block in model.h:
        for path in sorted({TARGET_LAYERS[target].path for target in config.targets}):
            parent_name, name = path.split(".")
            parent = block.get_submodule(parent_name)
            setattr(parent, name, LoraLinear(getattr(parent, name), path, config, generator))
    return model


def merge_lora(model: GPT2) -> GPT2:
    """Add every adapter to its weight, so that inference needs no additional computation. Merging twice has no effect.

    Raises:
        ValueError: the adapter has NaN or infinite values; no weight is changed then.
    """
    layers = {name: layer for name, layer in lora_layers(model) if not layer.merged}
    for name, layer in layers.items():
        if not layer.delta_weight().isfinite().all():
            raise ValueError(f"the adapter of {name} has NaN or infinite values; it cannot be merged")
    for layer in layers.values():
        layer.merge()
    return model


def unmerge_lora(model: GPT2) -> GPT2:
    """Restore the weights from before `merge_lora`, bit for bit."""
    for _, layer in lora_layers(model):
        layer.unmerge()
    return model


def remove_lora(model: GPT2) -> GPT2:
    """Remove the adapters: the model as before `add_lora`, with all weights trainable."""
    unmerge_lora(model)
    for name, layer in list(lora_layers(model)):
        parent_name, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent_name), child, layer.linear)
    return model.requires_grad_(True)


def layer_targets(path: str, targets: Collection[LoraTarget] = LORA_TARGETS) -> tuple[LoraTarget, ...]:
    """Return those of the targets that adapt the layer `path`, in the order of its output."""
    return tuple(target for target, layer in TARGET_LAYERS.items() if layer.path == path and target in targets)


def widen_b(b: Tensor, targets: Sequence[LoraTarget]) -> Tensor:
    """Return lora_B of a layer (n, out / n_slices, R) as one matrix (out, n * R), zero outside the targets' slices.

    Args:
        targets: the n targets of the layer, in the order of b.
    """
    n, width, rank = b.shape
    wide = b.new_zeros(TARGET_LAYERS[targets[0]].n_slices, width, n, rank)
    for pair, target in enumerate(targets):
        wide[TARGET_LAYERS[target].position, :, pair] = b[pair]
    return wide.flatten(2).flatten(0, 1)


def lora_layers(model: nn.Module) -> Iterator[tuple[str, "LoraLinear"]]:
    """Return (name, layer) of every adapted layer, in the model's order."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, LoraLinear))


def lora_config(model: GPT2) -> LoraConfig:
    """Return the config that was passed to `add_lora`.

    Raises:
        ValueError: the model has no LoRA layers.
    """
    layer = next((layer for _, layer in lora_layers(model)), None)
    if layer is None:
        raise ValueError("the model has no LoRA layers; add_lora(model, LoraConfig()) first")
    return layer.config


class LoraLinear(nn.Module):
    """y = W x + b, with scaling * B A x added to n of the n_slices equal slices of y.

    lora_A (n, R, in) and lora_B (n, out / n_slices, R) hold one pair of matrices per adapted slice. They stay in fp32
    even if the base is bf16, and are cast on use, since small updates to bf16 weights would be lost.

    DoRA (arXiv:2402.09353, equation 5): each row of V = W + scaling * B A of an adapted slice is scaled to a trained
    length, y = lora_magnitude / ||V|| * V x + b, with lora_magnitude (n, out / n_slices). The norm is a constant for
    the gradient (section 4.3). Dropout is applied to the low-rank path alone.
    """

    def __init__(self, linear: nn.Linear, path: str, config: LoraConfig, generator: torch.Generator | None) -> None:
        super().__init__()
        self.linear = linear
        self.config = config
        self.targets = layer_targets(path, config.targets)
        self.slices = tuple(TARGET_LAYERS[target].position for target in self.targets)
        self.n_slices = TARGET_LAYERS[self.targets[0]].n_slices
        n, device = len(self.targets), linear.weight.device
        self.lora_A = nn.Parameter(torch.empty(n, config.rank, linear.in_features, device=device))
        self.lora_B = nn.Parameter(torch.zeros(n, linear.out_features // self.n_slices, config.rank, device=device))
        self._scales: Tensor | None = None  # (n_slices, 1, n, 1), computed by `_dense_b`
        bound = 1 / sqrt(linear.in_features)  # kaiming_uniform_(a=sqrt(5)), as in the paper's own code
        nn.init.uniform_(self.lora_A, -bound, bound, generator=generator)
        self.unmerged_weight: Tensor | None
        self.register_buffer("unmerged_weight", None, persistent=False)  # a buffer, so that model.to(device) moves it
        if config.dora:
            self.lora_magnitude = nn.Parameter(self.adapted_slices().norm(dim=-1))
        self.train(linear.training)

    @property
    def merged(self) -> bool:
        return self.unmerged_weight is not None

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)  # (B, T, out)
        if self.merged:
            return y
        low = F.linear(F.dropout(x, self.config.dropout, self.training), self.lora_A.to(x.dtype).flatten(0, 1))
        b = self._dense_b().to(x.dtype)  # (out, n * R); low is (B, T, n * R)
        if not self.config.dora:  # the addition is part of the product
            return torch.addmm(y.flatten(0, -2), low.flatten(0, -2), b.t()).view_as(y)
        deltas, parts = F.linear(low, b).chunk(self.n_slices, -1), list(y.chunk(self.n_slices, -1))
        biases = self.linear.bias.chunk(self.n_slices)
        for i, factor in zip(self.slices, self._row_factors().to(x.dtype), strict=True):
            parts[i] = (parts[i] - biases[i] + deltas[i]) * factor + biases[i]
        return torch.cat(parts, -1)

    def _dense_b(self) -> Tensor:
        """Return scaling * lora_B as one matrix (out, n * R), which is zero for slices without an adapter.

        One product with it takes fewer and smaller GPU kernels than a product and a sum per slice, and a concatenation.
        """
        b, scales = self.lora_B, self._scales
        if scales is None or scales.device != b.device or scales.dtype != b.dtype:
            scales = widen_b(b.new_full((len(b), 1, 1), self.config.scaling), self.targets)[:, None, :, None]
            self._scales = scales
        return (scales * b.transpose(0, 1)).flatten(2).flatten(0, 1)

    def base_slices(self) -> Tensor:
        """Return the base weight, divided into all slices of its output: (n_slices, out / n_slices, in), fp32."""
        weight = self.linear.weight if self.unmerged_weight is None else self.unmerged_weight
        return weight.detach().float().unflatten(0, (self.n_slices, -1))

    def adapted_slices(self) -> Tensor:
        """Return the adapted slices of the base weight: (n, out / n_slices, in), fp32."""
        base = self.base_slices()
        return torch.stack([base[i] for i in self.slices])  # a list as index would be copied to the GPU

    def delta_weight(self) -> Tensor:
        """Return the matrix (out, in), fp32, that merging adds to the weight."""
        delta = self.lora_A.new_zeros(self.n_slices, self.lora_B.shape[1], self.lora_A.shape[2], dtype=torch.float32)
        change = self._low_rank()
        if self.config.dora:
            rows = self.adapted_slices()
            change = self._row_factors()[..., None] * (rows + change) - rows
        delta[list(self.slices)] = change
        return delta.flatten(0, 1)

    def _low_rank(self) -> Tensor:
        """Return scaling * B A: (n, out / n_slices, in), fp32."""
        return self.config.scaling * torch.bmm(self.lora_B.float(), self.lora_A.float())

    def _row_factors(self) -> Tensor:
        """Return DoRA's factors lora_magnitude / ||V||: (n, out / n_slices), fp32."""
        with torch.no_grad():
            norms = (self.adapted_slices() + self._low_rank()).norm(dim=-1)
        return self.lora_magnitude.float() / norms

    @torch.no_grad()
    def merge(self) -> None:
        if not self.merged:
            weight = self.linear.weight.data
            self.unmerged_weight = weight
            self.linear.weight.data = (weight.float() + self.delta_weight()).to(weight.dtype)

    @torch.no_grad()
    def unmerge(self) -> None:
        if self.unmerged_weight is not None:
            self.linear.weight.data = self.unmerged_weight
            self.unmerged_weight = None
