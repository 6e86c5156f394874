"""What goes over the wire. Names are gpt2core's; so are the defaults."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from gpt2core.config import GenerationConfig

DEFAULTS = GenerationConfig()
TUNED = "gpt2-instruct"  # the base with the run's adapter: what answers unless another is asked for
BASE = "base"
MAX_STOPS = 16
MAX_PROMPTS = MAX_CHOICES = 8  # of one request to the OpenAI routes: together, what the queue holds


def _whole(value: Any) -> Any:
    """JSON has one kind of number, so 3.0 is an integer too."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _no_number(value: Any) -> Any:
    if not isinstance(value, bool):  # 0 is equal to False, but is another thing
        raise ValueError("Input should be a valid boolean")
    return value


WHOLE = BeforeValidator(_whole)
Never = Annotated[Literal[False], BeforeValidator(_no_number)]
TopK = Annotated[int, Field(ge=1), WHOLE]
Seed = Annotated[int, Field(ge=0, lt=2**63), WHOLE]
# The served schema has numbers in place of these names of the model's limits.
MaxTokens = Annotated[int, Field(ge=1, json_schema_extra={"maximum": "n_positions"}), WHOLE]
Stop = Annotated[str, Field(min_length=1)]
Stops = Stop | Annotated[list[Stop], Field(max_length=MAX_STOPS)]


class StrictRequest(BaseModel):
    """Types are strict: true is no number, and "0.5" is none either. What is not known is refused."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class PredictRequest(StrictRequest):
    """An instruction, and how to decode its answer."""

    instruction: str = Field(pattern=r"\S", description="not blank")
    input: str = ""
    max_new_tokens: MaxTokens = DEFAULTS.max_new_tokens
    temperature: float = Field(DEFAULTS.temperature, ge=0, description="0: greedy")
    top_k: TopK | None = DEFAULTS.top_k
    top_p: float | None = Field(DEFAULTS.top_p, gt=0, le=1)
    seed: Seed | None = DEFAULTS.seed
    stop: Stops = Field(default=[], description="the answer ends before the first of these")
    stream: bool = Field(False, description="server-sent events, each with new text of the answer; [DONE] at the end")
    adapter: str = Field(TUNED, description="one of /v1/models")


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class AdapterVersion(BaseModel):
    name: str
    sha256: str = Field(description="over its files, as lineage.json has it")


class PredictResponse(BaseModel):
    answer: str
    finish_reason: Literal["stop", "length"] = Field(description="end of text or a stop; or no room for more tokens")
    usage: Usage
    model: str = Field(description="the Bento's tag; /metadata says what is in it")
    adapter: AdapterVersion | None = Field(description="null: the base model alone")


class Envelope(BaseModel):
    """What the system before this one answered with; the HTTP status is the same."""

    statusCode: int
    headers: dict[str, str]
    body: str = Field(description="JSON: the answer, or the error")


class Error(BaseModel):
    type: str
    message: str
    param: str | None = Field(description="the field of the request that is wrong")


class ErrorResponse(BaseModel):
    """The one shape of every error."""

    error: Error


Token = Annotated[int, Field(ge=0, json_schema_extra={"exclusiveMaximum": "vocab_size"}), WHOLE]
Tokens = Annotated[list[Token], Field(min_length=1, json_schema_extra={"maxItems": "n_prompt"})]
Text = Annotated[str, Field(min_length=1)]
Texts = Annotated[list[Text], Field(min_length=1, max_length=MAX_PROMPTS)]
ManyTokens = Annotated[list[Tokens], Field(min_length=1, max_length=MAX_PROMPTS)]
# what may be said in only one way, as this server has no other
Zero = Annotated[float, Field(ge=0, le=0)] | None
Nothing = Annotated[dict[str, Any], Field(max_length=0)] | None


class StreamOptions(StrictRequest):
    include_usage: bool = False
    include_obfuscation: bool = False


def _only_with(name: str, other: str) -> dict[str, Any]:
    """In the schema: `name` is null unless `other` is true."""
    null, true = {"properties": {name: {"type": "null"}}}, {"properties": {other: {"const": True}}, "required": [other]}
    return {"anyOf": [null, true]}


class OpenAIRequest(StrictRequest):
    """What both routes have. A null is as good as nothing, as clients send it so."""

    model_config = ConfigDict(json_schema_extra={"allOf": [_only_with("stream_options", "stream")]})

    model: str = TUNED
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES), WHOLE] | None = 1
    temperature: float | None = Field(DEFAULTS.temperature, ge=0, description="0: greedy, and the default here")
    top_k: TopK | None = Field(DEFAULTS.top_k, description="not OpenAI's")
    top_p: float | None = Field(DEFAULTS.top_p, gt=0, le=1)
    seed: Seed | None = Field(DEFAULTS.seed, description="of the first choice; the next has the next")
    stop: Stops | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = Field(None, description="only with stream")
    user: str | None = None
    frequency_penalty: Zero = None
    presence_penalty: Zero = None
    logit_bias: Nothing = None


class CompletionRequest(OpenAIRequest):
    """Goes on from a text as it is. An answer to an instruction is what /v1/chat/completions gives."""

    prompt: Text | Tokens | Texts | ManyTokens
    max_tokens: MaxTokens | None = DEFAULTS.max_new_tokens
    logprobs: Annotated[int, Field(ge=0, le=5), WHOLE] | None = None
    best_of: Annotated[int, Field(ge=1, le=1), WHOLE] | None = None
    echo: Never | None = None
    suffix: None = None


class TextPart(StrictRequest):
    type: Literal["text"]
    text: str


class Message(StrictRequest):
    role: Literal["system", "developer", "user"]
    content: str | Annotated[list[TextPart], Field(min_length=1)]
    name: str | None = None

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


def _turns() -> dict[str, Any]:
    """In the schema: a user's message, or one after a system message; the first is not blank."""
    part = {"required": ["text"], "properties": {"text": {"pattern": r"\S"}}}
    said = {"anyOf": [{"type": "string", "pattern": r"\S"}, {"type": "array", "contains": part}]}

    def first(*roles: str) -> dict[str, Any]:
        return {"properties": {"role": {"enum": roles}, "content": said}}

    user, system = first("user"), first("system", "developer")
    one = {"prefixItems": [user], "maxItems": 1}
    two = {"prefixItems": [system, {"properties": {"role": {"const": "user"}}}], "minItems": 2}
    return {"anyOf": [one, two]}


