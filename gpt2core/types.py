"""Typed data that crosses package borders. Each type has `to_json` and `from_json`; files and HTTP carry that form.

Scores are in `gpt2core/metrics.py`, a deployment's outcome in `deploy/target.py`.
"""

from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields, is_dataclass
from types import UnionType
from typing import Any, Self, Union, get_args, get_origin, get_type_hints

from gpt2core.metrics import RecordScores, Scores


class JsonDataclass:
    """Base of frozen dataclasses that are stored as JSON objects with their field names as keys."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)  # type: ignore[call-overload]

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """The inverse of `to_json`; keys that are not fields are ignored, so older and newer files can be read.

        Raises:
            ValueError: naming the key that is missing or has a value of another type.
        """
        value = _read(cls, data, cls.__name__)
        assert isinstance(value, cls)
        return value


@dataclass(frozen=True)
class Sample(JsonDataclass):
    """A test record with the answers of base and tuned model. `to_json` is a line of samples.jsonl."""

    instruction: str
    input: str
    output: str  # the reference
    base: str
    tuned: str
    finished: bool  # the tuned answer ended by end of text
    family: str  # "" where the record has none
    base_scores: RecordScores
    tuned_scores: RecordScores

    def to_json(self) -> dict[str, Any]:
        """Flat: the scores are keys like base_exact_match and tuned_nll."""
        plain = asdict(self)
        sides = {side: plain.pop(f"{side}_scores") for side in ("base", "tuned")}
        return plain | {f"{side}_{name}": value for side, scores in sides.items() for name, value in scores.items()}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        names = [score.name for score in fields(RecordScores)]
        nested = {
            f"{side}_scores": {name: data[f"{side}_{name}"] for name in names if f"{side}_{name}" in data}
            for side in ("base", "tuned")
        }
        return super().from_json({**data, **nested})


@dataclass(frozen=True)
class FamilyScores(JsonDataclass):
    """Exact match on the records of one family."""

    records: int
    base: float
    tuned: float


@dataclass(frozen=True)
class TrainSummary(JsonDataclass):
    """The last training metrics. Losses are nats per token."""

    loss: float
    val_loss: float | None  # the best; None without validation records
    tokens_seen: float
    tokens_per_second: float


@dataclass(frozen=True)
class Evaluation(JsonDataclass):
    """Scores of base and tuned model on the test split. `to_json` is metrics.json."""

    base: Scores
    tuned: Scores
    by_family: dict[str, FamilyScores]
    train: TrainSummary
    device: str = "cpu"  # type of the device that generated the answers in fp32; another type may decode other text


@dataclass(frozen=True)
class SplitPart(JsonDataclass):
    """One part of the data: the sha256 of its records in order, and their number."""

    sha256: str
    records: int


@dataclass(frozen=True)
class SplitSummary(JsonDataclass):
    """The three parts of the data. `to_json` is split.json."""

    train: SplitPart
    val: SplitPart
    test: SplitPart

    @property
    def digests(self) -> dict[str, str]:
        """The sha256 of each part, by name."""
        return {name: part["sha256"] for name, part in self.to_json().items()}


@dataclass(frozen=True)
class RunRef(JsonDataclass):
    """A pipeline run."""

    id: str
    name: str


@dataclass(frozen=True)
class Commit(JsonDataclass):
    """The code of a run. sha is "unknown" outside a git checkout; dirty: with uncommitted changes."""

    sha: str
    dirty: bool


@dataclass(frozen=True)
class BaseRef(JsonDataclass):
    """The base model; revision is "" unless it comes from the hub."""

    name: str
    revision: str
    sha256: str


@dataclass(frozen=True)
class AdapterRef(JsonDataclass):
    """The adapter: sha256 of its directory (`gpt2core.checkpoint.directory_sha256`) and its LoRA configuration."""

    sha256: str
    rank: int
    alpha: float
    targets: list[str]
    dropout: float


@dataclass(frozen=True)
class LineageMetrics(JsonDataclass):
    base: Scores
    tuned: Scores
    train: TrainSummary


@dataclass(frozen=True)
class Lineage(JsonDataclass):
    """Where a Bento comes from. `to_json` is lineage.json and the response of /metadata."""

    run: RunRef
    model_version: str  # name/number
    commit: Commit
    versions: dict[str, str]  # of Python and the libraries that matter
    data: dict[str, str]  # sha256 of train, val and test
    base: BaseRef
    adapter: AdapterRef
    metrics: LineageMetrics
    bento: str = ""  # the Bento's tag; empty until it is built


def _read(annotation: Any, value: Any, path: str) -> Any:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin in (Union, UnionType):
        return None if value is None else _read(next(a for a in arguments if a is not type(None)), value, path)
    if is_dataclass(annotation) and isinstance(annotation, type):
        if not isinstance(value, Mapping):
            raise ValueError(f"{path} is {value!r}; it must be an object")
        hints = get_type_hints(annotation)
        missing = [f.name for f in fields(annotation) if f.name not in value and f.default is MISSING]
        if missing:
            raise ValueError(f"{path} has no {missing[0]!r}")
        return annotation(**{k: _read(hints[k], v, f"{path}.{k}") for k, v in value.items() if k in hints})
    if origin is dict:
        if not isinstance(value, Mapping):
            raise ValueError(f"{path} is {value!r}; it must be an object")
        return {str(key): _read(arguments[1], inner, f"{path}.{key}") for key, inner in value.items()}
    if origin is list:
        if not isinstance(value, list | tuple):
            raise ValueError(f"{path} is {value!r}; it must be a list")
        return [_read(arguments[0], inner, f"{path}[{i}]") for i, inner in enumerate(value)]
    if annotation is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(annotation, type) and (not isinstance(value, annotation) or (annotation is int and value is True)):
        raise ValueError(f"{path} is {value!r}; it must be {annotation.__name__}")
    return value
