"""PEFT's adapter_config.json: which modules an adapter changes, with which rank and scaling, by PEFT's rules."""

import re
import reprlib
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from math import inf, prod, sqrt
from pathlib import Path
from sys import float_info
from typing import Any

from gpt2core.files import read_json

PEFT_CONFIG = "adapter_config.json"
MAX_CONFIG = 1_000_000  # maximum size of an adapter's configuration file in bytes
# Keys of adapter_config.json that are translated, or that do not change what a trained adapter computes.
_UNDERSTOOD = {
    *("peft_type", "task_type", "peft_version", "base_model_name_or_path", "revision", "auto_mapping"),
    *("r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "bias"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "fan_in_fan_out"),
    *("init_lora_weights", "inference_mode", "megatron_core", "qalora_group_size"),
    *("runtime_config", "eva_config", "ensure_weight_tying"),
}
_MAX_PATTERN = 1_000  # maximum length of a pattern in characters
_MAX_NAME = 28  # maximum length of a module's name in characters: transformer.h.47.attn.c_attn
_MAX_WAYS = 100_000  # maximum number of ways to match a pattern; trying all of them takes a few milliseconds
MERGE = "merge it into its base by PEFT's merge_and_unload and use the result as the base"  # the way out
# Initializations that do not change the base. Others (pissa, olora, corda, loftq, ...) do.
_INITIALIZATIONS = (True, False, None, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True)
class PeftConfig:
    """A supported adapter_config.json. Modules have PEFT's names, such as "transformer.h.0.mlp.c_fc"."""

    file: Path
    values: Mapping[str, Any]

    @classmethod
    def read(cls, directory: Path) -> "PeftConfig":
        """Read the file of an adapter directory.

        Raises:
            FileNotFoundError, ValueError: the file is missing or damaged, or needs a feature of PEFT that this project
                does not have; the message names it.
        """
        config = cls(directory / PEFT_CONFIG, read_json(directory / PEFT_CONFIG, MAX_CONFIG))
        config._check()
        return config

    @property
    def rslora(self) -> bool:
        return bool(self.values.get("use_rslora"))

    @property
    def dora(self) -> bool:
        return bool(self.values.get("use_dora"))

    def adapts(self, module: str) -> bool:
        """Return whether PEFT adapts the module, by the rules of its `check_target_module_exists`."""
        targets, excluded = self.values.get("target_modules"), self.values.get("exclude_modules")
        if excluded and _matches(module, excluded):
            return False
        if targets is None:
            targets = ["c_attn"]  # PEFT's default for GPT-2
        elif isinstance(targets, str):
            if targets.lower() != "all-linear":
                return _matches(module, targets)
            targets = ["c_attn", "c_proj", "c_fc"]
        layers = self.values.get("layers_to_transform")
        if layers is None or layers == [] or module in targets:  # a full name is adapted in any block
            return _matches(module, targets)
        return _matches(module, targets) and self._block(module) in (layers if isinstance(layers, list) else [layers])

    def scaling(self, module: str, rank: int) -> tuple[float, float]:
        """Return numerator and denominator of a module's scaling. They are separate so that integers stay exact.

        Raises:
            ValueError: `rank`, the rank of its weights, is not that of the configuration, or alpha is not a number.
        """
        r = self._by_module("rank_pattern", module, self.values.get("r"))
        alpha = self._by_module("alpha_pattern", module, self.values.get("lora_alpha"))
        if r != rank or isinstance(r, bool):
            raise ValueError(f"{self.file}: the rank of {module} is {r!r}, but its weights have rank {rank}")
        if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not abs(alpha) <= float_info.max:
            raise ValueError(f"{self.file}: lora_alpha of {module} is {alpha!r}; it must be a finite number")
        return float(alpha), sqrt(rank) if self.rslora else float(rank)

    def _block(self, module: str) -> int | None:
        """Return the index of the module's block. None: PEFT finds none, as in "h.0.attn.c_attn" without a pattern."""
        patterns = self.values.get("layers_pattern") or []
        patterns = [patterns] if isinstance(patterns, str) else patterns
        for pattern in [rf"(?:^|.*?\.){each}" for each in patterns] or [r".*?\.[^.]*"]:
            with suppress(re.error):
                if match := re.match(rf"{pattern}\.(?P<block>\d+)\.", module):
                    return int(match["block"])
        return None

    def _by_module(self, name: str, module: str, default: Any) -> Any:
        """Return the value of the first pattern that matches the end of the module's name, as PEFT does."""
        patterns = self.values.get(name) or {}
        if not isinstance(patterns, dict):
            return default
        for pattern, value in patterns.items():
            if _matches(module, [pattern]) or _matches(module, rf"(.*\.)?({pattern})"):
                return value
        return default

    def _check(self) -> None:
        file, values = self.file, self.values
        if values.get("peft_type") != "LORA":
            raise ValueError(f"{file}: peft_type is {values.get('peft_type')!r}; only 'LORA' is supported")
        if values.get("bias", "none") != "none":
            raise ValueError(f"{file}: bias is {values['bias']!r}; only 'none' is supported; {MERGE}")
        initialization = values.get("init_lora_weights", True)
        if initialization not in _INITIALIZATIONS:
            raise ValueError(
                f"{file}: init_lora_weights is {initialization!r}, which changes the base; export it merged"
            )
        for key, value in values.items():
            if value and key not in _UNDERSTOOD:
                raise ValueError(f"{file}: {key} is {value!r}; this feature of PEFT is not supported; {MERGE}")
        for key in ("target_modules", "exclude_modules", "layers_pattern"):
            value = values.get(key)
            if not (value is None or isinstance(value, str) or (isinstance(value, list) and all(map(_is_text, value)))):
                raise ValueError(f"{file}: {key} is {value!r}; it must be a pattern, a list of names, or null")
            # a string is a pattern; a list has names, except in layers_pattern, where it has patterns
            for pattern in [value] if isinstance(value, str) else (value or ()) if key == "layers_pattern" else ():
                _check_pattern(file, key, pattern)
        for key in ("rank_pattern", "alpha_pattern"):
            value = values.get(key)
            for pattern in value if isinstance(value, dict) else ():
                _check_pattern(file, key, pattern)


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _check_pattern(file: Path, key: str, pattern: str) -> None:
    """Reject a pattern whose matching could take too long: `re` backtracks, and blocks all other threads."""
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


def _matches(name: str, modules: Any) -> bool:
    """Return whether `modules` matches the module: a pattern for its whole name, or a list of names or name endings."""
    if not isinstance(modules, str):
        return any(name == module or name.endswith(f".{module}") for module in modules)
    try:
        return re.fullmatch(modules, name) is not None
    except re.error:
        return False
