"""Configuration of model, LoRA, training and decoding. Every default is written here and nowhere else."""

from collections.abc import Mapping
from copy import copy
from dataclasses import dataclass
from math import isfinite, sqrt
from numbers import Integral, Real
from types import MappingProxyType, NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

Precision = Literal["fp32", "bf16-true", "bf16-mixed"]
LossOn = Literal["response", "all"]
TooLong = Literal["error", "drop", "truncate"]  # what happens to records longer than the context
Activation = Literal["gelu_new", "gelu_pytorch_tanh", "gelu", "relu"]
LoraTarget = Literal["q", "k", "v", "o", "fc", "proj"]
Schedule = Literal["linear", "cosine", "constant"]
WeightFormat = Literal["fp32", "bf16", "int8"]  # formats of the engine's weights
Weights = Literal["auto", WeightFormat]  # auto: the fastest format on this machine

LORA_TARGETS: tuple[LoraTarget, ...] = get_args(LoraTarget)
PRESETS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "gpt2": {"n_layer": 12, "n_head": 12, "n_embd": 768},
        "gpt2-medium": {"n_layer": 24, "n_head": 16, "n_embd": 1024},
        "gpt2-large": {"n_layer": 36, "n_head": 20, "n_embd": 1280},
        "gpt2-xl": {"n_layer": 48, "n_head": 25, "n_embd": 1600},
        # the default: small enough to be pretrained on two cores in two minutes
        "gpt2-nano": {"n_layer": 3, "n_head": 4, "n_embd": 128, "n_positions": 128, "vocab_size": 2048},
    }
)


