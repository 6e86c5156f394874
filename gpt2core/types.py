"""Typed data that crosses package boundaries. `to_json` and `from_json` convert it for files and HTTP.

Scores are in `gpt2core/metrics.py`, a deployment's outcome in `deploy/target.py`.
"""

from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from types import UnionType
from typing import Any, Self, Union, get_args, get_origin, get_type_hints

from gpt2core.files import read_json
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

    @classmethod
    def from_json_file(cls, file: Path) -> Self:
        """`from_json` of the object in the file.

        Raises:
            FileNotFoundError, ValueError: naming the file.
        """
        data = read_json(file)
        try:
            return cls.from_json(data)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{file} is damaged or was changed: {error}") from None


MODELS = ("base", "tuned", "champion")  # the models that answer a test record


@dataclass(frozen=True)
class Answer(JsonDataclass):
    """One model's answer to a test record."""

    text: str
    finished: bool  # ended by end of text
    scores: RecordScores
    reference_tokens: int  # of the reference answer with its end of text, in this model's tokens
    confidence: float | None = None  # mean probability of the answer's tokens


@dataclass(frozen=True)
class Sample(JsonDataclass):
    """A test record with the answers of the models. `to_json` is a line of samples.jsonl.

    The champion is the model version that was in the target stage before this run; it answers only records that it was
    not trained on.
    """

    instruction: str
    input: str
    output: str  # the reference
    base: str
    tuned: str
    finished: bool  # the tuned answer ended by end of text
    family: str  # "" where the record has none
    base_scores: RecordScores
    tuned_scores: RecordScores
    group: str = ""  # records of one group are about one thing; "" where the record has none
    base_finished: bool = False
    base_tokens: int = 1  # of the reference, see Answer
    tuned_tokens: int = 1
    base_confidence: float | None = None
    tuned_confidence: float | None = None
    champion: str | None = None  # None: did not answer
    champion_finished: bool = False
    champion_tokens: int = 1
    champion_confidence: float | None = None
    champion_scores: RecordScores | None = None
    judge_score: float | None = None  # of the tuned answer, 0 (wrong) to 1 (right); None: not judged
    judge_reason: str = ""

    def answer(self, model: str) -> Answer:
        """The answer of one of `MODELS`.

        Raises:
            ValueError: the champion did not answer this record.
        """
        text, scores = getattr(self, model), getattr(self, f"{model}_scores")
        if text is None or scores is None:
            raise ValueError(f"the {model} has no answer to {self.instruction!r}")
        finished = self.finished if model == "tuned" else getattr(self, f"{model}_finished")
        return Answer(text, finished, scores, getattr(self, f"{model}_tokens"), getattr(self, f"{model}_confidence"))

    def with_champion(self, answer: Answer) -> Self:
        """The sample with the champion's answer."""
        return replace(
            self,
            champion=answer.text,
            champion_finished=answer.finished,
            champion_tokens=answer.reference_tokens,
            champion_confidence=answer.confidence,
            champion_scores=answer.scores,
        )

    def without_champion(self) -> Self:
        """The sample as `evaluate` made it."""
        later = ("champion", "judge")
        return self.from_json({key: value for key, value in self.to_json().items() if not key.startswith(later)})

    def to_json(self) -> dict[str, Any]:
        """Flat: scores are keys like base_exact_match and tuned_nll. Keys of champion and judge exist only if there is
        an answer or a judge.
        """
        plain = asdict(self)
        if self.judge_score is None:
            plain = {key: value for key, value in plain.items() if not key.startswith("judge")}
        if self.champion is None:
            plain = {key: value for key, value in plain.items() if not key.startswith("champion")}
        scores_of = {model: plain.pop(f"{model}_scores") for model in MODELS if f"{model}_scores" in plain}
        flat = {f"{model}_{name}": value for model, scores in scores_of.items() for name, value in scores.items()}
        return plain | flat

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        names = [score.name for score in fields(RecordScores)]
        nested = {
            f"{model}_scores": {name: data[f"{model}_{name}"] for name in names if f"{model}_{name}" in data}
            for model in MODELS
            if model != "champion" or data.get("champion") is not None
        }
        return super().from_json({**data, **nested})


@dataclass(frozen=True)
class FamilyScores(JsonDataclass):
    """Exact match on the records of one family."""

    records: int
    base: float
    tuned: float
    base_ci95: list[float] = field(default_factory=list)  # [low, high]
    tuned_ci95: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class TrainSummary(JsonDataclass):
    """The last training metrics. Losses are nats per token."""

    loss: float
    val_loss: float | None  # the best; None without validation records
    tokens_seen: float
    tokens_per_second: float
    utilization: float | None = None  # mean share of the GPU's time, or without one of all CPUs, that training used
    peak_memory_mib: float | None = None  # on the GPU, or without one of the process
    wandb_run: str = ""  # id of the training's run in wandb; empty: not tracked


