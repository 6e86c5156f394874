"""GPT-2 checkpoints in Hugging Face's format. Also re-exports the public functions for adapters.

Only safetensors and JSON are read and written, so loading a file cannot execute code.
"""

import re
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save as to_safetensors
from torch import Tensor

from gpt2core.adapter_files import ADAPTER_CONFIG, load_adapter, save_adapter
from gpt2core.config import GPT2Config
from gpt2core.files import (
    INDEX,
    WEIGHTS,
    directory_hint,
    json_bytes,
    read_json,
    read_text,
    shard_files,
    write_files,
)
from gpt2core.lora import lora_layers
from gpt2core.model import GPT2
from gpt2core.peft_config import PEFT_CONFIG
from gpt2core.peft_format import export_peft
from gpt2core.tensors import WEIGHT_TYPES, check_weight, is_finite, read_tensors
from gpt2core.tokenizer import END_OF_TEXT, read_token_ids

__all__ = ["CONFIG", "export_peft", "load_adapter", "load_pretrained", "read_config", "save_adapter", "save_pretrained"]

CONV1D = ("c_attn.weight", "c_proj.weight", "c_fc.weight")  # Hugging Face's GPT-2 stores these as (in, out)
MASKS = (".attn.bias", ".attn.masked_bias")  # constant causal masks of old checkpoints
BINARIES = (".bin", ".pt", ".pth", ".ckpt")
CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
POST_NORM = "gpt2-post-norm"
_WAYS_OUT = {  # key of config.json with an unsupported value -> the way out
    "tie_word_embeddings": ": the head is the embedding; if lm_head equals wte in the weights, set it to true",
    "quantization_config": ": save the model in 16 or 32 bits",
}
_WRAPPERS = {  # prefix of all keys -> where it comes from, and the way out
    "_orig_mod.": "as a model compiled by torch.compile has it: save the model in it (model._orig_mod), or remove it",
    "module.": "as a model wrapped by DataParallel has it: save the model in it (model.module), or remove it",
    "base_model.model.": "as a model of PEFT has it: save the result of merge_and_unload",
}
# fields of GPT2Config that do not describe the architecture
_NOT_ARCHITECTURE = ("bos_token_id", "eos_token_id", "n_tokens", "generation_config", "norm_position", "layer_init")
# other names that transformers reads: GPT2Config.attribute_map
_ALIASES = {
    "hidden_size": "n_embd",
    "max_position_embeddings": "n_positions",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
}


class _Stored(NamedTuple):
    file: Path
    key: str  # name of the tensor in the file
    tensor: Tensor


def load_pretrained(
    directory: str | Path,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    mapped: bool = False,
) -> GPT2:
    """Read a Hugging Face GPT-2 checkpoint (one file or sharded). The model is in eval mode.

    The model's config keeps the ids of special tokens and the text of generation_config.json, without ids outside the
    vocabulary; `save_pretrained` writes them back. Training ends every answer with the tokenizer's end of text, so it
    is added to the ids that end a completion. If the tokenizer in the directory has fewer ids than the embedding has
    rows, `config.n_tokens` is the number of its ids: the further rows are padding and must not be sampled.

    Args:
        mapped: map weights that are stored in `dtype` instead of reading them (only on a CPU). They take no memory of
            the process. Use it for a model that is copied into an engine at once: it is slower, must not be trained,
            and changes if the files change.

    Raises:
        FileNotFoundError: config.json or the safetensors files are missing.
        ValueError: a file is damaged, a key is missing or unknown, a shape differs, a weight is not finite, the
            tokenizer has more ids than the embedding has rows, or the config needs a feature that this GPT-2 does not
            have; the message names file, key and both values.
    """
    if dtype not in WEIGHT_TYPES:
        raise ValueError(f"dtype is {dtype!r}; it must be {', '.join(map(str, WEIGHT_TYPES))}")
    directory = Path(directory)
    config = read_config(directory / CONFIG)
    stored = _read_weights(directory, device)
    last = directory / (INDEX if (directory / INDEX).is_file() and not (directory / WEIGHTS).is_file() else WEIGHTS)
    _check_sizes(directory / CONFIG, config, stored)
    with torch.device("meta"):  # skip drawing random weights that are overwritten below
        model = GPT2(config)
    state = _convert_(stored, model, dtype, mapped)
    head = state.pop("lm_head.weight", None)
    for name in model.state_dict():
        if name not in state:
            raise ValueError(f"{last}: key {name!r} is missing")
    if head is not None and not torch.equal(head, state["wte.weight"]):
        raise ValueError(f"{directory}: lm_head.weight differs from wte.weight; only GPT-2's tied head is supported")
    model.load_state_dict(state, assign=True)
    return model.requires_grad_(True).eval()


