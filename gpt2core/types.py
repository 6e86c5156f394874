"""Typed data that crosses package boundaries. `to_json` and `from_json` convert it for files and HTTP.

Scores are in `gpt2core/metrics.py`, and the outcome of a deployment in `deploy/target.py`.
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
        """Make an object from the result of `to_json`. Unknown keys are ignored, so newer files can be read too.

        Raises:
            ValueError: a key is missing or has a value of another type; the message names the key.
        """
        value = _read(cls, data, cls.__name__)
        assert isinstance(value, cls)
        return value

    @classmethod
    def from_json_file(cls, file: Path) -> Self:
        """Read the JSON object in a file by `from_json`.

        Raises:
            FileNotFoundError, ValueError: the file is missing or damaged; the message names it.
        """
        data = read_json(file)
        try:
            return cls.from_json(data)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{file} is damaged or was changed: {error}") from None


NAME = "gpt2-instruct"  # of the model, its service, Bento, containers and projects
MODELS = ("base", "tuned", "champion")  # the models that answer a test record


@dataclass(frozen=True)
class Answer(JsonDataclass):
    """One model's answer to a test record."""

    text: str
    finished: bool  # end of text ended the answer
    scores: RecordScores
    reference_tokens: int = 1  # number of this model's tokens in the reference answer with end of text
    confidence: float | None = None  # mean probability of the answer's tokens


@dataclass(frozen=True)
class Sample(JsonDataclass):
    """A test record with the answers of the models. `to_json` gives a line of samples.jsonl.

    The champion is the model version that was in the target stage before this run. It answers only records that it was
    not trained on.
    """

    instruction: str
    input: str
    output: str  # the reference answer
    base: Answer
    tuned: Answer
    family: str = ""  # "": the record has no family
    group: str = ""  # records of one group are about the same thing; "": the record has no group
    champion: Answer | None = None  # None: it did not answer
    judge_score: float | None = None  # score of the tuned answer, 0 (wrong) to 1 (right); None: not judged
    judge_reason: str = ""

    def without_champion(self) -> Self:
        """Return the sample as `evaluate` made it, without the answers of champion and judge."""
        return replace(self, champion=None, judge_score=None, judge_reason="")

    def to_json(self) -> dict[str, Any]:
        """Return a flat object, in which an answer is its text, beside keys like base_tokens and tuned_nll.

        Keys of the champion exist only if it answered, and keys of the judge only if it gave a score.
        """
        flat: dict[str, Any] = {}
        for name, value in vars(self).items():
            if name not in MODELS:
                flat[name] = value
            elif value is not None:
                flat |= {key: getattr(value, attribute) for attribute, key in _answer_keys(name).items()}
                flat |= {f"{name}_{score}": number for score, number in asdict(value.scores).items()}
        if self.judge_score is None:
            del flat["judge_score"], flat["judge_reason"]
        return flat

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        nested = {}
        for model in MODELS:
            if data.get(model) is not None:
                answer = {name: data[key] for name, key in _answer_keys(model).items() if key in data}
                names = [score.name for score in fields(RecordScores)]
                scores = {name: data[f"{model}_{name}"] for name in names if f"{model}_{name}" in data}
                nested[model] = {"finished": False, "scores": scores, **answer}  # early runs have no base_finished
        return super().from_json({**data, **nested})


def _answer_keys(model: str) -> dict[str, str]:
    """Return the keys in samples.jsonl of the attributes of a model's answer. Its scores have keys like base_nll."""
    finished = "finished" if model == "tuned" else f"{model}_finished"
    others = {"reference_tokens": f"{model}_tokens", "confidence": f"{model}_confidence"}
    return {"text": model, "finished": finished, **others}


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
    val_loss: float | None  # best validation loss; None: no validation records
    tokens_seen: float
    tokens_per_second: float
    utilization: float | None = None  # mean share of the GPU's time (without a GPU, of all CPUs) that training used
    peak_memory_mib: float | None = None  # peak memory on the GPU; without a GPU, of the process
    wandb_run: str = ""  # id of the run in wandb; empty: not tracked


@dataclass(frozen=True)
class Evaluation(JsonDataclass):
    """Scores of base and tuned model on the test split. `to_json` gives metrics.json."""

    base: Scores
    tuned: Scores
    by_family: dict[str, FamilyScores]
    train: TrainSummary
    device: str = "cpu"  # type of the device that generated the answers in fp32; another type may give other answers
    intervals: dict[str, dict[str, list[float]]] = field(default_factory=dict)  # model -> metric -> 95 % interval


