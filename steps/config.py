"""Values of the pipeline outside of the mathematics, with their defaults; gpt2core.config has the others."""

import re
from dataclasses import dataclass, field
from ipaddress import IPv4Address
from typing import Literal

from gpt2core.config import PRESETS, PretrainConfig


def _check(config: object, name: str, holds: bool, rule: str) -> None:
    if not holds:
        raise ValueError(f"{type(config).__name__}.{name} is {getattr(config, name)!r}; it must be {rule}")


def _is_ipv4(text: str) -> bool:
    try:
        IPv4Address(text)
    except ValueError:
        return False
    return True


@dataclass(frozen=True)
class DataConfig:
    """Where the records come from, and how they are split."""

    source: Literal["bundled", "url", "file"] = "bundled"
    # The 1,100 records of the older system, which it read from the same place.
    url: str = (
        "https://raw.githubusercontent.com/rasbt/LLMs-from-scratch/main/ch07/01_main-chapter-code/instruction-data.json"
    )
    sha256: str = "7e09a9af353722ca15c18bc580f093f9c39d3178335a75177319cb1e1d163944"  # of the file at `url`
    path: str = ""  # the .json or .jsonl of source: file
    n_facts: int | None = None  # of the bundled world; null: all of it
    order: Literal["seed", "file"] = "seed"  # shuffled before it is split, or as it lies
    val_fraction: float = 0.05
    test_fraction: float = 0.1

    def __post_init__(self) -> None:
        _check(self, "source", self.source in ("bundled", "url", "file"), "bundled, url or file")
        _check(self, "path", bool(self.path) or self.source != "file", "the records' file when source is file")
        _check(self, "sha256", len(self.sha256) == 64 or self.source != "url", "the file's 64 hexadecimal digits")
        _check(self, "order", self.order in ("seed", "file"), "seed or file")
        _check(self, "n_facts", self.n_facts is None or self.n_facts >= 1, "at least 1, or null for the whole world")
        for name in ("val_fraction", "test_fraction"):
            _check(self, name, 0 < getattr(self, name) < 0.5, "between 0 and 0.5")


@dataclass(frozen=True)
class BaseConfig:
    """The base model: pretrained here (nano), the same but untrained (random), or from the hub by name and revision."""

    source: Literal["nano", "random", "hub"] = "nano"
    name: str = "gpt2-nano"  # a preset; for the hub its repository, or a directory
    revision: str = ""  # the hub's commit, 40 hexadecimal digits
    pretrain: PretrainConfig = field(default_factory=PretrainConfig)

    def __post_init__(self) -> None:
        _check(self, "source", self.source in ("nano", "random", "hub"), "nano, random or hub")
        known = self.source == "hub" or self.name in PRESETS
        _check(self, "name", known, f"one of {', '.join(PRESETS)} unless source is hub")


@dataclass(frozen=True)
class EvaluateConfig:
    max_new_tokens: int = 64
    batch_size: int = 16

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "batch_size"):
            _check(self, name, getattr(self, name) >= 1, "at least 1")


@dataclass(frozen=True)
class PromoteConfig:
    """The gate: tuned must beat base on `metric` by more than `margin`."""

    stage: Literal["staging", "production"] = "staging"
    metric: Literal["exact_match", "token_f1", "rouge_l"] = "exact_match"
    margin: float = 0.0

    def __post_init__(self) -> None:
        _check(self, "stage", self.stage in ("staging", "production"), "staging or production")
        _check(
            self, "metric", self.metric in ("exact_match", "token_f1", "rouge_l"), "exact_match, token_f1 or rouge_l"
        )


@dataclass(frozen=True)
class PackageConfig:
    smoke_prompts: int = 3  # test records that the Bento is asked before it counts as built

    def __post_init__(self) -> None:
        _check(self, "smoke_prompts", self.smoke_prompts >= 1, "at least 1")


@dataclass(frozen=True)
class DeployConfig:
    """Where the Bento answers users: nowhere yet, or in a container of this machine's engine."""

    target: Literal["none", "docker"] = "none"
    host: str = "127.0.0.1"  # of docker: the address that is listened on; 0.0.0.0 lets other machines ask
    port: int = 3000  # of docker, and the deployment's name; as `make serve` and all examples have it
    memory: str = "2g"  # of docker: more ends the container; gpt2-nano takes 340 MB

    def __post_init__(self) -> None:
        _check(self, "target", self.target in ("none", "docker"), "none or docker")
        _check(self, "host", _is_ipv4(self.host), "an IPv4 address of this machine, or 0.0.0.0 for all of them")
        _check(self, "port", 1 <= self.port <= 65535, "from 1 to 65535")
        _check(self, "memory", re.fullmatch(r"[1-9]\d*[mg]", self.memory) is not None, "a number with m or g, like 2g")


@dataclass(frozen=True)
class TrackingConfig:
    wandb: Literal["off", "offline", "online"] = "off"
    project: str = "gpt2-instruct"

    def __post_init__(self) -> None:
        # YAML reads a bare off as false
        object.__setattr__(self, "wandb", {False: "off"}.get(self.wandb, self.wandb))  # type: ignore[call-overload]
        _check(self, "wandb", self.wandb in ("off", "offline", "online"), "off, offline or online")
