"""PEFT's adapter directories (adapter_config.json, adapter_model.safetensors): export and import.

PEFT adapts whole layers. For the fused c_attn it has one pair of matrices; this project has one pair for each adapted
third of the output (q, k and v).
"""

import re
import reprlib
from collections.abc import Mapping
from contextlib import suppress
from math import inf, prod, sqrt
from pathlib import Path
from sys import float_info
from typing import Any

import torch
from safetensors.torch import save as to_safetensors
from torch import Tensor

from gpt2core.config import LORA_TARGETS, GPT2Config, LoraConfig, LoraTarget
from gpt2core.files import json_bytes, read_json, write_files
from gpt2core.lora import TARGET_LAYERS, lora_config, lora_layers
from gpt2core.model import GPT2
from gpt2core.tensors import check_weight, read_tensors

PEFT_WEIGHTS, PEFT_CONFIG, PEFT_BIN = "adapter_model.safetensors", "adapter_config.json", "adapter_model.bin"
MAX_CONFIG = 1_000_000  # maximum size of an adapter's configuration file in bytes
_KEY = re.compile(
    r"(?:base_model\.model\.)?(transformer\.|)h\.(\d{1,9})\."
    r"(attn\.c_attn|attn\.c_proj|mlp\.c_fc|mlp\.c_proj)\.(?:lora_([AB])\.weight|lora_(magnitude)_vector)"
)
# Keys of adapter_config.json that are translated, or that do not change what a trained adapter computes.
_UNDERSTOOD = {
    *(
        "peft_type",
        "task_type",
        "peft_version",
        "base_model_name_or_path",
        "revision",
        "auto_mapping",
        "inference_mode",
    ),
    *(
        "r",
        "lora_alpha",
        "lora_dropout",
        "use_rslora",
        "use_dora",
        "rank_pattern",
        "alpha_pattern",
        "bias",
        "init_lora_weights",
    ),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "fan_in_fan_out"),
    *("megatron_core", "qalora_group_size"),
    *("runtime_config", "eva_config", "ensure_weight_tying"),
}
_MAX_PATTERN = 1_000  # maximum length of a pattern in characters
_MAX_NAME = 28  # maximum length of a module's name in characters: transformer.h.47.attn.c_attn
_MAX_WAYS = 100_000  # maximum number of ways to match a pattern; trying all of them takes a few milliseconds
# Initializations that do not change the base. Others (pissa, olora, corda, loftq, ...) do.
_INITIALIZATIONS = (True, False, None, "gaussian", "eva", "orthogonal")