@dataclass(frozen=True)
class Difference(JsonDataclass):
    """The difference between a model's score and another model's on the same n records."""

    metric: str
    difference: float  # new minus old
    ci95: list[float]  # [low, high]; []: the data do not allow an interval
    p_value: float  # two-sided; null hypothesis: no difference
    n: int
    test: str  # name of the test that gave the p-value
    detectable: float | None = None  # minimum detectable effect: true difference that n records show with power 0.8


@dataclass(frozen=True)
class Judgement(JsonDataclass):
    """A judge's mean score of the tuned answers, and its agreement with exact match (0.5 or more is correct)."""

    model: str
    score: float | None  # mean over the judged answers; None: none was judged
    judged: int
    answers: int
    note: str = ""  # reason why answers were not judged
    agreement: float | None = None  # share of judged answers on which the judge agrees with exact match
    agreement_ci95: list[float] = field(default_factory=list)
    kappa: float | None = None  # Cohen's kappa of the two; None: not defined, or nothing judged
    kappa_ci95: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Comparison(JsonDataclass):
    """The tuned model compared with its base and with the champion, by metric."""

    tuned_vs_base: dict[str, Difference]
    champion: str  # the model version in the target stage; "" if there is none
    tuned_vs_champion: dict[str, Difference] | None  # None: not compared, see `note`
    note: str  # records on which the champion was compared, or the reason why it was not
    # lower confidence bound of the improvement over the champion on promote.metric; negative: may be worse by this much
    lower_bound: float | None = None
    champion_scores: Scores | None = None
    champion_intervals: dict[str, list[float]] = field(default_factory=dict)
    judge: Judgement | None = None  # None: evaluate.judge is off


@dataclass(frozen=True)
class SplitPart(JsonDataclass):
    """A part of the data: the sha256 of its records in their order, and their number."""

    sha256: str
    records: int
    in_train: int | None = None  # number of records whose question is also in the train part; None: not counted


@dataclass(frozen=True)
class SplitSummary(JsonDataclass):
    """The three parts of the data. `to_json` gives split.json."""

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
    """The code version of a run."""

    sha: str  # "unknown" outside a git checkout
    dirty: bool  # there were uncommitted changes


@dataclass(frozen=True)
class BaseRef(JsonDataclass):
    """The base model."""

    name: str  # for a directory, its absolute path
    revision: str  # "" unless the base comes from the hub
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
    """The origin of a Bento. `to_json` gives lineage.json and the response of /metadata."""

    run: RunRef
    model_version: str  # name/number
    commit: Commit
    versions: dict[str, str]  # versions of Python and the libraries that can change results
    data: dict[str, str]  # sha256 of train, val and test
    base: BaseRef
    adapter: AdapterRef
    metrics: LineageMetrics
    bento: str = ""  # the Bento's tag; empty until it is built


@dataclass(frozen=True)
class LoggedCompletion(JsonDataclass):
    """A completion in the request log. GPT2_REQUEST_LOG_TEXT sets whether it has texts, their sha256, or neither."""

    time: str  # ISO 8601, UTC
    milliseconds: float
    temperature: float
    request_id: str
    model: str  # a name listed by /v1/models
    adapter_sha256: str | None  # None: the base without adapter
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
    """A shadow answer in the request log: a canary's answer to a request that another version answered."""

    time: str  # ISO 8601, UTC
    request_id: str  # id of the request whose completion the client got
    shadow: str  # the canary's name
    adapter_sha256: str | None
    finish_reason: str  # stop, length, deadline or error
    milliseconds: float  # duration of the canary's answer
    completion_tokens: int
    agreed: bool  # equal to the client's answer, except for case, whitespace and a final period
    token_f1: float  # token F1 with the client's answer as reference
    mean_logprob: float | None  # mean log probability of the canary's tokens, in nats; None: it generated no tokens
    answer: str | None = None
    answer_sha256: str | None = None

    def to_json(self) -> dict[str, Any]:
        return _without_absent_texts(asdict(self))


@dataclass(frozen=True)
class LoggedFeedback(JsonDataclass):
    """A user's feedback on a completion, in the request log. A line with `rating` is feedback."""

    time: str  # ISO 8601, UTC
    request_id: str  # id of the completion's request
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
