"""Configuration of the pipeline's steps, with every default. Model and training are in gpt2core/config.py."""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from math import prod
from os.path import expanduser
from pathlib import Path, PurePosixPath
from typing import Any, Literal, Self
from urllib.parse import urlsplit

from gpt2core.config import (
    PRESETS,
    GPT2Config,
    LoraConfig,
    PretrainConfig,
    TooLong,
    TrainConfig,
    check_field,
    check_types,
    lists_to_tuples,
)
from gpt2core.files import checkpoint_files, directory_sha256
from gpt2core.metrics import METRICS
from gpt2core.record_files import SUFFIXES
from gpt2core.record_formats import COLUMNS

DATA_SUFFIXES = (*SUFFIXES, ".parquet")  # of files with records


@dataclass(frozen=True)
class DataConfig:
    """The source of the instruction records, and how they are split."""

    source: Literal["bundled", "url", "file", "hub"] = "bundled"  # bundled: records about the generated demo world
    # with source: url; the default is the 1,100 records that mariovas3/llms trained on, from the same URL
    url: str = (
        "https://raw.githubusercontent.com/rasbt/LLMs-from-scratch/main/ch07/01_main-chapter-code/instruction-data.json"
    )
    sha256: str = "7e09a9af353722ca15c18bc580f093f9c39d3178335a75177319cb1e1d163944"  # sha256 of the file at `url`
    name: str = ""  # with source: hub; a dataset of the Hugging Face hub, or a directory
    revision: str = ""  # commit of the dataset
    max_bytes: int = 2**28  # limit of the download
    path: str = ""  # with source: file or hub; .json, .jsonl, .csv, .parquet, a directory or a pattern (hub: in `name`)
    val_path: str = ""  # file of the validation records; "": they are split off from `path`
    test_path: str = ""  # file of the test records; "": they are split off from `path`
    columns: Mapping[str, str] = field(default_factory=dict)  # key of a record -> its name in the file
    n_facts: int | None = None  # number of facts of the bundled demo world; null: all
    order: Literal["seed", "file"] = "seed"  # seed: shuffle before the split; file: keep the order of the file
    val_fraction: float = 0.05  # share of the records that are split off for the validation loss; 0: none
    test_fraction: float = 0.1  # share of the records that are split off for evaluation
    too_long: TooLong = "error"  # for records with more tokens than the context: fail, drop them, truncate their output
    invalid: Literal["error", "drop"] = "error"  # for faulty records: fail, or drop them

    def __post_init__(self) -> None:
        check_types(self)
        _expand_home(self, "name", "path", "val_path", "test_path")
        check_field(
            self, "path", bool(self.path) or self.source != "file", "a path (required when data.source is file)"
        )
        rule = (
            "a dataset (required when data.source is hub)"
            if self.source == "hub"
            else "empty unless data.source is hub"
        )
        check_field(self, "name", bool(self.name) == (self.source == "hub"), rule)
        check_field(self, "name", not _is_url(self.name), "a dataset like tatsu-lab/alpaca, or a directory, not a URL")
        for name in ("path", "val_path", "test_path"):
            rule = "a path, not a URL; data.source=url reads data.url, data.source=hub a dataset of the hub"
            check_field(self, name, not _is_url(getattr(self, name)), rule)
        check_field(
            self,
            "sha256",
            bool(re.fullmatch("[0-9a-fA-F]{64}", self.sha256)) or self.source != "url",
            "the 64 hexadecimal digits of the file's sha256",
        )
        known = self.source != "url" or PurePosixPath(urlsplit(self.url).path).suffix.lower() in DATA_SUFFIXES
        check_field(self, "url", known, f"a URL that ends in one of {', '.join(DATA_SUFFIXES)}")
        check_field(self, "max_bytes", self.max_bytes >= 1, "at least 1")
        check_field(
            self, "n_facts", self.n_facts is None or self.n_facts >= 1, "at least 1, or null for the whole world"
        )
        for name, sources in (("path", ("file", "hub")), ("val_path", ("file",)), ("test_path", ("file",))):
            allowed = not getattr(self, name) or self.source in sources
            check_field(self, name, allowed, f"empty unless data.source is {' or '.join(sources)}")
        known = all(key in COLUMNS and isinstance(name, str) and name for key, name in self.columns.items())
        distinct = len(set(self.columns.values())) == len(self.columns)
        check_field(self, "columns", known and distinct, f"a mapping of some of {', '.join(COLUMNS)} to other names")
        check_field(self, "val_fraction", 0 <= self.val_fraction < 0.5, "0, for no validation, or below 0.5")
        check_field(self, "test_fraction", 0 < self.test_fraction < 0.5, "above 0 and below 0.5")

    def check_patience_early(self, train: TrainConfig) -> None:
        """Reject `train.patience` if this configuration can have no validation records.

        The step `split_data` checks the records themselves.
        """
        if not self.val_fraction and not self.val_path and self.source in ("bundled", "url"):
            check_patience(train.patience, self, n_val=0)