def export_peft(model: GPT2, directory: str | Path, base: str | None = None) -> Path:
    """Write the adapter so that `peft.PeftModel.from_pretrained(hf_gpt2, directory)` computes the same logits.

    The n pairs of a fused c_attn become one pair of rank n * R, whose lora_B is zero outside the adapted thirds. alpha
    grows with the rank, so the scaling stays the same. Outside the adapted thirds, DoRA's magnitudes are the lengths of
    the base's rows.

    Args:
        base: path or Hub name of the base, which PEFT loads if it is not given a model; None: not known.

    Raises:
        ValueError: the model has no LoRA layers, or their weights are not finite.
    """
    config = lora_config(model)
    state, ranks, alphas = {}, {}, {}
    for name, layer in lora_layers(model):
        n, rank, width = layer.lora_A.shape
        b = layer.lora_B.new_zeros(layer.n_blocks, layer.lora_B.shape[1], n, rank)  # (blocks, out / blocks, n, R)
        for pair, block in enumerate(layer.blocks):
            b[block, :, pair] = layer.lora_B.data[pair]
        key = f"base_model.model.transformer.{name}"
        state[f"{key}.lora_A.weight"] = layer.lora_A.data.reshape(n * rank, width).cpu().clone()
        state[f"{key}.lora_B.weight"] = b.flatten(2).flatten(0, 1).contiguous().cpu()
        if config.dora:
            magnitude = layer.base_blocks().norm(dim=-1)
            magnitude[list(layer.blocks)] = layer.lora_magnitude.data
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
    description = read_json(directory / PEFT_CONFIG, MAX_CONFIG)
    _check_supported(directory / PEFT_CONFIG, description)
    if not (directory / PEFT_WEIGHTS).is_file() and (directory / PEFT_BIN).is_file():
        raise FileNotFoundError(
            f"{directory} has only {PEFT_BIN}, which can execute code and is not read; load it with PEFT and "
            f"save_pretrained it as {PEFT_WEIGHTS}"
        )
    layers, prefix = _read_layers(directory / PEFT_WEIGHTS, config, device, description)
    use_rslora, use_dora = (bool(description.get(key)) for key in ("use_rslora", "use_dora"))
    scalings = {
        (layer, path): _scaling(directory / PEFT_CONFIG, description, f"{prefix}h.{layer}.{path}", len(parts["A"]))
        for (layer, path), parts in layers.items()
    }
    pairs = {
        (layer, target): _used_columns(parts["A"], part)
        for (layer, path), parts in layers.items()
        for target, part in zip(_targets(path), parts["B"].chunk(len(_targets(path))), strict=True)
    }
    changed = {target for (_, target), (_, b) in pairs.items() if b.any()} or {target for _, target in pairs}
    rank = max(len(a) for (_, target), (a, _) in pairs.items() if target in changed)
    if use_dora:
        changed = {target for _, target in pairs}
    targets = [target for target in LORA_TARGETS if target in changed]
    alpha, r = next((pair for pair in scalings.values() if pair[0]), (0.0, 1.0))
    try:
        own = alpha * (sqrt(rank) if use_rslora else rank) / r
        lora = LoraConfig(
            rank, own, tuple(targets), description.get("lora_dropout", 0.0), rslora=use_rslora, dora=use_dora
        )
    except ValueError as error:
        raise ValueError(f"{directory / PEFT_CONFIG}: {error}") from None
    state = {}
    for layer, path in layers:
        # LoraConfig has one scaling for all layers; where PEFT's scaling differs, lora_B is multiplied by the ratio
        own_alpha, own_r = scalings[layer, path]
        ratio = own_alpha * r / (own_r * alpha)
        adapted = [pairs[layer, target] for target in _targets(path) if target in changed]
        if adapted:
            name = f"h.{layer}.{path}"
            state[f"{name}.lora_A"] = torch.stack([_pad(a[:rank], 0, rank) for a, _ in adapted])
            state[f"{name}.lora_B"] = torch.stack([_pad(b[:, :rank], 1, rank) * ratio for _, b in adapted])
            if use_dora:
                state[f"{name}.lora_magnitude"] = layers[layer, path]["magnitude"].unflatten(0, (len(adapted), -1))
    shapes = {key.split(".", 2)[2]: tensor for key, tensor in state.items()}
    zeros = {f"h.{layer}.{part}": tensor for layer in range(config.n_layer) for part, tensor in shapes.items()}
    return lora, {key: torch.zeros_like(tensor) for key, tensor in zeros.items() if key not in state} | state


def _targets(path: str) -> list[LoraTarget]:
    """Return the targets within a layer, in the order of its output."""
    return [target for target in LORA_TARGETS if TARGET_LAYERS[target][0] == path]


