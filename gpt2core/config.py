"""Every value of the model, LoRA, training and decoding, with its default: the only place where one is written."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite
from types import MappingProxyType
from typing import Any, Literal, get_args, get_origin, get_type_hints

Precision = Literal["fp32", "bf16-true", "bf16-mixed"]
LossOn = Literal["response", "all"]

PRESETS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "gpt2": {"n_layer": 12, "n_head": 12, "n_embd": 768},
        "gpt2-medium": {"n_layer": 24, "n_head": 16, "n_embd": 1024},
        "gpt2-large": {"n_layer": 36, "n_head": 20, "n_embd": 1280},
        "gpt2-xl": {"n_layer": 48, "n_head": 25, "n_embd": 1600},
        # The embedded default: small enough to be pretrained on two cores in two minutes.
        "gpt2-nano": {"n_layer": 3, "n_head": 4, "n_embd": 128, "n_positions": 128, "vocab_size": 2048},
    }
)
ACTIVATIONS = ("gelu_new", "gelu_pytorch_tanh", "gelu", "relu")
LORA_TARGETS = ("q", "k", "v", "o", "fc", "proj")


@dataclass(frozen=True)
class GPT2Config:
    """The architecture, in the words of Hugging Face's config.json."""

    vocab_size: int = 50257
    n_positions: int = 1024
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    n_inner: int | None = None  # width of the MLP; None: 4 * n_embd
    activation_function: str = "gelu_new"
    layer_norm_epsilon: float = 1e-5
    initializer_range: float = 0.02
    scale_attn_weights: bool = True
    scale_attn_by_inverse_layer_idx: bool = False

    def __post_init__(self) -> None:
        for name in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head"):
            check_field(self, name, getattr(self, name) >= 1, "at least 1")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd={self.n_embd} cannot be divided into n_head={self.n_head} heads of one size")
        check_field(
            self, "activation_function", self.activation_function in ACTIVATIONS, f"one of {', '.join(ACTIVATIONS)}"
        )

    @classmethod
    def preset(cls, name: str) -> "GPT2Config":
        """The published sizes (Radford et al. 2019, table 2) and gpt2-nano."""
        if name not in PRESETS:
            raise ValueError(f"no preset is called {name!r}; there are {', '.join(PRESETS)}")
        return cls(**PRESETS[name])

    @property
    def mlp_width(self) -> int:
        return 4 * self.n_embd if self.n_inner is None else self.n_inner


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adaptation, arXiv:2106.09685."""

    rank: int = 8
    alpha: float = 16.0
    targets: tuple[str, ...] = ("q", "v")  # out of q k v o (attention) and fc proj (MLP)
    dropout: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "targets", tuple(self.targets))
        check_field(self, "rank", self.rank >= 1, "at least 1")
        check_field(self, "alpha", isfinite(self.alpha), "a finite number")
        check_field(self, "dropout", 0 <= self.dropout < 1, "in [0, 1)")
        known = bool(self.targets) and set(self.targets) <= set(LORA_TARGETS)
        check_field(
            self, "targets", known and len(set(self.targets)) == len(self.targets), f"out of {', '.join(LORA_TARGETS)}"
        )

    @property
    def scaling(self) -> float:
        return self.alpha / self.rank  # section 4.1


@dataclass(frozen=True)
class TrainConfig:
    """Finetuning. Lengths are in optimiser steps unless the name says epochs or batches."""

    epochs: int = 12
    max_steps: int | None = None  # ends training earlier than `epochs` would
    batch_size: int = 16  # records a forward pass
    gradient_accumulation_steps: int = 1  # forward passes an optimiser step
    learning_rate: float = 6e-3
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    warmup_steps: int = 10
    decay_fraction: float = 1.0  # share of the steps, at the end, over which the rate falls linearly; 0: constant
    final_lr_ratio: float = 0.0  # where that fall ends, as a share of learning_rate
    max_grad_norm: float | None = 1.0
    precision: Precision = "fp32"
    devices: int = 1  # processes of one machine that share each batch: a GPU each, or some of the cores
    loss_on: LossOn = "response"
    seed: int = 0
    log_every_steps: int = 5
    validate_every_epochs: int = 1
    checkpoint_every_epochs: int = 1
    limit_train_batches: int | None = None  # batches an epoch, for a quick development run
    limit_val_batches: int | None = None

    def __post_init__(self) -> None:
        _check_training(self)
        for name in ("epochs", "devices", "validate_every_epochs", "checkpoint_every_epochs"):
            check_field(self, name, getattr(self, name) >= 1, "at least 1")
        for name in ("max_steps", "limit_train_batches", "limit_val_batches"):
            value = getattr(self, name)
            check_field(self, name, value is None or value >= 1, "at least 1, or null for no limit")
        check_choices(self)


@dataclass(frozen=True)
class PretrainConfig:
    """Pretraining from random weights: Muon for the matrices of the blocks, AdamW for embeddings and vectors."""

    max_steps: int = 1400
    batch_size: int = 8  # sequences of n_positions tokens
    gradient_accumulation_steps: int = 1
    learning_rate: float = 0.03  # Muon's
    adamw_learning_rate: float = 0.01
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.98)
    momentum: float = 0.95
    warmup_steps: int = 40
    decay_fraction: float = 0.6
    final_lr_ratio: float = 0.02
    max_grad_norm: float | None = 1.0
    precision: Precision = "fp32"
    seed: int = 0
    log_every_steps: int = 10
    checkpoint_every_steps: int = 250

    def __post_init__(self) -> None:
        _check_training(self)
        for name in ("max_steps", "checkpoint_every_steps"):
            check_field(self, name, getattr(self, name) >= 1, "at least 1")
        check_choices(self)


@dataclass(frozen=True)
class GenerationConfig:
    """Decoding. temperature 0 is greedy; top_k and top_p of None leave the whole vocabulary."""

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int | None = None  # None: a new one each time
    eos_id: int | None = None  # None: no token ends a reply
    stop: tuple[tuple[int, ...], ...] = ()  # token sequences that end a reply

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop", tuple(tuple(sequence) for sequence in self.stop))
        check_field(self, "max_new_tokens", self.max_new_tokens >= 1, "at least 1")
        check_field(
            self, "temperature", isfinite(self.temperature) and self.temperature >= 0, "a finite number, 0 or more"
        )
        check_field(
            self, "top_k", self.top_k is None or self.top_k >= 1, "at least 1, or null for the whole vocabulary"
        )
        check_field(
            self, "top_p", self.top_p is None or 0 < self.top_p <= 1, "in (0, 1], or null for the whole vocabulary"
        )
        check_field(self, "seed", self.seed is None or 0 <= self.seed < 2**63, "in [0, 2**63), or null for a new one")
        check_field(self, "stop", all(self.stop), "token sequences of at least one token")


def _check_training(config: TrainConfig | PretrainConfig) -> None:
    object.__setattr__(config, "betas", tuple(config.betas))
    for name in ("batch_size", "gradient_accumulation_steps", "log_every_steps"):
        check_field(config, name, getattr(config, name) >= 1, "at least 1")
    check_field(
        config, "learning_rate", isfinite(config.learning_rate) and config.learning_rate > 0, "a number above 0"
    )
    check_field(config, "weight_decay", config.weight_decay >= 0, "0 or more")
    check_field(config, "warmup_steps", config.warmup_steps >= 0, "0 or more")
    for name in ("decay_fraction", "final_lr_ratio"):
        check_field(config, name, 0 <= getattr(config, name) <= 1, "in [0, 1]")
    check_field(
        config, "max_grad_norm", config.max_grad_norm is None or config.max_grad_norm > 0, "above 0, or null for none"
    )


def check_field(config: Any, name: str, holds: bool, rule: str) -> None:
    """Raise ValueError naming the field, its value and the rule unless the condition holds.

    Also for the configuration dataclasses of other packages.
    """
    if not holds:
        raise ValueError(f"{type(config).__name__}.{name} is {getattr(config, name)!r}; it must be {rule}")


def check_choices(config: Any) -> None:
    """Raise ValueError unless every field annotated with a `Literal` holds one of its values."""
    for name, annotation in get_type_hints(type(config)).items():
        if get_origin(annotation) is Literal:
            *others, last = (value if value != "" else "empty" for value in get_args(annotation))
            rule = f"{', '.join(others)} or {last}" if others else str(last)
            check_field(config, name, getattr(config, name) in get_args(annotation), rule)
