"""Schemas of requests and responses, except OpenAI's (`openai/protocol.py`). Names and defaults are from gpt2core."""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema
from pydantic_core import PydanticCustomError

from bentos.errors import ServiceError
from bentos.limits import (
    MAX_BIASES,
    MAX_COMMENT,
    MAX_CORRECTION,
    MAX_GUIDED_CHOICES,
    MAX_STOP_LENGTH,
    MAX_STOP_TOKENS,
    MAX_STOPS,
)
from gpt2core.config import GenerationConfig
from gpt2core.types import NAME

DEFAULTS = GenerationConfig()
TUNED = NAME  # the base with the run's adapter; the default model
BASE = "base"


def _whole_number(value: Any) -> Any:
    """Accept 3.0 as an integer: JSON has only one type of numbers."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


WHOLE = BeforeValidator(_whole_number)
# In the served OpenAPI document, `set_limits` replaces names like "n_positions" by the model's numbers.
MaxTokens = Annotated[int, Field(ge=1, json_schema_extra={"maximum": "n_positions"}), WHOLE]
Token = Annotated[int, Field(ge=0, json_schema_extra={"exclusiveMaximum": "vocab_size"}), WHOLE]
Bias = Annotated[float, Field(ge=-100, le=100)]
TOKEN_KEY = r"^[0-9]{1,9}$"  # noqa: S105 (of token ids)
LogitBias = Annotated[
    dict[Annotated[str, Field(pattern=TOKEN_KEY)], Bias],
    Field(max_length=MAX_BIASES),
    WithJsonSchema(
        {
            "type": "object",
            "maxProperties": MAX_BIASES,
            "patternProperties": {TOKEN_KEY: {"type": "number", "minimum": -100, "maximum": 100}},
            "additionalProperties": False,
        }
    ),
]
Penalty = Annotated[float, Field(ge=-2, le=2)]
Text = Annotated[str, Field(min_length=1)]
Stop = Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH)]
Stops = Stop | Annotated[list[Stop], Field(max_length=MAX_STOPS)]
# Report one error for a list of a million invalid items: a million errors would block the event loop for seconds.
FAIL_FAST = Field(fail_fast=True)
NEUTRAL: tuple[Any, ...] = (None, False, 0, "", [], {})


def neutral(value: Any) -> Any:
    if value not in NEUTRAL:  # this error is four times as fast as ValueError: a body may have 100,000 such fields
        raise PydanticCustomError("unsupported", "this field is not supported; leave it out, or send null")
    return value


Unsupported = Annotated[Any, AfterValidator(neutral), WithJsonSchema({"enum": [*NEUTRAL]})]


class LenientRequest(BaseModel):
    """Checks types strictly. Unknown fields are accepted if their value is one of `NEUTRAL`."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)
    __pydantic_extra__: dict[str, Unsupported]


class Sampling(BaseModel):
    """The sampling parameters of `GenerationConfig` that every route has, with the same names. Null: the default."""

    temperature: Annotated[float, Field(ge=0)] | None = Field(DEFAULTS.temperature, description="0: greedy")
    top_k: Annotated[int, Field(ge=1), WHOLE] | None = DEFAULTS.top_k
    top_p: Annotated[float, Field(gt=0, le=1)] | None = DEFAULTS.top_p
    min_p: Annotated[float, Field(ge=0, le=1)] | None = DEFAULTS.min_p
    seed: Annotated[int, Field(ge=0, lt=2**63), WHOLE] | None = DEFAULTS.seed
    repetition_penalty: Annotated[float, Field(ge=0.1, le=10)] | None = DEFAULTS.repetition_penalty
    presence_penalty: Penalty | None = DEFAULTS.presence_penalty
    frequency_penalty: Penalty | None = DEFAULTS.frequency_penalty
    logit_bias: LogitBias | None = Field(None, description="by token id; see /tokenize")
    stop_token_ids: Annotated[list[Token], Field(max_length=MAX_STOP_TOKENS)] | None = None
    ignore_eos: bool | None = DEFAULTS.ignore_eos
    min_tokens: Annotated[int, Field(ge=0), WHOLE] | None = Field(
        DEFAULTS.min_tokens,
        description="stop conditions are ignored before this number of tokens; at most the token limit",
    )

    def sampling(self) -> dict[str, Any]:
        """Return the arguments of `GenerationConfig`."""
        values = {name: getattr(self, name) for name in Sampling.model_fields}
        if self.logit_bias is not None:
            values["logit_bias"] = {int(token): bias for token, bias in self.logit_bias.items()}
        return {name: value for name, value in values.items() if value is not None}


