"""Requests of the OpenAI API as this service accepts them.

https://platform.openai.com/docs/api-reference/completions and .../chat. A null is the same as an absent field, since
clients send both.
"""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field

from bentos.limits import MAX_CHOICES, MAX_PROMPTS
from bentos.schemas import DEFAULTS, TUNED, WHOLE, MaxTokens, Seed, Stops, StrictRequest, TopK


def _boolean(value: Any) -> Any:
    if not isinstance(value, bool):  # Literal[False] alone would accept 0
        raise ValueError("Input should be a valid boolean")
    return value


Never = Annotated[Literal[False], BeforeValidator(_boolean)]
Token = Annotated[int, Field(ge=0, json_schema_extra={"exclusiveMaximum": "vocab_size"}), WHOLE]
Tokens = Annotated[list[Token], Field(min_length=1, json_schema_extra={"maxItems": "n_prompt"})]
Text = Annotated[str, Field(min_length=1)]
Texts = Annotated[list[Text], Field(min_length=1, max_length=MAX_PROMPTS)]
ManyTokens = Annotated[list[Tokens], Field(min_length=1, max_length=MAX_PROMPTS)]
# fields of OpenAI's whose only supported value is the neutral one
Zero = Annotated[float, Field(ge=0, le=0)] | None
Nothing = Annotated[dict[str, Any], Field(max_length=0)] | None


class StreamOptions(StrictRequest):
    include_usage: bool = False
    include_obfuscation: bool = False


def _only_with(name: str, other: str) -> dict[str, Any]:
    """Schema: `name` is null unless `other` is true."""
    null, true = {"properties": {name: {"type": "null"}}}, {"properties": {other: {"const": True}}, "required": [other]}
    return {"anyOf": [null, true]}


class OpenAIRequest(StrictRequest):
    """The fields that both routes have."""

    model_config = ConfigDict(json_schema_extra={"allOf": [_only_with("stream_options", "stream")]})

    model: str = TUNED
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES), WHOLE] | None = 1
    temperature: float | None = Field(DEFAULTS.temperature, ge=0, description="0: greedy, the default here")
    top_k: TopK | None = Field(DEFAULTS.top_k, description="not OpenAI's")
    top_p: float | None = Field(DEFAULTS.top_p, gt=0, le=1)
    seed: Seed | None = Field(DEFAULTS.seed, description="of the first choice; each further choice adds one")
    stop: Stops | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = Field(None, description="only with stream")
    user: str | None = None
    frequency_penalty: Zero = None
    presence_penalty: Zero = None
    logit_bias: Nothing = None


class CompletionRequest(OpenAIRequest):
    """Continues a text. /v1/chat/completions answers an instruction."""

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
    """Schema: a user's message, or one after a system message; the first is not blank."""
    part = {"required": ["text"], "properties": {"text": {"pattern": r"\S"}}}
    not_blank = {"anyOf": [{"type": "string", "pattern": r"\S"}, {"type": "array", "contains": part}]}

    def first(*roles: str) -> dict[str, Any]:
        return {"properties": {"role": {"enum": roles}, "content": not_blank}}

    user, system = first("user"), first("system", "developer")
    one = {"prefixItems": [user], "maxItems": 1}
    two = {"prefixItems": [system, {"properties": {"role": {"const": "user"}}}], "minItems": 2}
    return {"anyOf": [one, two]}


_MAX_TOKENS_NAMES = ("max_tokens", "max_completion_tokens")


class ChatRequest(OpenAIRequest):
    """One turn. A user's message is the instruction; after a system message, that is, and the user's is its input."""

    model_config = ConfigDict(
        json_schema_extra={
            "allOf": [
                _only_with("stream_options", "stream"),
                _only_with("top_logprobs", "logprobs"),
                {"anyOf": [{"properties": {name: {"type": "null"}}} for name in _MAX_TOKENS_NAMES]},
            ]
        }
    )

    messages: list[Message] = Field(min_length=1, max_length=2, json_schema_extra=_turns())
    max_tokens: MaxTokens | None = None
    max_completion_tokens: MaxTokens | None = Field(None, description="the newer name of max_tokens")
    logprobs: bool | None = False
    top_logprobs: Annotated[int, Field(ge=0, le=20), WHOLE] | None = Field(None, description="only with logprobs")
    response_format: dict[Literal["type"], Literal["text"]] | None = None
    tools: Annotated[list[Any], Field(max_length=0)] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None
    metadata: dict[str, str] | None = None
    store: Never | None = None