def _convert_(stored: dict[str, _Stored], model: GPT2, dtype: torch.dtype, mapped: bool) -> dict[str, Tensor]:
    """Check the tensors of a checkpoint and convert them for the model, which has no weights yet; return them by name.

    Empties `stored`, so that only one tensor exists twice in memory.
    """
    state, expected = {}, model.state_dict()
    for name in list(stored):
        file, key, tensor = stored.pop(name)
        target = expected.get("wte.weight" if name == "lm_head.weight" else name)
        if target is None:
            other = _of_another_head(name)
            raise ValueError(f"{file}: key {key!r} is not a key of GPT-2 with n_layer={model.config.n_layer}{other}")
        transposed = name.endswith(CONV1D)
        _check_shape(file, key, tensor, target.T if transposed else target)
        check_weight(file, key, tensor)
        tensor = tensor.T if transposed else tensor
        if mapped:
            state[name] = tensor.to(dtype)
        else:
            state[name] = tensor.to(dtype, copy=True, memory_format=torch.contiguous_format)
        if tensor.dtype != dtype and not is_finite(state[name]):
            raise ValueError(f"{file}: tensor {key!r} has values beyond the range of {dtype}; use another dtype")
    return state


def save_pretrained(model: GPT2, directory: str | Path, dtype: torch.dtype | None = None) -> Path:
    """Write config.json and model.safetensors for transformers, and generation_config.json if the model has its text.

    A model with norm_position "post" gets another model_type, which only this project can read. With
    "gpt2", transformers would load it and silently compute other logits.

    Args:
        dtype: type of the weights in the file; None: the model's.

    Raises:
        ValueError: the model has LoRA layers that are not merged, or weights that are not finite or beyond the range
            of `dtype`.
    """
    if any(not layer.merged for _, layer in lora_layers(model)):
        raise ValueError("the model has LoRA layers that are not merged; merge_lora(model) or remove_lora(model) first")
    state = {}
    for name, tensor in model.state_dict().items():
        if "lora_" in name:
            continue
        name = name.replace(".linear.", ".")
        check_weight("the model", name, tensor)
        tensor = tensor.to(dtype or tensor.dtype)
        if dtype is not None and not is_finite(tensor):
            raise ValueError(f"the model: tensor {name!r} has values beyond the range of {dtype}; use another dtype")
        state[f"transformer.{name}"] = (tensor.T if name.endswith(CONV1D) else tensor).contiguous().cpu()
    config = model.config
    description = {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2" if config.norm_position == "pre" else POST_NORM,
        "tie_word_embeddings": True,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id,
        "dtype": str(dtype or model.wte.weight.dtype).removeprefix("torch."),
        **{key: value for key, value in asdict(config).items() if key not in _NOT_ARCHITECTURE},
    }
    if config.n_tokens is not None:
        description["n_tokens"] = config.n_tokens
    files = {WEIGHTS: to_safetensors(state, {"format": "pt"}), CONFIG: json_bytes(description)}
    if config.generation_config is not None:
        files[GENERATION_CONFIG] = config.generation_config.encode()
    return write_files(directory, files)


