"""Requests of the OpenAI API as this service accepts them.

https://platform.openai.com/docs/api-reference/completions and .../chat. Every documented field is here. A field that is
null, or has the value that OpenAI documents as its default, has no effect; a value that requests an unsupported feature
is an error that names the field. Fields that OpenAI does not document are ignored if their value is neutral (null,
false, 0, "", [], {}).
"""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo

from bentos.limits import MAX_CHOICES, MAX_PROMPTS, MAX_STOP_LENGTH, MAX_STOPS
from bentos.schemas import (
    DEFAULTS,
    FAIL_FAST,
    NEUTRAL,
    TUNED,
    WHOLE,
    LenientRequest,
    Sampling,
    Structured,
    Token,
    Unsupported,
)


def _boolean(value: Any) -> Any:
    if value is not None and not isinstance(value, bool):  # a Literal alone accepts 0 for False and 1 for True
        raise ValueError("Input should be a valid boolean")
    return value


# Fields with one supported value
MustBeOne = Annotated[float, Field(ge=1, le=1)] | None
MustBeFalse = Annotated[Literal[False] | None, BeforeValidator(_boolean)]
MustBeTrue = Annotated[Literal[True] | None, BeforeValidator(_boolean)]
IgnoredLabel = Any  # labels for the sender's use, without influence on the completion

StopOrEmpty = Annotated[str, Field(max_length=MAX_STOP_LENGTH)]
MaxTokens = Annotated[int, Field(ge=1), WHOLE]  # capped at the context length
Tokens = Annotated[list[Token], Field(min_length=1, json_schema_extra={"maxItems": "n_prompt"}), FAIL_FAST]
Texts = Annotated[list[str], Field(min_length=1, max_length=MAX_PROMPTS), FAIL_FAST]
ManyTokens = Annotated[list[Tokens], Field(min_length=1, max_length=MAX_PROMPTS), FAIL_FAST]


# Libraries request JSON with tools by default, so this error names the field that works.
NO_TOOLS = "the model cannot call tools; leave this field out, and for JSON of a schema send response_format"


def _tool_choice(value: Any) -> Any:
    if value not in (None, "none", "auto"):
        raise ValueError(NO_TOOLS)
    return value


def _tools(choice: str) -> AfterValidator:
    """Accept only neutral values unless the earlier field `choice` is "none": then the client expects plain text."""

    def check(value: Any, info: ValidationInfo) -> Any:
        if value not in NEUTRAL and info.data.get(choice) != "none":
            raise ValueError(NO_TOOLS)
        return value

    return AfterValidator(check)


ToolChoice = Annotated[Literal["none", "auto"] | None, BeforeValidator(_tool_choice)]


class StreamOptions(LenientRequest):
    include_usage: bool | None = False
    continuous_usage_stats: bool | None = Field(
        False, description="vLLM's: with include_usage, each event has the token counts so far"
    )
    include_obfuscation: bool | None = Field(False, description="ignored: only the lengths of events differ")


def _only_with(name: str, other: str, neutral: dict[str, Any], value: Any = True) -> dict[str, Any]:
    """JSON schema: `name` must be neutral unless `other` has the value."""
    nothing = {"properties": {name: neutral}}
    return {"anyOf": [nothing, {"properties": {other: {"const": value}}, "required": [other]}]}


_WITH_USAGE = {"type": "object", "properties": {"include_usage": {"const": True}}, "required": ["include_usage"]}
_STREAM_OPTIONS = _only_with("stream_options", "stream", {"not": _WITH_USAGE})


class OpenAIRequest(LenientRequest, Sampling, Structured):
    """The fields that /v1/completions and /v1/chat/completions share."""

    model_config = ConfigDict(json_schema_extra={"allOf": [_STREAM_OPTIONS]})

    model: str | None = Field(TUNED, description="a name of /v1/models")
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES), WHOLE] | None = 1
    top_p: Annotated[float, Field(ge=0, le=1)] | None = Field(DEFAULTS.top_p, description="0: greedy")
    top_k: Annotated[int, Field(ge=-1), WHOLE] | None = Field(DEFAULTS.top_k, description="0 and -1: no limit")
    seed: Annotated[int, WHOLE] | None = Field(DEFAULTS.seed, description="each further choice adds one")
    stop: StopOrEmpty | Annotated[list[StopOrEmpty], Field(max_length=MAX_STOPS)] | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = Field(None, description="include_usage: only with stream")
    user: IgnoredLabel = None
    # fields of other servers' APIs, which their clients send
    length_penalty: MustBeOne = None
    repeat_penalty: MustBeOne = None
    typical_p: MustBeOne = None
    skip_special_tokens: MustBeTrue = None
    spaces_between_special_tokens: MustBeTrue = None
    add_special_tokens: bool | None = Field(None, description="ignored: prompts never contain special tokens")
    truncate_prompt_tokens: Annotated[int, Field(ge=-1, le=0), WHOLE] | None = Field(None, description="-1: no limit")
    include_reasoning: bool | None = Field(None, description="ignored: completions have no reasoning")
    cache_prompt: bool | None = Field(None, description="ignored: prefixes are always cached")
    chat_id: IgnoredLabel = None
    session_id: IgnoredLabel = None
    conversation_id: IgnoredLabel = None
    request_id: IgnoredLabel = None

    def seeds(self) -> list[int | None]:
        """Return the seed of each of the `n` choices."""
        return [None if self.seed is None else (self.seed + choice) % 2**63 for choice in range(self.n or 1)]

    def sampling(self) -> dict[str, Any]:
        """Return the arguments of `GenerationConfig` for the first choice. Some values have OpenAI's meaning."""
        values = super().sampling()
        if self.top_p == 0:  # the smallest set of tokens that reaches probability 0 is the most likely token
            values |= {"temperature": 0.0, "top_p": None}
        if self.top_k is not None and self.top_k < 1:
            values["top_k"] = None
        if self.seed is not None:
            values["seed"] = self.seeds()[0]
        return values