@dataclass(frozen=True)
class Evaluation(JsonDataclass):
    """Scores of base and tuned model on the test split. `to_json` is metrics.json."""

    base: Scores
    tuned: Scores
    by_family: dict[str, FamilyScores]
    train: TrainSummary
    device: str = "cpu"  # type of the device that generated the answers in fp32; another type may decode other text
    intervals: dict[str, dict[str, list[float]]] = field(default_factory=dict)  # model, metric: 95 % interval


@dataclass(frozen=True)
class Difference(JsonDataclass):
    """How a model's score differs from another model's on the same n records."""

    metric: str
    difference: float  # new minus old
    ci95: list[float]  # [low, high]; [] where the data allow none
    p_value: float  # two-sided, of no difference
    n: int
    test: str  # that gave the p-value
    detectable: float | None = None  # the smallest true difference that a test with n records detects with power 0.8


@dataclass(frozen=True)
class Judgement(JsonDataclass):
    """A judge's mean score of the tuned answers, and its agreement with exact match (0.5 or more is correct)."""

    model: str
    score: float | None  # mean over the judged answers; None: none was judged
    judged: int
    answers: int
    note: str = ""  # why answers were not judged
    agreement: float | None = None  # share of judged answers on which both agree
    agreement_ci95: list[float] = field(default_factory=list)
    kappa: float | None = None  # Cohen's; None where both say the same of all answers
    kappa_ci95: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Comparison(JsonDataclass):
    """The tuned model compared with its base and with the champion, by metric."""

    tuned_vs_base: dict[str, Difference]
    champion: str  # the model version in the target stage; "" if there is none
    tuned_vs_champion: dict[str, Difference] | None  # None: not compared, see `note`
    note: str  # on which records the champion was compared, or why not
    worst: float | None = None  # bound of the difference to the champion on promote.metric; negative: worse
    champion_scores: Scores | None = None
    champion_intervals: dict[str, list[float]] = field(default_factory=dict)
    judge: Judgement | None = None  # None: evaluate.judge is off


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
    """The base model; revision is "" unless it comes from the hub. The name of a directory is its absolute path."""

    name: str
    revision: str
    sha256: str


@dataclass(frozen=True)
class AdapterRef(JsonDataclass):
    """The adapter: sha256 of its directory (`gpt2core.files.directory_sha256`) and its LoRA configuration."""

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


@dataclass(frozen=True)
class LoggedCompletion(JsonDataclass):
    """A completion in the request log. GPT2_REQUEST_LOG_TEXT sets whether it has texts, their sha256 or neither."""

    time: str  # ISO 8601, UTC
    milliseconds: float
    temperature: float
    request_id: str
    model: str  # a name of /v1/models
    adapter_sha256: str | None  # None: the base alone
    finish_reason: str  # stop, length, cancelled, deadline or error
    prompt_tokens: int
    completion_tokens: int
    first_token_milliseconds: float | None
    prompt_characters: int
    answer_characters: int
    prompt: str | None = None
    answer: str | None = None
    prompt_sha256: str | None = None
    answer_sha256: str | None = None

    def to_json(self) -> dict[str, Any]:
        return _without_absent_texts(asdict(self))


@dataclass(frozen=True)
class LoggedShadow(JsonDataclass):
    """What a canary in shadow mode answered to a request that another version had answered, in the same log."""

    time: str  # ISO 8601, UTC
    request_id: str  # of the completion that the client got
    shadow: str  # the canary's name
    adapter_sha256: str | None
    finish_reason: str  # stop, length, deadline or error
    milliseconds: float  # of the canary's answer alone
    completion_tokens: int
    agreed: bool  # with the client's answer, except for case, whitespace and a final period
    token_f1: float  # with the client's answer as reference
    mean_logprob: float | None  # of the canary's tokens, in nats; None: it generated none
    answer: str | None = None
    answer_sha256: str | None = None

    def to_json(self) -> dict[str, Any]:
        return _without_absent_texts(asdict(self))


@dataclass(frozen=True)
class LoggedFeedback(JsonDataclass):
    """A user's feedback on a completion, in the same log. A line with `rating` is feedback."""

    time: str  # ISO 8601, UTC
    request_id: str  # of the completion
    rating: str  # good or bad
    correction: str | None = None  # the right answer
    comment: str | None = None


def _without_absent_texts(line: dict[str, Any]) -> dict[str, Any]:
    texts = ("prompt", "answer", "prompt_sha256", "answer_sha256")
    return {key: value for key, value in line.items() if value is not None or key not in texts}


def _read(annotation: Any, value: Any, path: str) -> Any:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin in (Union, UnionType):
        return None if value is None else _read(next(a for a in arguments if a is not type(None)), value, path)
    if is_dataclass(annotation) and isinstance(annotation, type):
        if not isinstance(value, Mapping):
            raise ValueError(f"{path} is {value!r}; it must be an object")
        hints = get_type_hints(annotation)
        for f in fields(annotation):
            if f.name not in value and f.default is MISSING and f.default_factory is MISSING:
                raise ValueError(f"{path} has no {f.name!r}")
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
    is_of_type = not isinstance(annotation, type) or isinstance(value, annotation)
    if not is_of_type or (annotation is int and isinstance(value, bool)):
        raise ValueError(f"{path} is {value!r}; it must be {annotation.__name__}")
    return value