def read_config(file: Path) -> GPT2Config:
    """Read a GPT2Config from Hugging Face's config.json, and the generation_config.json and tokenizer in its directory.

    Raises:
        FileNotFoundError, ValueError: as `load_pretrained`.
    """
    if not file.is_file() and (file.parent / "hparams.json").is_file():
        raise FileNotFoundError(
            f"{file.parent} is in OpenAI's TensorFlow format (hparams.json), which is not read; use the same model of "
            "the Hugging Face Hub, for example openai-community/gpt2-medium for 355M"
        )
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist; {config_hint(file.parent)}")
    values = read_json(file)
    norm_position = "post" if values.get("model_type") == POST_NORM else "pre"
    model_type = POST_NORM if norm_position == "post" else "gpt2"
    supported = {
        "model_type": model_type,
        "tie_word_embeddings": True,
        "add_cross_attention": False,
        "quantization_config": None,
    }
    for key, only in supported.items():
        if values.get(key, only) != only:
            raise ValueError(f"{file}: {key} is {values[key]!r}; only {only!r} is supported{_WAYS_OUT.get(key, '')}")
    for alias, name in _ALIASES.items():
        if alias in values and values.setdefault(name, values[alias]) != values[alias]:
            raise ValueError(
                f"{file}: {alias} is {values[alias]!r}, but {name} is {values[name]!r}; remove one of them"
            )
    known = {field.name for field in fields(GPT2Config)} - {"generation_config"}
    described: dict[str, Any] = {key: value for key, value in values.items() if key in known}
    described["norm_position"] = norm_position
    token_ids, n_rows = read_token_ids(file.parent), values.get("vocab_size", GPT2Config.vocab_size)
    if token_ids is not None and isinstance(n_rows, int):
        n_tokens = max(token_ids.values()) + 1
        if n_tokens > n_rows:
            raise ValueError(f"{file}: vocab_size is {n_rows}, but the tokenizer in its directory has {n_tokens} ids")
        described["n_tokens"] = n_tokens if n_tokens < n_rows else None
    try:
        config = GPT2Config(**described)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
    return _with_special_ids(config, (token_ids or {}).get(END_OF_TEXT), file.parent / GENERATION_CONFIG)


def config_hint(directory: Path) -> str:
    """Return the way out for a directory of a base without config.json."""
    if any((directory / name).is_file() for name in (ADAPTER_CONFIG, PEFT_CONFIG)):
        return "it has an adapter, not a model: merge it into its base, in PEFT by merge_and_unload and save_pretrained"
    return directory_hint(directory, CONFIG)


def _with_special_ids(config: GPT2Config, end: int | None, generation_config: Path) -> GPT2Config:
    """Add the text of generation_config.json, if it exists, to the config. Remove ids outside the vocabulary from both.

    Args:
        end: the tokenizer's end of text; it is added to the ids that end a completion. None: not known.
    """
    n_tokens = config.token_count
    begin, ends = _known_ids(config.bos_token_id, n_tokens), _known_ids(config.eos_token_id, n_tokens, end)
    config = replace(config, bos_token_id=end if begin is None else begin, eos_token_id=ends)
    if not generation_config.is_file():
        return config
    values, text = read_json(generation_config), read_text(generation_config)
    ids: dict[str, Any] = {
        key: _known_ids(values[key], n_tokens) for key in ("bos_token_id", "pad_token_id") if key in values
    }
    ids["eos_token_id"] = _known_ids(values.get("eos_token_id"), n_tokens, end)
    if any(values.get(key) != value for key, value in ids.items()):
        text = json_bytes(values | ids).decode()
    return replace(config, generation_config=text)