@dataclass(frozen=True)
class GPT2Config:
    """The model's architecture, with the field names of Hugging Face's config.json."""

    vocab_size: int = 50257
    n_positions: int = 1024
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    n_inner: int | None = None  # width of the MLP; None: 4 * n_embd
    activation_function: Activation = "gelu_new"
    layer_norm_epsilon: float = 1e-5
    initializer_range: float = 0.02
    scale_attn_weights: bool = True
    scale_attn_by_inverse_layer_idx: bool = False
    # post: LN(x + f(x)) (arXiv:1706.03762); for experiments only: the engine and transformers support only "pre"
    norm_position: Literal["pre", "post"] = "pre"
    layer_init: Literal["fresh", "clone"] = "fresh"  # clone: all blocks start as copies of the first block
    bos_token_id: int | None = None  # kept for other programs; None: not known
    eos_token_id: int | tuple[int, ...] | None = None  # kept for other programs; None: not known
    n_tokens: int | None = None  # number of the tokenizer's ids; None: vocab_size. Embedding rows beyond it are padding
    generation_config: str | None = None  # text of generation_config.json, kept for other programs

    def __post_init__(self) -> None:
        lists_to_tuples(self, "eos_token_id")
        check_types(self)
        for name in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head"):
            check_field(self, name, getattr(self, name) >= 1, "at least 1")
        check_field(self, "n_inner", self.n_inner is None or self.n_inner >= 1, "at least 1, or null for 4 * n_embd")
        tokens = self.n_tokens is None or 1 <= self.n_tokens <= self.vocab_size
        check_field(self, "n_tokens", tokens, f"from 1 to vocab_size={self.vocab_size}, or null for all of them")
        for name in ("layer_norm_epsilon", "initializer_range"):
            check_field(self, name, getattr(self, name) >= 0, "0 or more")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd={self.n_embd} is not divisible by n_head={self.n_head}")

    @classmethod
    def preset(cls, name: str) -> "GPT2Config":
        """Return the config of a published size (Radford et al. 2019, table 2) or of gpt2-nano."""
        if name not in PRESETS:
            raise ValueError(f"unknown preset {name!r}; choose from {', '.join(PRESETS)}")
        return cls(**PRESETS[name])

    @property
    def token_count(self) -> int:
        """Number of valid token ids, 0 to token_count - 1. Embedding rows beyond it are padding and never sampled."""
        return self.vocab_size if self.n_tokens is None else self.n_tokens

    @property
    def head_width(self) -> int:
        return self.n_embd // self.n_head

    @property
    def mlp_width(self) -> int:
        return 4 * self.n_embd if self.n_inner is None else self.n_inner


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adaptation, arXiv:2106.09685, and variants of it."""

    rank: int = 8
    alpha: float | None = 16.0  # null: the constructor sets it to 2 * rank
    targets: tuple[LoraTarget, ...] = ("q", "v")  # q k v o: attention; fc proj: MLP
    dropout: float = 0.0
    rslora: bool = False  # scale by alpha / sqrt(rank), arXiv:2312.03732
    dora: bool = False  # train the length of each row of the weight separately, arXiv:2402.09353
    b_lr_ratio: float = 1.0  # LoRA+ (arXiv:2402.12354): learning rate of lora_B / learning rate of lora_A

    def __post_init__(self) -> None:
        lists_to_tuples(self, "targets")
        check_types(self)
        check_field(self, "rank", self.rank >= 1, "at least 1")
        if self.alpha is None:
            object.__setattr__(self, "alpha", 2.0 * self.rank)
        check_field(self, "alpha", self.alpha != 0, "non-zero (0 disables the adapter)")
        check_field(self, "b_lr_ratio", self.b_lr_ratio > 0, "above 0")
        check_field(self, "dropout", 0 <= self.dropout < 1, "in [0, 1)")
        distinct = bool(self.targets) and len(set(self.targets)) == len(self.targets)
        check_field(self, "targets", distinct, f"at least one of {', '.join(LORA_TARGETS)}, each at most once")

    @property
    def scaling(self) -> float:
        assert self.alpha is not None
        return self.alpha / (sqrt(self.rank) if self.rslora else self.rank)  # section 4.1


@dataclass(frozen=True)
class TrainConfig:
    """Finetuning. Lengths are in optimizer steps unless the name or the comment says otherwise."""

    epochs: int = 12
    max_steps: int | None = None  # training ends after this many steps, even if `epochs` are not complete
    batch_size: int = 16  # records per forward pass
    gradient_accumulation_steps: int = 1  # forward passes per optimizer step
    learning_rate: float = 6e-3
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    warmup_steps: int = 10
    schedule: Schedule = "linear"  # how the learning rate decays after the warm-up
    decay_fraction: float = 1.0  # share of all steps, at the end, during which the learning rate decays
    final_lr_ratio: float = 0.0  # learning rate after the decay, as a fraction of learning_rate
    max_grad_norm: float | None = 1.0
    precision: Precision = "fp32"
    devices: int = 1  # processes on one machine that split each batch; each has one GPU or a share of the cores
    loss_on: LossOn = "response"
    seed: int = 0
    log_every_steps: int = 5
    validate_every_epochs: int = 1
    checkpoint_every_epochs: int = 1
    limit_train_batches: int | None = None  # batches per epoch, for a quick development run
    limit_val_batches: int | None = None  # batches per validation
    patience: int | None = None  # stop after this many validations in a row without a new best loss; null: never
    gradient_checkpointing: bool = False  # recompute each block's activations in the backward pass: slower, less memory
    deterministic: bool = False  # a nondeterministic kernel raises an error

    def __post_init__(self) -> None:
        _check_training(self)
        for name in ("epochs", "devices", "validate_every_epochs", "checkpoint_every_epochs"):
            check_field(self, name, getattr(self, name) >= 1, "at least 1")
        for name in ("max_steps", "limit_train_batches", "limit_val_batches", "patience"):
            value = getattr(self, name)
            check_field(self, name, value is None or value >= 1, "at least 1, or null for no limit")


@dataclass(frozen=True)
class PretrainConfig:
    """Pretraining from random weights: Muon for the matrices of the blocks, AdamW for embeddings and vectors."""

    max_steps: int = 1400
    optimizer: Literal["muon", "adamw"] = "muon"  # adamw: AdamW for the matrices too, at adamw_learning_rate
    batch_size: int = 8  # sequences of n_positions tokens
    gradient_accumulation_steps: int = 1
    learning_rate: float = 0.03  # learning rate of Muon
    adamw_learning_rate: float = 0.01
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.98)
    momentum: float = 0.95
    warmup_steps: int = 40
    schedule: Schedule = "linear"
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
        check_field(self, "adamw_learning_rate", self.adamw_learning_rate > 0, "above 0")
        check_field(self, "momentum", 0 <= self.momentum < 1, "in [0, 1)")


@dataclass(frozen=True)
class AttentionConfig:
    """An attention layer whose memory and time are measured, by an implementation in `gpt2core.trials.ATTENTION`."""

    attention: Literal["loop", "fused", "sdpa"] = "sdpa"
    length: int = 1024  # tokens
    batch_size: int = 4
    n_head: int = 12
    n_embd: int = 768

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("length", "batch_size", "n_head", "n_embd"):
            check_field(self, name, getattr(self, name) >= 1, "at least 1")
        check_field(self, "n_embd", self.n_embd % self.n_head == 0, f"divisible by n_head={self.n_head}")


@dataclass(frozen=True)
class GenerationConfig:
    """Decoding. Temperature 0 is greedy decoding; null for top_k and top_p keeps the whole vocabulary."""

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int | None = None  # null: a new seed for each request
    eos_id: int | None = None  # null: no token ends a completion
    stop: tuple[tuple[int, ...], ...] = ()  # token sequences that end a completion
    min_p: float | None = None  # excludes tokens below this fraction of the highest probability
    repetition_penalty: float = 1.0  # divides (if positive) or multiplies logits of tokens in prompt or completion
    presence_penalty: float = 0.0  # subtracted from the logits of tokens in the completion
    frequency_penalty: float = 0.0  # subtracted once per occurrence of the token in the completion
    logit_bias: tuple[tuple[int, float], ...] = ()  # (token id, value added to its logit); also accepts a mapping
    stop_token_ids: tuple[int, ...] = ()  # further tokens that end a completion
    ignore_eos: bool = False  # eos_id does not end a completion
    min_tokens: int = 0  # with fewer tokens, only the end of the context ends a completion

    def __post_init__(self) -> None:
        if isinstance(self.logit_bias, Mapping):
            object.__setattr__(self, "logit_bias", tuple(self.logit_bias.items()))
        lists_to_tuples(self, "stop", "logit_bias", "stop_token_ids")
        check_types(self)
        check_field(self, "max_new_tokens", self.max_new_tokens >= 1, "at least 1")
        check_field(self, "temperature", self.temperature >= 0, "0 or more")
        check_field(
            self, "top_k", self.top_k is None or self.top_k >= 1, "at least 1, or null for the whole vocabulary"
        )
        check_field(
            self, "top_p", self.top_p is None or 0 < self.top_p <= 1, "in (0, 1], or null for the whole vocabulary"
        )
        check_field(self, "seed", self.seed is None or _is_seed(self.seed), "in [0, 2**63), or null for a new one")
        check_field(self, "stop", all(self.stop), "token sequences of at least one token")
        check_field(self, "min_p", self.min_p is None or 0 <= self.min_p <= 1, "in [0, 1], or null for no limit")
        check_field(self, "repetition_penalty", 0.1 <= self.repetition_penalty <= 10, "in [0.1, 10]")
        for name in ("presence_penalty", "frequency_penalty"):
            check_field(self, name, -2 <= getattr(self, name) <= 2, "in [-2, 2]")
        biases = dict(self.logit_bias)
        check_field(self, "logit_bias", len(biases) == len(self.logit_bias), "a list with each token id once")
        check_field(self, "logit_bias", all(-100 <= bias <= 100 for bias in biases.values()), "biases in [-100, 100]")
        in_limit = 0 <= self.min_tokens <= self.max_new_tokens
        check_field(self, "min_tokens", in_limit, "0 or more, and at most max_new_tokens")

    def with_seed(self, seed: int) -> "GenerationConfig":
        """Return a copy with another seed. The other fields are not checked again: a logit_bias can be large."""
        other = copy(self)
        object.__setattr__(other, "seed", seed)
        check_field(other, "seed", _is_seed(seed), "in [0, 2**63)")
        return other


def _check_training(config: TrainConfig | PretrainConfig) -> None:
    lists_to_tuples(config, "betas")
    check_types(config)
    object.__setattr__(config, "betas", tuple(map(float, config.betas)))  # torch rejects a pair of an int and a float
    for name in ("batch_size", "gradient_accumulation_steps", "log_every_steps"):
        check_field(config, name, getattr(config, name) >= 1, "at least 1")
    check_field(config, "learning_rate", config.learning_rate > 0, "above 0")
    check_field(config, "weight_decay", config.weight_decay >= 0, "0 or more")
    check_field(config, "betas", all(0 <= beta < 1 for beta in config.betas), "two numbers in [0, 1)")
    check_field(config, "warmup_steps", config.warmup_steps >= 0, "0 or more")
    for name in ("decay_fraction", "final_lr_ratio"):
        check_field(config, name, 0 <= getattr(config, name) <= 1, "in [0, 1]")
    check_field(
        config, "max_grad_norm", config.max_grad_norm is None or config.max_grad_norm > 0, "above 0, or null for none"
    )
    check_field(config, "seed", _is_seed(config.seed), "in [0, 2**63)")


def _is_seed(value: int) -> bool:
    return 0 <= value < 2**63


def lists_to_tuples(config: Any, *names: str) -> None:
    """Convert the lists in these fields of a frozen dataclass, from YAML or JSON, to tuples. Types are not checked."""
    for name in names:
        object.__setattr__(config, name, _as_tuple(getattr(config, name)))


def _as_tuple(value: Any) -> Any:
    return tuple(map(_as_tuple, value)) if isinstance(value, list | tuple) else value


def check_field(config: Any, name: str, holds: bool, rule: str) -> None:
    """Raise ValueError with the field, its value and the rule, unless the condition holds.

    Other packages use it for their configuration dataclasses too.
    """
    if not holds:
        value = repr(getattr(config, name))
        shown = value if len(value) <= 100 else f"{value[:97]}..."
        raise ValueError(f"{type(config).__name__}.{name} is {shown}; it must be {rule}")


def check_types(config: object) -> None:
    """Raise ValueError unless every field holds a value of its annotated type, with `Literal` one of its values.

    A bool is not accepted as an int. An int is accepted as a float. Floats must be finite, and ints must fit into
    64 bits. NumPy numbers are converted to Python's.
    """
    for name, annotation in get_type_hints(type(config)).items():
        object.__setattr__(config, name, _python_number(getattr(config, name)))
        check_field(config, name, _matches(annotation, getattr(config, name)), _rule(annotation))


def _python_number(value: Any) -> Any:
    """Convert a number of numpy, also inside a tuple, to int or float; return any other value unchanged."""
    if isinstance(value, tuple):
        return tuple(map(_python_number, value))
    if isinstance(value, Integral) and not isinstance(value, int):
        return int(value)
    return float(value) if isinstance(value, Real) and not isinstance(value, int | float) else value


def _matches(annotation: Any, value: Any) -> bool:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return any(value == choice and type(value) is type(choice) for choice in arguments)
    if origin in (Union, UnionType):
        return any(_matches(argument, value) for argument in arguments)
    if origin is tuple:
        if not isinstance(value, tuple):
            return False
        kinds = [arguments[0]] * len(value) if arguments[-1] is Ellipsis else list(arguments)
        return len(kinds) == len(value) and all(map(_matches, kinds, value))
    if annotation is int or (annotation is float and not isinstance(value, float)):
        return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63
    if annotation is float:
        return isfinite(value)
    return isinstance(value, origin or annotation)


def _rule(annotation: Any) -> str:
    """Describe the values of a type for an error message."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        *others, last = (str(value) if value != "" else "empty" for value in arguments)
        return f"{', '.join(others)} or {last}" if others else last
    if origin in (Union, UnionType):
        return " or ".join(_rule(argument) for argument in arguments)
    if origin is tuple:
        if arguments[-1] is Ellipsis:
            return f"a list whose elements are each {_rule(arguments[0])}"
        return f"a list of {len(arguments)} elements, each {_rule(arguments[0])}"
    return _TYPE_RULES.get(annotation, f"a {getattr(annotation, '__name__', annotation)}")


_TYPE_RULES = {
    int: "an integer of at most 64 bits",
    float: "a finite number",
    bool: "true or false",
    str: "a string",
    NoneType: "null",
}
