"""Adapter directories with adapter.safetensors and adapter.json. `read_adapter` also reads PEFT's format."""

import hashlib
import logging
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as to_safetensors
from torch import Tensor

from gpt2core.config import GPT2Config, LoraConfig
from gpt2core.files import directory_hint, json_bytes, read_json, write_files
from gpt2core.lora import add_lora, lora_config, lora_layers
from gpt2core.model import GPT2
from gpt2core.peft_config import MAX_CONFIG, PEFT_CONFIG
from gpt2core.peft_format import read_peft
from gpt2core.prompt import PROMPT_TEMPLATE
from gpt2core.tensors import check_weight, read_tensors

logger = logging.getLogger(__name__)

ADAPTER_WEIGHTS, ADAPTER_CONFIG = "adapter.safetensors", "adapter.json"


def save_adapter(model: GPT2, directory: str | Path, base: Mapping[str, Any] | None = None) -> Path:
    """Write the LoRA weights (fp32), their config, the prompt template's digest and a reference to the base.

    Raises:
        ValueError: the model has no LoRA layers, or their weights are not finite.
    """
    config = lora_config(model)
    state = _adapter_state(model)
    for key, tensor in state.items():
        check_weight("the adapter", key, tensor)
    weights = to_safetensors(state)
    description = {
        "lora": asdict(config),
        "base": dict(base or {}),
        "prompt": {"name": PROMPT_TEMPLATE.name, "sha256": PROMPT_TEMPLATE.sha256},
        # by this digest, `read_adapter` detects files that do not belong together after a crash between the two writes
        "sha256": hashlib.sha256(weights).hexdigest(),
    }
    return write_files(directory, {ADAPTER_WEIGHTS: weights, ADAPTER_CONFIG: json_bytes(description)})


def load_adapter(
    model: GPT2, directory: str | Path, base_sha256: str | None = None, accept_other_base: bool = False
) -> GPT2:
    """Read an adapter (this project's or PEFT's format) into the model, in place; add LoRA layers if there are none.

    Args:
        base_sha256: digest of the model's base, compared with the base's digest in the adapter if both are known.
        accept_other_base: if the digests differ, log a warning instead of raising an error.

    Raises:
        FileNotFoundError: a file of the adapter is missing.
        ValueError: a file is damaged, a key or shape does not fit the model, a weight is not finite, the adapter was
            trained on another base or with another prompt template, or the model has LoRA layers of another config or
            merged ones. The model is unchanged.
    """
    lora, state = read_adapter(directory, model.config, model.wte.weight.device, base_sha256, accept_other_base)
    layers = list(lora_layers(model))
    if not layers:
        add_lora(model, lora)
    elif lora_config(model) != lora:
        raise ValueError(
            f"the model has LoRA layers of {lora_config(model)}, but {directory} has {lora}; remove_lora(model) first"
        )
    elif any(layer.merged for _, layer in layers):
        raise ValueError("the model's adapter is merged; unmerge_lora(model) before loading another")
    model.load_state_dict(state, strict=False)
    return model


def read_adapter(
    directory: str | Path,
    config: GPT2Config,
    device: str | torch.device = "cpu",
    base_sha256: str | None = None,
    accept_other_base: bool = False,
) -> tuple[LoraConfig, dict[str, Tensor]]:
    """Read an adapter's LoRA config and weights, and check names and shapes against a model of `config`.

    Raises:
        FileNotFoundError, ValueError: as `load_adapter`.
    """
    directory = Path(directory)
    if not (directory / ADAPTER_CONFIG).is_file():
        if not (directory / PEFT_CONFIG).is_file():
            is_model = (directory / "config.json").is_file()
            otherwise = "it has a whole model, which is used as a base (base.name)" if is_model else ""
            hint = directory_hint(directory, ADAPTER_CONFIG, PEFT_CONFIG, otherwise=otherwise)
            raise FileNotFoundError(f"{directory} has neither {ADAPTER_CONFIG} nor PEFT's {PEFT_CONFIG}; {hint}")
        return read_peft(directory, config, device)
    file = directory / ADAPTER_WEIGHTS
    description = read_json(directory / ADAPTER_CONFIG, MAX_CONFIG)
    lora = _read_lora_config(directory / ADAPTER_CONFIG, description)
    _check_prompt(directory / ADAPTER_CONFIG, description.get("prompt"))
    _check_base(directory / ADAPTER_CONFIG, description.get("base"), base_sha256, accept_other_base)
    state = read_tensors(file, device)
    if description.get("sha256") != hashlib.sha256(file.read_bytes()).hexdigest():
        raise ValueError(f"{file} does not match its {ADAPTER_CONFIG} (sha256 differs); save the adapter again")
    largest = max((size for tensor in state.values() for size in tensor.shape), default=0)
    if lora.rank > largest:  # before a model of that size is allocated
        raise ValueError(
            f"{directory / ADAPTER_CONFIG}: rank is {lora.rank}, but no tensor in {file.name} is that large"
        )
    with torch.device("meta"):
        expected = _adapter_state(add_lora(GPT2(config), lora))
    for key in expected.keys() | state.keys():
        if key not in state or key not in expected:
            problem = "missing" if key in expected else f"not a key of this model with {lora}"
            raise ValueError(f"{file}: key {key!r} is {problem}")
        if state[key].shape != expected[key].shape:
            shapes = f"{tuple(state[key].shape)} in the file, {tuple(expected[key].shape)} by the config"
            raise ValueError(f"{file}: key {key!r} has a shape that differs from its config: {shapes}")
        check_weight(file, key, state[key])
    return lora, state


def _read_lora_config(file: Path, description: Mapping[str, Any]) -> LoraConfig:
    values = description.get("lora")
    if not isinstance(values, dict):
        raise ValueError(f"{file}: 'lora' must be an object with the fields of LoraConfig")
    try:
        return LoraConfig(**values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{file}: no valid LoRA config under 'lora': {error}") from None


def _check_prompt(file: Path, prompt: Any) -> None:
    """Reject an adapter that was trained with another prompt template. Old adapters without the key are accepted."""
    if prompt is None:
        return
    name, sha256 = (prompt.get(key) for key in ("name", "sha256")) if isinstance(prompt, dict) else (prompt, None)
    if sha256 != PROMPT_TEMPLATE.sha256:
        raise ValueError(
            f"{file}: the adapter was trained with prompt template {name!r} (sha256 {str(sha256)[:12]}), but this code "
            f"uses {PROMPT_TEMPLATE.name!r} (sha256 {PROMPT_TEMPLATE.sha256[:12]}); train it again or use its template"
        )


def _check_base(file: Path, base: Any, sha256: str | None, accept_other: bool) -> None:
    """Reject an adapter that was trained on another base, if both digests are known."""
    named = base.get("sha256") if isinstance(base, dict) else None
    if sha256 is None or named is None or named == sha256:
        return
    name = base.get("name", "")
    problem = (
        f"{file}: the adapter was trained on the base {name!r} with sha256 {named!r}, but this base has sha256 {sha256}"
    )
    if not accept_other:
        raise ValueError(f"{problem}; load that base, or accept another one explicitly")
    logger.warning("%s; loading it anyway", problem)


def _adapter_state(model: GPT2) -> dict[str, Tensor]:
    return {
        f"{name}.{part}": getattr(layer, part).detach().float().contiguous()
        for name, layer in lora_layers(model)
        for part, _ in layer.named_parameters(recurse=False)
    }