@dataclass(frozen=True)
class Structure:
    """The structure that a completion must match, and the field of the request that defines it."""

    kind: Literal["json", "regex", "choice"]
    value: Any  # a JSON schema or its text; a regex; a list of texts
    param: str


class ResponseFormat(BaseModel):
    """OpenAI's `response_format`. `json_schema` contains the schema in its field `schema`."""

    model_config = ConfigDict(extra="forbid", strict=True)

    type: Literal["text", "json_object", "json_schema"]
    json_schema: dict[str, Any] | None = None
    object_schema: dict[str, Any] | None = Field(
        None, alias="schema", description="llama.cpp's and Together's form: the schema of a json_object"
    )


Choices = Annotated[list[Text], Field(min_length=1, max_length=MAX_GUIDED_CHOICES)]


class StructuredOutputs(LenientRequest):
    """vLLM's `structured_outputs`, which replaces the fields `guided_*`."""

    json_: dict[str, Any] | str | None = Field(None, alias="json", description="a JSON schema, or its text")
    regex: Text | None = None
    choice: Choices | None = None
    json_object: bool | None = Field(None, description="true: a JSON object")
    disable_fallback: bool | None = Field(None, description="ignored: there is no fallback")
    disable_any_whitespace: bool | None = Field(None, description="ignored: JSON has Python's whitespace")

    def structures(self) -> list[Structure]:
        name = "structured_outputs"
        possible = [
            Structure("json", self.json_, name),
            Structure("json", {"type": "object"} if self.json_object else None, name),
            Structure("regex", self.regex, name),
            Structure("choice", self.choice, name),
        ]
        return [one for one in possible if one.value is not None]


class Structured(BaseModel):
    """The fields that request structured output. At most one of them may be given."""

    response_format: ResponseFormat | None = None
    guided_json: dict[str, Any] | str | None = Field(None, description="a JSON schema, or its text")
    guided_regex: Text | None = None
    guided_choice: Choices | None = None
    structured_outputs: StructuredOutputs | None = None

    def structure(self) -> Structure | None:
        """
        Raises:
            ServiceError: two of the fields are given, or one together with a parameter that could cut the text short.
        """
        possible = [
            Structure("json", self._schema(), "response_format"),
            Structure("json", self.guided_json, "guided_json"),
            Structure("regex", self.guided_regex, "guided_regex"),
            Structure("choice", self.guided_choice, "guided_choice"),
            *(self.structured_outputs.structures() if self.structured_outputs else []),
        ]
        found = [one for one in possible if one.value is not None]
        if not found:
            return None
        others = [
            name for name in ("stop", "stop_token_ids", "min_tokens", "echo") if _is_set(getattr(self, name, None))
        ]
        for name in [one.param for one in found[1:]] + others:
            reason = "only one of its fields" if name == found[0].param else f"not together with {found[0].param}"
            raise ServiceError("invalid_request", f"{name}: {reason}", name)
        return found[0]

    def _schema(self) -> dict[str, Any] | None:
        form = self.response_format
        if form is None or form.type == "text":
            return None
        if form.type == "json_object":
            return {"type": "object"} if form.object_schema is None else form.object_schema
        schema = (form.json_schema or {}).get("schema")
        if not isinstance(schema, dict):
            message = "response_format: json_schema must be an object with the schema in its field schema"
            raise ServiceError("invalid_request", message, "response_format")
        return schema


def _is_set(value: Any) -> bool:
    """Whether a parameter has an effect: empty stop strings have none."""
    return any(one != "" for one in value) if isinstance(value, list) else bool(value)