def _known_ids(value: Any, n_tokens: int, end: int | None = None) -> Any:
    """Return the id or ids below `n_tokens`, and `end` if it is not None; None if there are none."""
    listed = list(value) if isinstance(value, list | tuple) else [value]
    ids = [id for id in listed if type(id) is int and 0 <= id < n_tokens]
    if end is not None and end not in ids:
        ids.insert(0, end)
    if ids == listed:
        return value
    return ids if len(ids) > 1 else next(iter(ids), None)


def _read_weights(directory: Path, device: str | torch.device) -> dict[str, _Stored]:
    """Read all tensors, by this project's names, without masks. A tied checkpoint may contain only the head."""
    stored = {}
    for file in _weight_files(directory):
        for key, tensor in read_tensors(file, device, mapped=True).items():
            name = key.removeprefix("transformer.")
            if not name.endswith(MASKS):
                stored[name] = _Stored(file, key, tensor)
    if "wte.weight" not in stored and "lm_head.weight" in stored:
        stored["wte.weight"] = stored.pop("lm_head.weight")
    return stored


def _weight_files(directory: Path) -> list[Path]:
    if (directory / WEIGHTS).is_file():
        return [directory / WEIGHTS]
    if not (directory / INDEX).is_file():
        present = sorted(path.name for path in directory.iterdir()) if directory.is_dir() else []
        binary = next((name for name in present if name.endswith(BINARIES)), None)
        convert = "convert it: load it with transformers and call save_pretrained(directory)"
        hint = f"; {binary} can run any code and is not read; {convert}" if binary else ""
        raise FileNotFoundError(
            f"{directory} has neither {WEIGHTS} nor {INDEX} (found: {', '.join(present) or 'nothing'}){hint}"
        )
    names = shard_files(directory)
    for name in names:
        if not (directory / name).is_file():
            raise FileNotFoundError(f"{directory / name} does not exist, but {INDEX} names it")
    return [directory / name for name in names]


def _check_sizes(file: Path, config: GPT2Config, stored: dict[str, _Stored]) -> None:
    """Reject a config larger than the stored weights, before a model of that size is allocated."""
    n_layers = len({name.split(".")[1] for name in stored if name.startswith("h.")})
    if n_layers == 0 and stored:
        key = min(stored)
        raise ValueError(
            f"{stored[key].file}: no key begins with 'h.' or 'transformer.h.', as GPT-2's do; one is {key!r}"
            f"{_of_a_wrapper(key)}"
        )
    if config.n_layer > n_layers:
        raise ValueError(f"{file}: n_layer is {config.n_layer}, but the weights have {n_layers} layers")
    largest = max((size for _, _, tensor in stored.values() for size in tensor.shape), default=0)
    for name in ("vocab_size", "n_positions", "n_embd", "mlp_width"):
        if getattr(config, name) > largest:
            raise ValueError(
                f"{file}: {name} is {getattr(config, name)}, but no stored weight is larger than {largest}"
            )


def _of_a_wrapper(key: str) -> str:
    """Return what has put a prefix before the key, and the way out; "" if there is no known key after a prefix."""
    match = re.fullmatch(r"(.+?\.)(?:transformer\.)?(?:h\.\d+\.|wte\.|wpe\.|ln_f\.).*", key)
    if match is None:
        return ""
    prefix = match[1].removesuffix("transformer.")
    way_out = next((text for start, text in _WRAPPERS.items() if prefix.startswith(start)), "remove it from the keys")
    return f", with the prefix {prefix!r}: {way_out}"


def _of_another_head(name: str) -> str:
    if name.startswith("h."):
        return ""
    return (
        "; if it belongs to another head, load the directory with transformers' AutoModelForCausalLM and write it to a "
        "new one with save_pretrained, which leaves this head out"
    )


def _check_shape(file: Path, key: str, found: Tensor, expected: Tensor) -> None:
    if found.shape != expected.shape:
        shapes = f"{tuple(found.shape)} in the file, {tuple(expected.shape)} by the config"
        raise ValueError(f"{file}: key {key!r} has a shape that differs from its config: {shapes}")
