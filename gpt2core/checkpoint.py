"""Checkpoint files: Hugging Face GPT-2 directories, this project's adapters, PEFT exports.

The only module that knows foreign parameter names. It reads and writes only safetensors and JSON: nothing that is
loaded can run code.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, fields
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_safetensors
from torch import Tensor

from gpt2core.config import GPT2Config, LoraConfig
from gpt2core.lora import LoraLinear, add_lora, lora_layers
from gpt2core.model import GPT2
from gpt2core.prompt import PROMPT_TEMPLATE

CONV1D = ("c_attn.weight", "c_proj.weight", "c_fc.weight")  # Hugging Face's GPT-2 stores these as (in, out)
WEIGHTS, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
ADAPTER_WEIGHTS, ADAPTER_CONFIG = "adapter.safetensors", "adapter.json"


def load_pretrained(
    directory: str | Path, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
) -> GPT2:
    """Read a Hugging Face GPT-2 checkpoint (one file or sharded); the model is in eval mode.

    Raises:
        FileNotFoundError: config.json or the safetensors files are missing.
        ValueError: a file is damaged, a key is missing or unknown, a shape differs, or the config needs a feature that
            this GPT-2 does not have; the message names file, key and both values.
    """
    directory = Path(directory)
    config = read_config(directory / CONFIG)
    with torch.device("meta"):  # skip drawing random weights that are overwritten below
        model = GPT2(config)
    expected = dict(model.state_dict())
    files = _weight_files(directory)
    state: dict[str, Tensor] = {}
    for file in files:
        for key, tensor in _read_tensors(file, device).items():
            name = key.removeprefix("transformer.")
            if name.endswith((".attn.bias", ".attn.masked_bias")):  # constant causal masks of old checkpoints
                continue
            if name != "lm_head.weight" and name not in expected:
                raise ValueError(f"{file}: key {key!r} is not a key of GPT-2 with n_layer={config.n_layer}")
            target = expected["wte.weight" if name == "lm_head.weight" else name]
            transposed = name.endswith(CONV1D)
            _check_shape(file, key, tensor, target.T if transposed else target)
            state[name] = (tensor.T if transposed else tensor).to(dtype).contiguous()
    head = state.pop("lm_head.weight", None)
    for name in expected:
        if name not in state:
            raise ValueError(f"{files[-1] if len(files) == 1 else directory / INDEX}: key {name!r} is missing")
    if head is not None and not torch.equal(head, state["wte.weight"]):
        raise ValueError(f"{directory}: lm_head.weight differs from wte.weight; only GPT-2's tied head is supported")
    model.load_state_dict(state, assign=True)
    return model.requires_grad_(True).eval()


def save_pretrained(model: GPT2, directory: str | Path) -> Path:
    """Write config.json and model.safetensors in the format of transformers' GPT2LMHeadModel.

    Raises:
        ValueError: the model has LoRA layers that are not merged.
    """
    if any(not layer.merged for _, layer in lora_layers(model)):
        raise ValueError("the model has LoRA layers that are not merged; merge_lora(model) or remove_lora(model) first")
    state = {}
    for name, tensor in model.state_dict().items():
        if "lora_" in name:
            continue
        name = name.replace(".linear.", ".")
        state[f"transformer.{name}"] = (tensor.T if name.endswith(CONV1D) else tensor).contiguous().cpu()
    config = {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "tie_word_embeddings": True,
        # GPT-2 numbers <|endoftext|> last, and so does the nano tokenizer
        "bos_token_id": model.config.vocab_size - 1,
        "eos_token_id": model.config.vocab_size - 1,
        "dtype": str(model.wte.weight.dtype).removeprefix("torch."),
        **asdict(model.config),
    }
    return _write(directory, {WEIGHTS: to_safetensors(state, {"format": "pt"}), CONFIG: _json(config)})


def save_adapter(model: GPT2, directory: str | Path, base: Mapping[str, Any] | None = None) -> Path:
    """Write the LoRA weights (fp32), and beside them their config, the prompt template and a reference to the base.

    Raises:
        ValueError: the model has no LoRA layers.
    """
    config = _lora_config(model)
    weights = to_safetensors(_adapter_state(model))
    description = {
        "lora": asdict(config),
        "base": dict(base or {}),
        "prompt": {"name": PROMPT_TEMPLATE.name, "sha256": PROMPT_TEMPLATE.sha256},
        # ties the two files together: `read_adapter` notices a crash between their renames
        "sha256": hashlib.sha256(weights).hexdigest(),
    }
    return _write(directory, {ADAPTER_WEIGHTS: weights, ADAPTER_CONFIG: _json(description)})


def load_adapter(model: GPT2, directory: str | Path) -> GPT2:
    """Read an adapter into the model, in place, adding LoRA layers where there are none.

    Raises:
        FileNotFoundError: a file of the adapter is missing.
        ValueError: a file is damaged, a key or shape does not fit the model, the adapter was trained with another
            prompt template, or the model has LoRA layers of another config or merged ones. The model is unchanged.
    """
    lora, found = read_adapter(directory, model.config, model.wte.weight.device)
    layers = list(lora_layers(model))
    if not layers:
        add_lora(model, lora)
    elif _lora_config(model) != lora:
        raise ValueError(
            f"the model has LoRA layers of {_lora_config(model)}, but {directory} has {lora}; remove_lora(model) first"
        )
    elif any(layer.merged for _, layer in layers):
        raise ValueError("the model's adapter is merged; unmerge_lora(model) before loading another")
    model.load_state_dict(found, strict=False)
    return model


def read_adapter(
    directory: str | Path, config: GPT2Config, device: str | torch.device = "cpu"
) -> tuple[LoraConfig, dict[str, Tensor]]:
    """An adapter's LoRA config and weights, complete and with the shapes that a model of `config` needs.

    Raises:
        FileNotFoundError, ValueError: as `load_adapter`.
    """
    directory = Path(directory)
    file = directory / ADAPTER_WEIGHTS
    description = _read_json(directory / ADAPTER_CONFIG)
    try:
        lora = LoraConfig(**description["lora"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{directory / ADAPTER_CONFIG}: no valid LoRA config under 'lora': {error}") from None
    _check_prompt(directory / ADAPTER_CONFIG, description.get("prompt"))
    found = _read_tensors(file, device)
    if description.get("sha256") != hashlib.sha256(file.read_bytes()).hexdigest():
        raise ValueError(
            f"{file} is not the file that {ADAPTER_CONFIG} beside it describes (sha256 differs); save the adapter again"
        )
    with torch.device("meta"):
        expected = _adapter_state(add_lora(GPT2(config), lora))
    for key in expected.keys() | found.keys():
        if key not in found or key not in expected:
            problem = "missing" if key in expected else f"not a key of this model with {lora}"
            raise ValueError(f"{file}: key {key!r} is {problem}")
        _check_shape(file, key, found[key], expected[key])
    return lora, found


def export_peft(model: GPT2, directory: str | Path, base: str = "gpt2") -> Path:
    """Write the adapter so that `peft.PeftModel.from_pretrained(hf_gpt2, directory)` computes the same logits.

    PEFT adapts whole layers, so the n pairs of a fused c_attn become one pair of rank n * R whose lora_B is zero
    outside the adapted thirds; alpha grows with the rank, so the scaling stays the same.
    """
    config = _lora_config(model)
    state, ranks, alphas = {}, {}, {}
    for name, layer in lora_layers(model):
        n, rank, width = layer.lora_A.shape
        b = layer.lora_B.new_zeros(layer.n_blocks, layer.lora_B.shape[1], n, rank)  # (blocks, out / blocks, n, R)
        for pair, block in enumerate(layer.blocks):
            b[block, :, pair] = layer.lora_B.data[pair]
        key = f"base_model.model.transformer.{name}"
        state[f"{key}.lora_A.weight"] = layer.lora_A.data.reshape(n * rank, width).cpu().clone()
        state[f"{key}.lora_B.weight"] = b.flatten(2).flatten(0, 1).contiguous().cpu()
        module = ".".join(name.split(".")[2:])  # attn.c_proj and mlp.c_proj are told apart
        ranks[module], alphas[module] = n * rank, n * config.alpha
    description = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "target_modules": sorted(ranks),
        "rank_pattern": ranks,
        "alpha_pattern": alphas,
        "fan_in_fan_out": True,  # Conv1D
        "bias": "none",
        "inference_mode": True,
    }
    weights = to_safetensors(state, {"format": "pt"})
    return _write(directory, {"adapter_model.safetensors": weights, "adapter_config.json": _json(description)})


def read_config(file: Path) -> GPT2Config:
    """GPT2Config from a Hugging Face config.json.

    Raises:
        FileNotFoundError, ValueError: as `load_pretrained`.
    """
    values = _read_json(file)
    supported = {"model_type": "gpt2", "tie_word_embeddings": True, "add_cross_attention": False}
    for key, only in supported.items():
        if values.get(key, only) != only:
            raise ValueError(f"{file}: {key} is {values[key]!r}; only {only!r} is supported")
    known = {field.name for field in fields(GPT2Config)}
    try:
        return GPT2Config(**{key: value for key, value in values.items() if key in known})
    except (TypeError, ValueError) as error:
        raise ValueError(f"{file}: {error}") from None


def directory_sha256(directory: str | Path, files: Iterable[str] | None = None) -> str:
    """sha256 of a directory: of the sorted lines "<sha256>  <relative path>" of its files, as sha256sum prints them."""
    directory = Path(directory)
    names = (
        sorted(files)
        if files is not None
        else sorted(path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file())
    )
    lines = "".join(f"{file_sha256(directory / name)}  {name}\n" for name in names)
    return hashlib.sha256(lines.encode()).hexdigest()


def file_sha256(file: str | Path) -> str:
    """The sha256 of a file, in hexadecimal."""
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def atomic_write(file: Path, content: bytes) -> None:
    """Write the file completely or not at all: a crash leaves the previous content."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with NamedTemporaryFile(dir=file.parent, prefix=f".{file.name}.", delete=False) as stream:
        try:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
            os.chmod(stream.name, 0o644)  # the temporary file's 0600 would lock out other users and containers
            os.replace(stream.name, file)
        except BaseException:
            with suppress(FileNotFoundError):
                os.unlink(stream.name)
            raise


