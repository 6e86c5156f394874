"""Values of the pipeline outside of the mathematics, with their defaults; gpt2core.config has the others."""

from dataclasses import dataclass, field
from typing import Literal

from gpt2core.config import PRESETS, PretrainConfig, check_choices, check_field


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
        check_choices(self)
        check_field(self, "path", bool(self.path) or self.source != "file", "the records' file when source is file")
        check_field(self, "sha256", len(self.sha256) == 64 or self.source != "url", "the file's 64 hexadecimal digits")
        check_field(
            self, "n_facts", self.n_facts is None or self.n_facts >= 1, "at least 1, or null for the whole world"
        )
        for name in ("val_fraction", "test_fraction"):
            check_field(self, name, 0 < getattr(self, name) < 0.5, "between 0 and 0.5")


@dataclass(frozen=True)
class BaseConfig:
    """The base model: pretrained here (nano), the same but untrained (random), or from the hub by name and revision."""

    source: Literal["nano", "random", "hub"] = "nano"
    name: str = "gpt2-nano"  # a preset; for the hub its repository, or a directory
    revision: str = ""  # the hub's commit, 40 hexadecimal digits
    pretrain: PretrainConfig = field(default_factory=PretrainConfig)

    def __post_init__(self) -> None:
        check_choices(self)
        known = self.source == "hub" or self.name in PRESETS
        check_field(self, "name", known, f"one of {', '.join(PRESETS)} unless source is hub")


@dataclass(frozen=True)
class EvaluateConfig:
    max_new_tokens: int = 64
    batch_size: int = 16

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "batch_size"):
            check_field(self, name, getattr(self, name) >= 1, "at least 1")


@dataclass(frozen=True)
class PromoteConfig:
    """The gate: tuned must beat base on `metric` by more than `margin`."""

    stage: Literal["staging", "production"] = "staging"
    metric: Literal["exact_match", "token_f1", "rouge_l"] = "exact_match"
    margin: float = 0.0

    def __post_init__(self) -> None:
        check_choices(self)


@dataclass(frozen=True)
class PackageConfig:
    smoke_prompts: int = 3  # test records that the Bento is asked before it counts as built

    def __post_init__(self) -> None:
        check_field(self, "smoke_prompts", self.smoke_prompts >= 1, "at least 1")


@dataclass(frozen=True)
class TrackingConfig:
    wandb: Literal["off", "offline", "online"] = "off"
    project: str = "gpt2-instruct"

    def __post_init__(self) -> None:
        # YAML reads a bare off as false
        object.__setattr__(self, "wandb", {False: "off"}.get(self.wandb, self.wandb))  # type: ignore[call-overload]
        check_choices(self)