def _used_columns(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Remove the zero columns of lora_B (b), and the same rows of lora_A (a). If all are zero, keep all of them."""
    used = b.any(0)
    return (a[used], b[:, used]) if used.any() else (a, b)


def _pad(tensor: Tensor, dim: int, size: int) -> Tensor:
    shape = list(tensor.shape)
    shape[dim] = size - shape[dim]
    return torch.cat([tensor, tensor.new_zeros(shape)], dim)


def _check_supported(file: Path, description: Mapping[str, Any]) -> None:
    if description.get("peft_type") != "LORA":
        raise ValueError(f"{file}: peft_type is {description.get('peft_type')!r}; only 'LORA' is supported")
    if description.get("bias", "none") != "none":
        raise ValueError(f"{file}: bias is {description['bias']!r}; only 'none' is supported")
    initialization = description.get("init_lora_weights", True)
    if initialization not in _INITIALIZATIONS:
        raise ValueError(f"{file}: init_lora_weights is {initialization!r}, which changes the base; export it merged")
    for key, value in description.items():
        if value and key not in _UNDERSTOOD:
            raise ValueError(f"{file}: {key} is {value!r}; this feature of PEFT is not supported")
    for key in ("target_modules", "exclude_modules", "layers_pattern"):
        value = description.get(key)
        if not (value is None or isinstance(value, str) or (isinstance(value, list) and all(map(_is_text, value)))):
            raise ValueError(f"{file}: {key} is {value!r}; it must be a pattern, a list of names, or null")
        # a string is a pattern; a list has names, except in layers_pattern, where it has patterns
        for pattern in [value] if isinstance(value, str) else (value or ()) if key == "layers_pattern" else ():
            _check_pattern(file, key, pattern)
    for key in ("rank_pattern", "alpha_pattern"):
        value = description.get(key)
        for pattern in value if isinstance(value, dict) else ():
            _check_pattern(file, key, pattern)


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _check_pattern(file: Path, key: str, pattern: str) -> None:
    """Reject a pattern whose matching could take too long: `re` backtracks, and blocks all other threads meanwhile."""
    if len(pattern) > _MAX_PATTERN or _ways(f"({pattern})") > _MAX_WAYS:  # in a group, as `_by_module` matches it
        raise ValueError(
            f"{file}: {key} has the pattern {reprlib.repr(pattern)}, whose matching can take too long; it must have at "
            f"most {_MAX_PATTERN} characters, few of * + ? | and no repeated group: list the modules' names instead"
        )


def _ways(pattern: str) -> float:
    """Return an upper bound of the number of ways in which `re` can try to match a pattern to a module's name.

    Each repetition multiplies the number by the length of the name, each optional element by 2, and each group by its
    number of alternatives. The bound is infinite for a repeated group, which may contain repetitions, and for a verbose
    pattern, which may hide them.
    """
    plain = re.sub(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]", "x", pattern, flags=re.DOTALL)  # replaces escapes and classes
    if re.search(r"\)[*+{]|\(\?[A-Za-z-]*x", plain):
        return inf
    n_repeats, n_optional = len(re.findall(r"[*+{]", plain)), len(re.findall(r"(?<![(*+?}])\?", plain))
    alternatives = prod(1 + part.count("|") for part in re.split(r"[()]", plain))
    return _MAX_NAME**n_repeats * 2**n_optional * alternatives


def _read_layers(
    file: Path, config: GPT2Config, device: str | torch.device, description: Mapping[str, Any]
) -> tuple[dict[tuple[int, str], dict[str, Tensor]], str]:
    """Read and check the tensors of a PEFT adapter.

    Returns {(index of the block, path of the layer): {"A": (r, in), "B": (out, r)}} in fp32, with DoRA also
    "magnitude": (out), and the prefix of "h." in PEFT's module names: "transformer.", or "" for a model without its
    head.
    """
    needed = ("A", "B", "magnitude") if description.get("use_dora") else ("A", "B")
    C, M = config.n_embd, config.mlp_width
    sizes = {"attn.c_attn": (C, 3 * C), "attn.c_proj": (C, C), "mlp.c_fc": (C, M), "mlp.c_proj": (M, C)}
    found: dict[tuple[int, str], dict[str, Tensor]] = {}
    prefixes = set()
    for key, tensor in read_tensors(file, device).items():
        match = _KEY.fullmatch(key)
        prefix, layer, path, matrix, magnitude = match.groups("") if match else ("", config.n_layer, "", "", "")
        if int(layer) >= config.n_layer or (matrix or magnitude) not in needed:
            raise ValueError(f"{file}: key {key!r} is not an adapted layer of a GPT-2 with n_layer={config.n_layer}")
        width, out = sizes[path]
        expected: tuple[int, ...] = (out,)
        if matrix and tensor.dim() == 2:
            expected = (tensor.shape[0], width) if matrix == "A" else (out, tensor.shape[1])
        if tuple(tensor.shape) != expected or tensor.dim() != (2 if matrix else 1) or 0 in tensor.shape:
            raise ValueError(f"{file}: key {key!r} has the shape {tuple(tensor.shape)}, which does not fit {expected}")
        check_weight(file, key, tensor)
        prefixes.add(prefix)
        found.setdefault((int(layer), path), {})[matrix or magnitude] = tensor.float()
    paths = sorted({path for _, path in found})
    if not paths:
        raise ValueError(f"{file} has no tensors")
    if len(prefixes) > 1:
        raise ValueError(f"{file} has keys both with and without 'transformer.' before 'h.'; they are of two models")
    [prefix] = prefixes
    layers = {}
    for layer in range(config.n_layer):
        for path in paths:
            pair, is_adapted = found.get((layer, path), {}), _is_adapted(description, f"{prefix}h.{layer}.{path}")
            if not pair and not is_adapted:
                if "magnitude" in needed:
                    raise ValueError(
                        f"{file.parent / PEFT_CONFIG} leaves out h.{layer}.{path} but adapts this layer of other "
                        "blocks; with use_dora, only adapters of all blocks are supported: merge it by PEFT's "
                        "merge_and_unload and use the result as the base"
                    )
                continue
            missing = next((part for part in needed if part not in pair), None)
            if missing is not None:
                raise ValueError(f"{file}: lora_{missing} of h.{layer}.{path} is missing")
            if not is_adapted:
                raise ValueError(f"{file} has weights of h.{layer}.{path}, which {PEFT_CONFIG} leaves out")
            if pair["A"].shape[0] != pair["B"].shape[1]:
                ranks = f"{pair['A'].shape[0]} and {pair['B'].shape[1]}"
                raise ValueError(f"{file}: lora_A and lora_B of h.{layer}.{path} have different ranks, {ranks}")
            layers[layer, path] = pair
    return layers, prefix


def _is_adapted(description: Mapping[str, Any], name: str) -> bool:
    """Return whether PEFT adapts the module of this name, by the rules of its `check_target_module_exists`."""
    targets, excluded = description.get("target_modules"), description.get("exclude_modules")
    if excluded and _matches(name, excluded):
        return False
    if targets is None:
        targets = ["c_attn"]  # PEFT's default for GPT-2
    elif isinstance(targets, str):
        if targets.lower() != "all-linear":
            return _matches(name, targets)
        targets = ["c_attn", "c_proj", "c_fc"]
    layers = description.get("layers_to_transform")
    if layers is None or layers == [] or name in targets:  # a full name is adapted in any block
        return _matches(name, targets)
    return _matches(name, targets) and _block(description, name) in (layers if isinstance(layers, list) else [layers])


def _block(description: Mapping[str, Any], name: str) -> int | None:
    """Return the index of the module's block. None: PEFT finds no index, as in "h.0.attn.c_attn" without a pattern."""
    patterns = description.get("layers_pattern") or []
    patterns = [patterns] if isinstance(patterns, str) else patterns
    for pattern in [rf"(?:^|.*?\.){each}" for each in patterns] or [r".*?\.[^.]*"]:
        with suppress(re.error):
            if match := re.match(rf"{pattern}\.(?P<block>\d+)\.", name):
                return int(match["block"])
    return None


def _matches(name: str, modules: Any) -> bool:
    """Return whether `modules` matches the module: a pattern for its whole name, or a list of names or name endings."""
    if not isinstance(modules, str):
        return any(name == module or name.endswith(f".{module}") for module in modules)
    try:
        return re.fullmatch(modules, name) is not None
    except re.error:
        return False


def _scaling(file: Path, description: Mapping[str, Any], module: str, rank: int) -> tuple[float, float]:
    """Return numerator and denominator of a layer's scaling. They are separate so that integers stay exact."""
    r = _by_module(description, "rank_pattern", module, description.get("r"))
    alpha = _by_module(description, "alpha_pattern", module, description.get("lora_alpha"))
    if r != rank or isinstance(r, bool):
        raise ValueError(f"{file}: the rank of {module} is {r!r}, but its weights have rank {rank}")
    if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not abs(alpha) <= float_info.max:
        raise ValueError(f"{file}: lora_alpha of {module} is {alpha!r}; it must be a finite number")
    return float(alpha), sqrt(rank) if description.get("use_rslora") else float(rank)


def _by_module(description: Mapping[str, Any], name: str, module: str, default: Any) -> Any:
    """Return the value of the first pattern that matches the end of the module's name, as PEFT does; else `default`."""
    patterns = description.get(name) or {}
    if not isinstance(patterns, dict):
        return default
    for pattern, value in patterns.items():
        if _matches(module, [pattern]) or _matches(module, rf"(.*\.)?({pattern})"):
            return value
    return default