def _write(directory: str | Path, files: Mapping[str, bytes]) -> Path:
    for name, content in files.items():
        atomic_write(Path(directory) / name, content)
    return Path(directory)


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()


def _read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist; is {file.parent} the right directory?")
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{file} contains a JSON {type(value).__name__}, not an object")
    return value


def _weight_files(directory: Path) -> list[Path]:
    if (directory / WEIGHTS).is_file():
        return [directory / WEIGHTS]
    if not (directory / INDEX).is_file():
        found = sorted(path.name for path in directory.iterdir()) if directory.is_dir() else []
        raise FileNotFoundError(
            f"{directory} has neither {WEIGHTS} nor {INDEX} (found: {', '.join(found) or 'nothing'})"
        )
    index = _read_json(directory / INDEX)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise ValueError(f"{directory / INDEX}: 'weight_map' must map keys to file names")
    names = sorted(set(weight_map.values()))
    for name in names:
        if Path(name).name != name:  # a downloaded checkpoint must not reach outside its directory
            raise ValueError(f"{directory / INDEX}: shard {name!r} is not a plain file name")
        if not (directory / name).is_file():
            raise FileNotFoundError(f"{directory / name} does not exist, but {INDEX} names it")
    return [directory / name for name in names]


def _read_tensors(file: Path, device: str | torch.device = "cpu") -> dict[str, Tensor]:
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist; is {file.parent} the right directory?")
    try:
        with safe_open(file, framework="pt", device=str(device)) as tensors:
            # cloned: otherwise the tensors are the mapped file, change with it, and keep all of it in memory
            return {key: tensors.get_tensor(key).clone() for key in tensors.keys()}
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged or truncated ({error}); download or save it again") from None