_SAME = ("max_tokens", "max_completion_tokens")


class ChatRequest(OpenAIRequest):
    """One turn. A user's message is the instruction; after a system message, that is, and the user's is its input."""

    model_config = ConfigDict(
        json_schema_extra={
            "allOf": [
                _only_with("stream_options", "stream"),
                _only_with("top_logprobs", "logprobs"),
                {
                    "anyOf": [
                        {"properties": {name: {"type": "null"}}} for name in ("max_tokens", "max_completion_tokens")
                    ]
                },
            ]
        }
    )

    messages: list[Message] = Field(min_length=1, max_length=2, json_schema_extra=_turns())
    max_tokens: MaxTokens | None = None
    max_completion_tokens: MaxTokens | None = Field(None, description="max_tokens by its newer name")
    logprobs: bool | None = False
    top_logprobs: Annotated[int, Field(ge=0, le=20), WHOLE] | None = Field(None, description="only with logprobs")
    response_format: dict[Literal["type"], Literal["text"]] | None = None
    tools: Annotated[list[Any], Field(max_length=0)] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None
    metadata: dict[str, str] | None = None
    store: Never | None = None


class LoadAdapterRequest(StrictRequest):
    """Names and fields are vLLM's."""

    lora_name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
    lora_path: str = Field(min_length=1, description="a directory below the server's GPT2_ADAPTERS_DIR")


class UnloadAdapterRequest(StrictRequest):
    lora_name: str


def operation(model: type[BaseModel], stream: bool = False) -> dict[str, Any]:
    """What the schema says of a body that FastAPI does not read, and of an answer that may be a stream."""
    schema = model.model_json_schema()
    body = {"required": True, "content": {"application/json": {"schema": _without_refs(schema, schema)}}}
    event = {"type": "object", "properties": {"data": {"type": "string", "description": "JSON; the last is [DONE]"}}}
    ok = {"responses": {"200": {"content": {"text/event-stream": {"schema": event}}}}} if stream else {}
    return {"requestBody": body, **ok}


def set_limits(schema: Any, limits: dict[str, int]) -> None:
    """Numbers in place of the names of bentos/schemas.py."""
    for key, value in schema.items() if isinstance(schema, dict) else enumerate(schema):
        if isinstance(value, dict | list):
            set_limits(value, limits)
        elif key in ("maximum", "exclusiveMaximum", "maxItems"):
            schema[key] = limits.get(value, value)


def _without_refs(schema: Any, root: dict[str, Any]) -> Any:
    """The models that are referred to, in place: references are to the document's root, which this is not."""
    if isinstance(schema, list):
        return [_without_refs(one, root) for one in schema]
    if not isinstance(schema, dict):
        return schema
    if "$ref" in schema:
        return _without_refs(root["$defs"][schema["$ref"].rpartition("/")[2]], root)
    return {key: _without_refs(value, root) for key, value in schema.items() if key != "$defs"}