class StrictRequest(BaseModel):
    """Checks types strictly (neither true nor "0.5" is a number) and rejects unknown fields."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class PredictRequest(StrictRequest, Sampling, Structured):
    """An instruction, and how to decode the answer. Null means the default."""

    instruction: str = Field(pattern=r"\S", description="not blank")
    input: str | None = ""
    max_new_tokens: MaxTokens | None = DEFAULTS.max_new_tokens
    stop: Stops | None = Field(default=[], description="the answer ends before the first of these")
    stream: bool | None = Field(
        False, description="server-sent events with new text of the answer each; [DONE] at the end"
    )
    adapter: str | None = Field(TUNED, description="a name of /v1/models")


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class AdapterVersion(BaseModel):
    name: str
    sha256: str = Field(description="digest of its files, as in lineage.json")


class PredictResponse(BaseModel):
    answer: str
    finish_reason: Literal["stop", "length"] = Field(
        description="stop: end of text or a stop string; length: token limit"
    )
    usage: Usage
    model: str = Field(description="the Bento's tag; /metadata describes its content")
    adapter: AdapterVersion | None = Field(description="null: the base model alone")


class Envelope(BaseModel):
    """A response as mariovas3/llms sends it; the HTTP status is the same."""

    statusCode: int
    headers: dict[str, str]
    body: str = Field(description="JSON: the response, or the error")


AdapterName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]


class LoadAdapterRequest(StrictRequest):
    """A request to load an adapter. Route and fields have vLLM's names."""

    lora_name: AdapterName
    lora_path: str = Field(min_length=1, description="a directory below the server's GPT2_ADAPTERS_DIR")
    load_inplace: bool | None = Field(None, description="ignored: an adapter of this name is always replaced")
    base_model_name: str | None = Field(None, description="ignored: the adapter's digest of its base is checked")


class UnloadAdapterRequest(StrictRequest):
    lora_name: str
    lora_int_id: int | None = Field(None, description="ignored: names identify adapters")


class CanaryRequest(StrictRequest):
    adapter: AdapterName
    share: float = Field(ge=0, le=1, description="share of the requests for the default model; 1: all requests")
    shadow: bool = Field(False, description="the canary only repeats requests; clients get the default model's answers")


class CanaryArm(BaseModel):
    """The completions of one version since the canary started.

    Counts requests for the default model and requests that name the version.
    """

    adapter: AdapterVersion
    completed: int = 0
    failed: int = 0
    mean_seconds: Annotated[float, Field(description="mean duration of completed requests, queueing included")] = 0.0
    variance: Annotated[float, Field(description="variance of these durations, in seconds squared")] = 0.0


class ShadowStatus(BaseModel):
    """The canary's answers compared with those that clients got, since it started in shadow mode."""

    compared: int = 0
    agreed: Annotated[int, Field(description="equal except for case, whitespace and a final period")] = 0
    mean_token_f1: float = 0.0
    mean_logprob: Annotated[float, Field(description="of the canary's tokens, in nats; mean over its answers")] = 0.0
    dropped: Annotated[int, Field(description="requests that the canary did not repeat, because too many waited")] = 0


class CanaryStatus(BaseModel):
    canary: CanaryRequest | None
    versions: list[CanaryArm] = Field(description="the default model's own, and the canary's")
    shadow: ShadowStatus | None = Field(description="null: not in shadow mode")


class FeedbackRequest(StrictRequest):
    """A user's feedback on a completion."""

    request_id: str = Field(
        pattern=r"^[A-Za-z0-9_.-]{1,80}$", description="X-Request-Id of the response, or id of an OpenAI response"
    )
    rating: Literal["good", "bad"]
    correction: str | None = Field(
        None, pattern=r"\S", max_length=MAX_CORRECTION, description="what the answer should have been; not blank"
    )
    comment: str | None = Field(None, max_length=MAX_COMMENT)


class FeedbackResponse(BaseModel):
    request_id: str
    rating: Literal["good", "bad"]


class Error(BaseModel):
    type: str
    message: str
    param: str | None = Field(description="the field of the request that is wrong")
    code: str


class ErrorResponse(BaseModel):
    """The body of every error."""

    error: Error