def _check_prompt(file: Path, prompt: Any) -> None:
    """Refuse an adapter of another prompt template; adapters from before the key was written are accepted."""
    if prompt is None:
        return
    name, sha256 = (prompt.get(key) for key in ("name", "sha256")) if isinstance(prompt, dict) else (prompt, None)
    if sha256 != PROMPT_TEMPLATE.sha256:
        raise ValueError(
            f"{file}: the adapter was trained with prompt template {name!r} (sha256 {str(sha256)[:12]}), but this code "
            f"uses {PROMPT_TEMPLATE.name!r} (sha256 {PROMPT_TEMPLATE.sha256[:12]}); train it again or use its template"
        )


def _check_shape(file: Path, key: str, found: Tensor, expected: Tensor) -> None:
    if found.shape != expected.shape:
        shapes = f"{tuple(found.shape)} in the file, {tuple(expected.shape)} by the config"
        raise ValueError(f"{file}: key {key!r} has a shape that differs from its config: {shapes}")


def _lora_config(model: GPT2) -> LoraConfig:
    layer = next((layer for _, layer in lora_layers(model)), None)
    if layer is None:
        raise ValueError("the model has no LoRA layers; add_lora(model, LoraConfig()) first")
    return layer.config


def _adapter_state(model: GPT2) -> dict[str, Tensor]:
    layers: Iterable[tuple[str, LoraLinear]] = lora_layers(model)
    return {
        f"{name}.{part}": getattr(layer, part).detach().float().contiguous()
        for name, layer in layers
        for part in ("lora_A", "lora_B")
    }
