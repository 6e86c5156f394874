"""PEFT's adapter directories (adapter_config.json, adapter_model.safetensors): export and import.

PEFT adapts whole layers. For the fused c_attn it has one pair of matrices; this project has one pair for each adapted
third of the output (q, k and v).
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from math import sqrt
from pathlib import Path

import torch
from safetensors.torch import save as to_safetensors
from torch import Tensor

from gpt2core.config import LORA_TARGETS, GPT2Config, LoraConfig, LoraTarget
from gpt2core.files import json_bytes, write_files
from gpt2core.lora import layer_targets, lora_config, lora_layers, widen_b
from gpt2core.model import GPT2
from gpt2core.peft_config import MERGE, PEFT_CONFIG, PeftConfig
from gpt2core.tensors import check_weight, read_tensors

PEFT_WEIGHTS, PEFT_BIN = "adapter_model.safetensors", "adapter_model.bin"
_KEY = re.compile(
    r"(?:base_model\.model\.)?(transformer\.|)h\.(\d{1,9})\."
    r"(attn\.c_attn|attn\.c_proj|mlp\.c_fc|mlp\.c_proj)\.(?:lora_([AB])\.weight|lora_(magnitude)_vector)"
)
_EMBEDDING = re.compile(r"base_model\.model\.(?:transformer\.)?(wte|wpe|lm_head)\.(.*)")

Pair = tuple[Tensor, Tensor]  # lora_A (r, in) and lora_B (out, r) of one target


def export_peft(model: GPT2, directory: str | Path, base: str | None = None, revision: str | None = None) -> Path:
    """Write the adapter so that `peft.PeftModel.from_pretrained(hf_gpt2, directory)` computes the same logits.

    The n pairs of a fused c_attn become one pair of rank n * R, whose lora_B is zero outside the adapted thirds. alpha
    grows with the rank, so the scaling stays the same. Outside the adapted thirds, DoRA's magnitudes are the lengths of
    the base's rows.

    Args:
        base: path or Hub name of the base, which PEFT loads if it is not given a model; None: not known.
        revision: commit of a base of the Hub, which PEFT then loads; None: the newest.

    Raises:
        ValueError: the model has no LoRA layers, or their weights are not finite.
    """
    config = lora_config(model)
    state, ranks, alphas = {}, {}, {}
    for name, layer in lora_layers(model):
        n, rank, width = layer.lora_A.shape
        key = f"base_model.model.transformer.{name}"
        state[f"{key}.lora_A.weight"] = layer.lora_A.data.reshape(n * rank, width).cpu().clone()
        state[f"{key}.lora_B.weight"] = widen_b(layer.lora_B.data, layer.targets).cpu()
        if config.dora:
            magnitude = layer.base_slices().norm(dim=-1)
            magnitude[list(layer.slices)] = layer.lora_magnitude.data
            state[f"{key}.lora_magnitude_vector"] = magnitude.flatten().cpu()
        module = ".".join(name.split(".")[2:])  # attn.c_proj and mlp.c_proj need different names
        assert config.alpha is not None
        ranks[module], alphas[module] = n * rank, (sqrt(n) if config.rslora else n) * config.alpha
    for key, tensor in state.items():
        check_weight("the adapter", key, tensor)
    description = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "revision": revision,
        "r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "use_rslora": config.rslora,
        "use_dora": config.dora,
        "target_modules": sorted(ranks),
        "rank_pattern": ranks,
        "alpha_pattern": alphas,
        "fan_in_fan_out": True,  # Hugging Face's GPT-2 uses Conv1D, with weights (in, out)
        "bias": "none",
        "inference_mode": True,
    }
    weights = to_safetensors(state, {"format": "pt"})
    return write_files(directory, {PEFT_WEIGHTS: weights, PEFT_CONFIG: json_bytes(description)})


def read_peft(
    directory: Path, config: GPT2Config, device: str | torch.device = "cpu"
) -> tuple[LoraConfig, dict[str, Tensor]]:
    """Read a PEFT adapter as LoRA config and weights of this project. The outputs are the same as PEFT's.

    An adapted c_attn becomes one pair for each of q, k and v that it changes: the same lora_A and a third of lora_B,
    without the columns of lora_B that are zero in this third. Layers with a lower rank are padded with zeros, and
    layers without an adapter get zeros. DoRA adapts q, k and v in any case, because the magnitude may differ from the
    base's even where lora_B is zero. DoRA of a subset of the blocks is rejected: the magnitudes of the other blocks are
    the lengths of the base's rows, which are not known here.

    Raises:
        FileNotFoundError, ValueError: a file is missing or damaged, or the adapter needs a feature of PEFT that this
            project does not have; the message names it.
    """
    peft = PeftConfig.read(directory)
    if not (directory / PEFT_WEIGHTS).is_file() and (directory / PEFT_BIN).is_file():
        raise FileNotFoundError(
            f"{directory} has only {PEFT_BIN}, which can execute code and is not read; convert it to {PEFT_WEIGHTS}: "
            "load it with PEFT and call save_pretrained(directory)"
        )
    layers = _read_layers(directory / PEFT_WEIGHTS, config, device, peft)
    pairs = {
        (layer.block, target): _used_columns(layer.a, b)
        for layer in layers
        for target, b in zip(layer.targets, layer.b.chunk(len(layer.targets)), strict=True)
    }
    # LoraConfig has one scaling for all layers: that of the first layer whose alpha is not zero
    scaling = next((layer.scaling for layer in layers if layer.scaling[0]), (0.0, 1.0))
    lora = _to_lora_config(peft, pairs, scaling)
    state: dict[str, Tensor] = {}
    for layer in layers:
        adapted = [pairs[layer.block, target] for target in layer.targets if target in lora.targets]
        if adapted:
            state |= _to_state(layer, adapted, lora.rank, scaling)
    shapes = {key.split(".", 2)[2]: tensor for key, tensor in state.items()}
    zeros = {f"h.{block}.{part}": tensor for block in range(config.n_layer) for part, tensor in shapes.items()}
    return lora, {key: torch.zeros_like(tensor) for key, tensor in zeros.items() if key not in state} | state


def _to_lora_config(
    peft: PeftConfig, pairs: Mapping[tuple[int, LoraTarget], Pair], scaling: tuple[float, float]
) -> LoraConfig:
    changed = {target for (_, target), (_, b) in pairs.items() if b.any()} or {target for _, target in pairs}
    rank = max(len(a) for (_, target), (a, _) in pairs.items() if target in changed)
    if peft.dora:
        changed = {target for _, target in pairs}
    alpha, r = scaling
    try:
        return LoraConfig(
            rank,
            alpha * (sqrt(rank) if peft.rslora else rank) / r,
            tuple(target for target in LORA_TARGETS if target in changed),
            peft.values.get("lora_dropout", 0.0),
            rslora=peft.rslora,
            dora=peft.dora,
        )
    except ValueError as error:
        raise ValueError(f"{peft.file}: {error}") from None


def _to_state(layer: "_Layer", adapted: Sequence[Pair], rank: int, scaling: tuple[float, float]) -> dict[str, Tensor]:
    """Return this project's weights of a layer from the pairs of its adapted targets.

    Args:
        scaling: that of the LoraConfig. lora_B is multiplied by the ratio of the layer's own scaling to it.
    """
    (own_alpha, own_r), (alpha, r) = layer.scaling, scaling
    ratio = own_alpha * r / (own_r * alpha)
    name = f"h.{layer.block}.{layer.path}"
    state = {
        f"{name}.lora_A": torch.stack([_pad(a[:rank], 0, rank) for a, _ in adapted]),
        f"{name}.lora_B": torch.stack([_pad(b[:, :rank], 1, rank) * ratio for _, b in adapted]),
    }
    if layer.magnitude is not None:
        state[f"{name}.lora_magnitude"] = layer.magnitude.unflatten(0, (len(adapted), -1))
    return state


@dataclass(frozen=True)
class _Layer:
    """PEFT's adapter of one layer, in fp32."""

    block: int
    path: str  # of the layer within its block: attn.c_attn, attn.c_proj, mlp.c_fc or mlp.c_proj
    scaling: tuple[float, float]  # see `PeftConfig.scaling`
    a: Tensor  # (r, in)
    b: Tensor  # (out, r)
    magnitude: Tensor | None  # (out), with DoRA

    @property
    def targets(self) -> tuple[LoraTarget, ...]:
        """The targets within the layer, in the order of its output."""
        return layer_targets(self.path)