class CompletionRequest(OpenAIRequest):
    """Continues a text. /v1/chat/completions answers an instruction."""

    prompt: str | Tokens | Texts | ManyTokens | None = Field(None, description='null and "": end of text')
    max_tokens: Annotated[int, Field(ge=0), WHOLE] | None = Field(
        DEFAULTS.max_new_tokens, description="0: the prompt alone, with echo"
    )
    logprobs: Annotated[int, Field(ge=0, le=5), WHOLE] | None = None
    best_of: Annotated[int, Field(ge=1), WHOLE] | None = Field(None, description="1, or n: all are returned")
    echo: bool | None = False
    suffix: Unsupported = None


class Message(BaseModel):
    """A turn of the conversation. Only the last turn must be text."""

    model_config = ConfigDict(extra="allow", strict=True)

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: Any = None

    @property
    def text(self) -> str | None:
        """Return the text; None if the content is neither a string nor a list of text parts."""
        if isinstance(self.content, str):
            return self.content
        parts = self.content if isinstance(self.content, list) else [None]
        typed = [part for part in parts if isinstance(part, dict) and part.get("type") == "text"]
        texts = [text for part in typed if isinstance(text := part.get("text"), str)]
        return "".join(texts) if len(texts) == len(parts) else None


_NOT_BLANK = {"type": "string", "pattern": r"\S"}
_TEXT_PART = {
    "type": "object",
    "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
    "required": ["type", "text"],
}
_TEXT_PARTS = {"type": "array", "items": _TEXT_PART, "contains": {"properties": {"text": {"pattern": r"\S"}}}}
_USER_TURN: dict[str, Any] = {
    "properties": {"role": {"const": "user"}, "content": {"anyOf": [_NOT_BLANK, _TEXT_PARTS]}},
    "required": ["role", "content"],
}


class ChatRequest(OpenAIRequest):
    """A conversation. The last message must be the user's; it is the instruction."""

    model_config = ConfigDict(
        json_schema_extra={
            "allOf": [
                _STREAM_OPTIONS,
                _only_with("top_logprobs", "logprobs", {"anyOf": [{"type": "null"}, {"const": 0}]}),
                _only_with("tools", "tool_choice", {"enum": [*NEUTRAL]}, "none"),
                _only_with("functions", "function_call", {"enum": [*NEUTRAL]}, "none"),
            ]
        }
    )

    messages: Annotated[list[Message], FAIL_FAST] = Field(min_length=1, json_schema_extra={"contains": _USER_TURN})
    max_tokens: MaxTokens | None = None
    max_completion_tokens: MaxTokens | None = Field(None, description="the newer name of max_tokens; it has precedence")
    logprobs: bool | None = False
    top_logprobs: Annotated[int, Field(ge=0, le=20), WHOLE] | None = Field(None, description="only with logprobs")
    modalities: Annotated[list[Literal["text"]], FAIL_FAST] | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = Field(
        None, description="ignored: completions have no reasoning"
    )
    verbosity: Literal["medium"] | None = None
    tool_choice: ToolChoice = None
    tools: Annotated[Any, _tools("tool_choice")] = None
    parallel_tool_calls: bool | None = None
    function_call: ToolChoice = None
    functions: Annotated[Any, _tools("function_call")] = None
    audio: Unsupported = None
    prediction: Unsupported = None
    web_search_options: None = None  # {} requests a search
    store: MustBeFalse = None
    metadata: IgnoredLabel = None
    service_tier: IgnoredLabel = None
    safety_identifier: IgnoredLabel = None
    prompt_cache_key: IgnoredLabel = None
    prompt_cache_retention: IgnoredLabel = None
    add_generation_prompt: MustBeTrue = None
    chat_template_kwargs: LenientRequest | None = None


class TokenizeRequest(LenientRequest):
    """Exactly one of `prompt` and `messages`.

    `add_special_tokens` is accepted and ignored: prompts never contain special tokens.
    """

    model: str | None = TUNED
    prompt: str | None = None
    messages: Annotated[list[Message], Field(min_length=1), FAIL_FAST] | None = None
    add_special_tokens: bool | None = True
    add_generation_prompt: MustBeTrue = None
    return_token_strs: bool | None = False


class DetokenizeRequest(LenientRequest):
    model: str | None = TUNED
    tokens: Annotated[list[Token], FAIL_FAST]