@dataclass(frozen=True)
class BaseConfig:
    """The base model.

    A preset that the pipeline pretrains (nano), the same preset with random weights (random), or a model of the Hugging
    Face hub or a local directory (hub).
    """

    source: Literal["nano", "random", "hub"] = "nano"  # nano: pretrained in the run; random: not trained
    name: str = "gpt2-nano"  # a preset; with source: hub a repository or a directory
    revision: str = ""  # commit of the repository, 40 hexadecimal digits
    pretrain: PretrainConfig = field(default_factory=PretrainConfig)

    def __post_init__(self) -> None:
        check_types(self)
        _expand_home(self, "name")
        known = self.source == "hub" or self.name in PRESETS
        check_field(self, "name", known, f"one of {', '.join(PRESETS)} unless source is hub")
        rule = "a repository like openai-community/gpt2, or a directory, not a URL"
        check_field(self, "name", not _is_url(self.name), rule)

    def resolved(self) -> tuple[Self, str]:
        """Resolve a local directory: return the configuration with its absolute path, and the sha256 of its files.

        For other bases, return the configuration unchanged, and "". Both are inputs of steps, so that changed files
        change the cache keys.
        """
        if self.source != "hub":
            return self, ""
        if not Path(self.name).is_dir():
            is_commit = bool(re.fullmatch("[0-9a-f]{40}", self.revision))
            check_field(self, "revision", is_commit, f"40 hexadecimal digits: {self.name} is no directory here")
            return self, ""
        path = Path(self.name).resolve()
        return replace(self, name=str(path)), directory_sha256(path, checkpoint_files(path))

    def check_rank_early(self, lora: LoraConfig) -> None:
        """Reject a rank that is too large for a preset. The step `finetune` checks it for a base of the hub."""
        if self.source != "hub":
            check_rank(lora, GPT2Config.preset(self.name).n_embd)


@dataclass(frozen=True)
class TextConfig:
    """The text on which a base is pretrained."""

    source: Literal["bundled", "url", "file"] = "bundled"  # bundled: the prose of the demo world
    url: str = ""  # with source: url; the file
    sha256: str = ""  # sha256 of the file at `url`
    path: str = ""  # with source: file; plain text in UTF-8
    max_bytes: int = 2**28  # limit of the file's size
    n_facts: int | None = None  # number of facts of the bundled demo world; null: all
    val_fraction: float = 0.1  # share of the text, at its end, that is held out for the validation loss
    prompts: tuple[str, ...] = ()  # texts whose greedy continuations are part of the results

    def __post_init__(self) -> None:
        lists_to_tuples(self, "prompts")
        check_types(self)
        _expand_home(self, "path")
        for name, source in (("path", "file"), ("url", "url")):
            wanted = self.source == source
            rule = "the location of the text" if wanted else f"empty unless text.source is {source}"
            check_field(self, name, bool(getattr(self, name)) == wanted, rule)
        rule = "a path, not a URL; text.source=url reads text.url"
        check_field(self, "path", not _is_url(self.path), rule)
        digest = bool(re.fullmatch("[0-9a-fA-F]{64}", self.sha256)) or self.source != "url"
        check_field(self, "sha256", digest, "the 64 hexadecimal digits of the file's sha256")
        check_field(self, "max_bytes", self.max_bytes >= 1, "at least 1")
        check_field(
            self, "n_facts", self.n_facts is None or self.n_facts >= 1, "at least 1, or null for the whole world"
        )
        check_field(self, "val_fraction", 0 < self.val_fraction < 0.5, "between 0 and 0.5")
        check_field(self, "prompts", all(self.prompts), "texts of at least one character")


