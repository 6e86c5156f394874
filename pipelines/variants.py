"""Applies the changes of each variant of a sweep to the parameters, and checks them before anything runs."""

from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass, replace
from itertools import product
from typing import Any

from pipelines.config import DERIVED
from pipelines.errors import ConfigError, check_names
from steps.config import SweepConfig

# Kind of sweep -> the parameters that its trials use and a variant may change
PARAMETERS_OF_KIND = {
    "finetune": ("data", "base", "lora", "train", "generation"),
    "pretrain": ("text", "model", "pretrain"),
    "attention": ("attention",),
}
Parameters = dict[str, Any]  # name -> a dataclass of steps/config.py or gpt2core/config.py


def variants_of(sweep: SweepConfig, given: Parameters) -> dict[str, Parameters]:
    """Return each variant's parameters by its label.

    Args:
        given: the run's parameters for all kinds of sweeps.

    Raises:
        ConfigError: a variant has an unknown key or a value that is not allowed, or a parameter of another kind is set.
    """
    common = {name: given[name] for name in PARAMETERS_OF_KIND[sweep.kind]}
    for name, value in given.items():
        if name not in common and value != type(value)():
            raise ConfigError(f"parameters.{name} has no effect with sweep.kind: {sweep.kind}; remove it")
    if sweep.scale == "full":
        if not sweep.full:
            raise ConfigError("sweep.scale is full, but sweep.full has no parameters")
        defaults = {name: type(value)() for name, value in common.items()}
        common = _merge(defaults, sweep.full, "sweep.full")
    labeled = {**sweep.variants, **dict(_combinations(sweep.grid))}
    variants = {label: _merge(common, changes, f"sweep.variants.{label}") for label, changes in labeled.items()}
    for label, variant in variants.items():
        if sweep.kind == "finetune":
            try:
                variant["base"].check_rank_early(variant["lora"])
                variant["data"].check_patience_early(variant["train"])
            except ValueError as error:
                raise ConfigError(f"sweep.variants.{label}: {error}") from None
    return variants


def _combinations(grid: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield label and changes of each variant of a grid: `lora.rank: [8, 16]` gives "lora.rank 8", "lora.rank 16"."""
    for values in product(*grid.values()) if grid else ():
        changes: dict[str, Any] = {}
        for path, value in zip(grid, values, strict=True):
            *parents, last = path.split(".")
            inner = changes
            for name in parents:
                inner = inner.setdefault(name, {})
                if not isinstance(inner, dict):
                    raise ConfigError(f"sweep.grid: {path} is below another key of the grid, which sets {name}")
            inner[last] = value
        yield ", ".join(f"{path} {value}" for path, value in zip(grid, values, strict=True)), changes


def _merge(parameters: Parameters, changes: Mapping[str, Any], source: str) -> Parameters:
    check_names(changes, list(parameters), "", source)
    return {name: _changed(value, changes.get(name, {}), name, source) for name, value in parameters.items()}


def _changed(config: Any, changes: Any, path: str, source: str) -> Any:
    """Return a copy of the dataclass with the changes, which may be in nested dataclasses."""
    if not isinstance(changes, Mapping):
        raise ConfigError(f"{source}: {path} is {changes!r}; it must be a mapping of keys to values")
    known = {field.name: getattr(config, field.name) for field in fields(config)}
    check_names(changes, list(known), path, source)
    values = {}
    for name, new in changes.items():
        if f"{path}.{name}" in DERIVED:
            raise ConfigError(f"{source}: {path}.{name} is the seed of the trial; set sweep.seeds")
        values[name] = _changed(known[name], new, f"{path}.{name}", source) if is_dataclass(known[name]) else new
    try:
        return replace(config, **values)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{source}: {error}") from None