def _used_columns(a: Tensor, b: Tensor) -> Pair:
    """Remove the zero columns of lora_B (b), and the same rows of lora_A (a). If all are zero, keep all of them."""
    used = b.any(0)
    return (a[used], b[:, used]) if used.any() else (a, b)


def _pad(tensor: Tensor, dim: int, size: int) -> Tensor:
    shape = list(tensor.shape)
    shape[dim] = size - shape[dim]
    return torch.cat([tensor, tensor.new_zeros(shape)], dim)


def _read_layers(file: Path, config: GPT2Config, device: str | torch.device, peft: PeftConfig) -> list[_Layer]:
    """Read and check the layers of a PEFT adapter."""
    needed = ("A", "B", "magnitude") if peft.dora else ("A", "B")
    prefix, tensors = _read_matrices(file, config, device, needed)
    layers = []
    for block, path in product(range(config.n_layer), sorted({path for _, path in tensors})):
        parts, name = tensors.get((block, path), {}), f"h.{block}.{path}"
        is_adapted = peft.adapts(prefix + name)
        if not parts and not is_adapted:
            if peft.dora:
                raise ValueError(
                    f"{peft.file} leaves out {name} but adapts this layer of other blocks; with use_dora, only "
                    f"adapters of all blocks are supported: {MERGE}"
                )
            continue
        missing = next((part for part in needed if part not in parts), None)
        if missing is not None:
            raise ValueError(f"{file}: lora_{missing} of {name} is missing")
        if not is_adapted:
            raise ValueError(f"{file} has weights of {name}, which {PEFT_CONFIG} leaves out")
        a, b = parts["A"], parts["B"]
        if a.shape[0] != b.shape[1]:
            raise ValueError(f"{file}: lora_A and lora_B of {name} have different ranks, {a.shape[0]} and {b.shape[1]}")
        layers.append(_Layer(block, path, peft.scaling(prefix + name, len(a)), a, b, parts.get("magnitude")))
    return layers