@dataclass(frozen=True)
class ModelConfig:
    """A GPT-2 to pretrain: a preset, and values that replace the preset's (null: keep the preset's)."""

    preset: str = "gpt2-nano"  # a size: gpt2-nano, gpt2, gpt2-medium, gpt2-large, gpt2-xl
    n_layer: int | None = None  # blocks
    n_head: int | None = None  # attention heads of a block
    n_embd: int | None = None  # width
    n_positions: int | None = None  # maximum length in tokens
    vocab_size: int | None = None  # maximum: the tokenizer that is trained on the text may have fewer tokens
    norm_position: Literal["pre", "post"] = "pre"  # layer norm before or after each part of a block
    layer_init: Literal["fresh", "clone"] = "fresh"  # clone: all blocks start as copies of the first block

    def __post_init__(self) -> None:
        check_types(self)
        check_field(self, "preset", self.preset in PRESETS, f"one of {', '.join(PRESETS)}")
        check_field(self, "vocab_size", self.vocab_size is None or self.vocab_size >= 300, "at least 300, or null")
        self.to_gpt2()

    def to_gpt2(self) -> GPT2Config:
        changes = {key: value for key, value in asdict(self).items() if key != "preset" and value is not None}
        return replace(GPT2Config.preset(self.preset), **changes)


# Kind of trial -> the metrics that it measures. Losses are nats per token; shares are in [0, 1].
TRIAL_METRICS: Mapping[str, Mapping[str, str]] = {
    "finetune": {
        "val_loss": "loss on the responses of the validation records",
        "exact_match": "share of sampled answers to the test records that are right",
        "train_loss": "last logged training loss",
        "parameters": "trainable weights",
        "seconds": "time of the training steps",
        "tokens_per_second": "throughput of the training steps",
        "utilization": "share of the time in which training used the GPU, or without a GPU the CPUs",
        "peak_mib": "peak memory of the GPU, or without a GPU of the process",
        "same_bytes": "1 if repeated training runs gave the same adapter",
        "distinct": "different answers to a test record",
    },
    "pretrain": {
        "val_loss": "loss on the held-out text",
        "train_loss": "last logged training loss",
        "seconds": "time of the training",
    },
    "attention": {
        "kept_mib": "memory kept for the backward pass; on a GPU, peak memory",
        "forward_ms": "time of the forward pass",
        "backward_ms": "time of the backward pass",
    },
}


@dataclass(frozen=True)
class SweepConfig:
    """Variants of a run's parameters; each runs with every seed."""

    kind: Literal["finetune", "pretrain", "attention"] = "finetune"  # the kind of trial
    question: str = ""  # what the sweep is to answer, for its report
    variable: str = "variant"  # what differs between the variants: the heading of the first column
    variants: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # name -> parameters that differ
    grid: Mapping[str, Any] = field(default_factory=dict)  # a.b -> list of values; each combination is a variant too
    metrics: tuple[str, ...] = ()  # columns of the table, from `TRIAL_METRICS`; empty: the first three of the kind
    seeds: tuple[int, ...] = (0, 1, 2)  # training seeds; data, split and base always use the run's seed
    samples: int = 1  # number of answers to each test record
    repeats: int = 1  # training runs per seed; their adapters are compared
    name: str = "sweep"  # name of the directory in outputs/experiments; run.py sets it to the configuration file's name
    scale: Literal["small", "full"] = "small"  # full: with the parameters in `full`
    full: Mapping[str, Mapping[str, Any]] = field(
        default_factory=dict
    )  # replaces the run's parameters if scale is full

    def __post_init__(self) -> None:
        lists_to_tuples(self, "metrics", "seeds")
        if not self.metrics and self.kind in TRIAL_METRICS:
            object.__setattr__(self, "metrics", tuple(TRIAL_METRICS[self.kind])[:3])
        check_types(self)
        known = TRIAL_METRICS[self.kind]
        check_field(self, "metrics", set(self.metrics) <= known.keys(), f"some of {', '.join(known)}")
        distinct = bool(self.seeds) and len(set(self.seeds)) == len(self.seeds)
        check_field(self, "seeds", distinct and min(self.seeds) >= 0, "at least one seed of 0 or more, each once")
        for name in ("samples", "repeats"):
            check_field(self, name, getattr(self, name) >= 1, "at least 1")
        lists = all(isinstance(values, list | tuple) and values for values in self.grid.values())
        check_field(self, "grid", lists, "a mapping of keys like lora.rank to lists of values")
        check_field(self, "grid", prod(map(len, self.grid.values())) <= 1000, "at most 1000 combinations")
        check_field(
            self, "variants", bool(self.variants or self.grid), "at least one variant, unless sweep.grid is set"
        )
        check_field(
            self, "name", bool(re.fullmatch(r"\w[\w.-]*", self.name)), "letters, digits, dots, dashes and underscores"
        )


def _expand_home(config: Any, *names: str) -> None:
    """Replace `~` at the beginning of paths: a shell replaces it neither in YAML nor in --set data.path=~/a.jsonl."""
    for name in names:
        object.__setattr__(config, name, expanduser(getattr(config, name)))


def _is_url(path: str) -> bool:
    return re.match(r"[a-zA-Z][a-zA-Z0-9+.-]*://", path) is not None


def default_learning_rate(base: BaseConfig) -> float:
    """Return the default of `train.learning_rate`: a larger model needs a smaller learning rate."""
    return 3e-4 if base.source == "hub" else TrainConfig().learning_rate


def check_rank(lora: LoraConfig, n_embd: int) -> None:
    """Raise ValueError for a rank above `n_embd`, the smaller side of the adapted matrices.

    A higher rank adds no capacity, and a typing error such as rank 8000 would run out of memory only after pretraining.
    """
    if lora.rank > n_embd:
        raise ValueError(f"lora.rank is {lora.rank}; it must be at most {n_embd}, the width of the base (n_embd)")


def check_patience(patience: int | None, data: DataConfig, n_val: int) -> None:
    """Raise ValueError if `patience` is set, but there are no validation records."""
    if patience is not None and not n_val:
        raise ValueError(
            f"train.patience is {patience}, but there are no validation records; raise data.val_fraction, which is "
            f"{data.val_fraction:g}, or set train.patience to null"
        )


@dataclass(frozen=True)
class JudgeConfig:
    """A model behind an OpenAI-compatible API that judges the tuned model's answers."""

    url: str = ""  # URL of the API, like https://host/v1; "": no judge
    model: str = ""  # the API's name of the model
    token_env: str = ""  # environment variable with the API's token, which is not stored; "": no token
    response_format: Literal["json_schema", "text"] = "json_schema"  # text: the API has no structured output

    def __post_init__(self) -> None:
        check_types(self)
        known = not self.url or bool(re.fullmatch(r"https?://[^\s@]+", self.url))
        check_field(self, "url", known, "an http or https URL without a password")
        check_field(self, "model", bool(self.model) or not self.url, "the name of a model if there is a url")
        name = not self.token_env or bool(re.fullmatch(r"[A-Za-z_]\w*", self.token_env))
        check_field(self, "token_env", name, "the name of an environment variable")