def _refuse_embedding(file: Path, module: str, weight: str) -> None:
    if "lora_" in weight or "base_layer" in weight:
        raise ValueError(
            f"{file} has LoRA of {module}, but only layers within the blocks can be adapted; train it without wte and "
            "lm_head in target_modules"
        )
    raise ValueError(
        f"{file} has weights of {module}, which belong to the base; if training did not change them, save the adapter "
        f"with save_pretrained(directory, save_embedding_layers=False), otherwise {MERGE}"
    )


def _read_matrices(
    file: Path, config: GPT2Config, device: str | torch.device, needed: Sequence[str]
) -> tuple[str, dict[tuple[int, str], dict[str, Tensor]]]:
    """Return the prefix of all keys, "transformer." or "", and the tensors in fp32: (block, path) -> name -> tensor.

    Args:
        needed: names of the tensors that a layer can have.
    """
    C, M = config.n_embd, config.mlp_width
    sizes = {"attn.c_attn": (C, 3 * C), "attn.c_proj": (C, C), "mlp.c_fc": (C, M), "mlp.c_proj": (M, C)}
    tensors: dict[tuple[int, str], dict[str, Tensor]] = {}
    prefixes = set()  # "transformer.", or "" for a model without its head
    for key, tensor in read_tensors(file, device).items():
        if embedding := _EMBEDDING.fullmatch(key):
            _refuse_embedding(file, *embedding.groups())
        match = _KEY.fullmatch(key)
        prefix, block, path, matrix, magnitude = match.groups("") if match else ("", config.n_layer, "", "", "")
        if int(block) >= config.n_layer or (matrix or magnitude) not in needed:
            raise ValueError(f"{file}: key {key!r} is not an adapted layer of a GPT-2 with n_layer={config.n_layer}")
        width, out = sizes[path]
        expected: tuple[int, ...] = (out,)
        if matrix and tensor.dim() == 2:
            expected = (tensor.shape[0], width) if matrix == "A" else (out, tensor.shape[1])
        if tuple(tensor.shape) != expected or tensor.dim() != (2 if matrix else 1) or 0 in tensor.shape:
            raise ValueError(f"{file}: key {key!r} has the shape {tuple(tensor.shape)}, which does not fit {expected}")
        check_weight(file, key, tensor)
        prefixes.add(prefix)
        tensors.setdefault((int(block), path), {})[matrix or magnitude] = tensor.float()
    if not tensors:
        raise ValueError(f"{file} has no tensors")
    if len(prefixes) > 1:
        raise ValueError(f"{file} has keys both with and without 'transformer.' before 'h.': it mixes two models")
    [prefix] = prefixes
    return prefix, tensors