@dataclass(frozen=True)
class EvaluateConfig:
    """How the answers of base and tuned model to the test split are generated, and whether an LLM judges them."""

    max_new_tokens: int = 64  # maximum length of an answer
    batch_size: int = 16  # answers that are generated together
    judge: JudgeConfig = field(default_factory=JudgeConfig)

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("max_new_tokens", "batch_size"):
            check_field(self, name, getattr(self, name) >= 1, "at least 1")


@dataclass(frozen=True)
class PromoteConfig:
    """The promotion gate: a model must be better than its base, and not worse than the champion by more than `margin`.

    The champion is the model version in `stage`. See `steps.promote.decide`.
    """

    stage: Literal["staging", "production"] = "staging"  # the stage that a model is promoted to
    metric: str = "exact_match"  # the score that decides
    margin: float = 0.05  # in units of the metric
    alpha: float = 0.05  # significance level of both tests
    # whether a champion must exist; ignore: compare with the base only
    champion: Literal["required", "if-present", "ignore"] = "if-present"

    def __post_init__(self) -> None:
        check_types(self)
        check_field(self, "metric", self.metric in METRICS, f"one of {', '.join(METRICS)}")
        check_field(self, "margin", self.margin >= 0, "at least 0")
        check_field(self, "alpha", 0 < self.alpha < 0.5, "between 0 and 0.5")


@dataclass(frozen=True)
class PackageConfig:
    """How the service is verified after the Bento is built."""

    smoke_prompts: int = 3  # number of test records whose answers are compared after the build

    def __post_init__(self) -> None:
        check_types(self)
        check_field(self, "smoke_prompts", self.smoke_prompts >= 1, "at least 1")


@dataclass(frozen=True)
class TrackingConfig:
    """Whether training runs are logged to wandb, and to which of its projects."""

    wandb: Literal["off", "offline", "online"] = "off"  # offline: log to files only
    project: str = "gpt2-instruct"  # project of wandb

    def __post_init__(self) -> None:
        check_types(self)


@dataclass(frozen=True)
class MonitorConfig:
    """The configuration of monitoring, with the limits of its signals. See `steps.adapters.drift`."""

    log: str = "requests.jsonl"  # file of GPT2_REQUEST_LOG of the service; rotated files are read too
    run: str = ""  # name or id of the run whose model is served; "": the run that trained the adapter in the log
    max_requests: int = 5_000  # number of newest completions to compare
    min_requests: int = 50  # minimum number of completions for a decision
    min_ratings: int = 10  # minimum number of ratings for a decision about them
    max_length_change: float = 0.5  # maximum distance of the length distributions, as share of the mean length
    max_unknown_words: float = 0.1  # maximum increase of the share of words that are in no training prompt
    max_similarity_loss: float = 0.15  # maximum decrease of the similarity to the nearest training prompt
    max_unfinished: float = 0.15  # maximum increase of the share of answers without end of text
    max_p95_seconds: float = 10.0  # maximum 95th percentile of request duration
    max_bad_ratings: float = 0.3  # maximum share of bad ratings
    webhook: str = ""  # receives the alert: an http or https URL, or $NAME of the environment variable with it

    def __post_init__(self) -> None:
        check_types(self)
        check_field(self, "log", bool(self.log), "the file of GPT2_REQUEST_LOG")
        for name in ("max_requests", "min_requests", "min_ratings"):
            check_field(self, name, getattr(self, name) >= 1, "at least 1")
        enough = self.max_requests >= self.min_requests  # otherwise there is never a decision
        check_field(self, "max_requests", enough, f"at least min_requests ({self.min_requests})")
        for name in ("max_length_change", "max_p95_seconds"):
            check_field(self, name, getattr(self, name) > 0, "above 0")
        for name in ("max_unknown_words", "max_similarity_loss", "max_unfinished", "max_bad_ratings"):
            check_field(self, name, 0 < getattr(self, name) <= 1, "above 0 and at most 1")
        known = not self.webhook or bool(re.fullmatch(r"https?://\S+|\$[A-Za-z_]\w*", self.webhook))
        check_field(self, "webhook", known, "an http or https URL, or $NAME of an environment variable")
