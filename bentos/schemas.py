"""What goes over the wire. Names are gpt2core's; so are the defaults."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from gpt2core.config import GenerationConfig

DEFAULTS = GenerationConfig()
TUNED = "gpt2-instruct"  # the base with the run's adapter: what answers unless another is asked for
BASE = "base"
MAX_STOPS = 16
MAX_CHOICES = 16  # of one request to the OpenAI routes

Stop = Annotated[str, Field(min_length=1)]
Stops = Stop | Annotated[list[Stop], Field(max_length=MAX_STOPS)]


class StrictRequest(BaseModel):
    """Types are strict: true is no number, and "0.5" is none either. What is not known is refused."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class PredictRequest(StrictRequest):
    """An instruction, and how to decode its answer."""

    instruction: str = Field(pattern=r"\S", description="not blank")
    input: str = ""
    max_new_tokens: int = Field(DEFAULTS.max_new_tokens, ge=1)
    temperature: float = Field(DEFAULTS.temperature, ge=0, description="0: greedy")
    top_k: int | None = Field(DEFAULTS.top_k, ge=1)
    top_p: float | None = Field(DEFAULTS.top_p, gt=0, le=1)
    seed: int | None = Field(DEFAULTS.seed, ge=0, lt=2**63)
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


class Error(BaseModel):
    type: str
    message: str
    param: str | None = Field(description="the field of the request that is wrong")


class ErrorResponse(BaseModel):
    """The one shape of every error."""

    error: Error


Token = Annotated[int, Field(ge=0)]
Text = Annotated[str, Field(min_length=1)]
# what may be said in only one way, as this server has no other
Zero = Annotated[float, Field(ge=0, le=0)] | None
Nothing = Annotated[dict[str, Any], Field(max_length=0)] | None


class StreamOptions(StrictRequest):
    include_usage: bool = False
    include_obfuscation: bool = False


class OpenAIRequest(StrictRequest):
    """What both routes have. A null is as good as nothing, as clients send it so."""

    model: str = TUNED
    n: int | None = Field(1, ge=1, le=MAX_CHOICES)
    temperature: float | None = Field(DEFAULTS.temperature, ge=0, description="0: greedy, and the default here")
    top_k: int | None = Field(DEFAULTS.top_k, ge=1, description="not OpenAI's")
    top_p: float | None = Field(DEFAULTS.top_p, gt=0, le=1)
    seed: int | None = Field(DEFAULTS.seed, ge=0, lt=2**63, description="of the first choice; the next has the next")
    stop: Stops | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = Field(None, description="only with stream")
    user: str | None = None
    frequency_penalty: Zero = None
    presence_penalty: Zero = None
    logit_bias: Nothing = None


class CompletionRequest(OpenAIRequest):
    """Goes on from a text as it is. An answer to an instruction is what /v1/chat/completions gives."""

    prompt: Text | Annotated[list[Text] | list[Token] | list[list[Token]], Field(min_length=1, max_length=2048)]
    max_tokens: int | None = Field(DEFAULTS.max_new_tokens, ge=1)
    logprobs: int | None = Field(None, ge=0, le=5)
    best_of: Annotated[int, Field(ge=1, le=1)] | None = None
    echo: Literal[False] | None = None
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


class ChatRequest(OpenAIRequest):
    """One turn. A user's message is the instruction; after a system message, that is, and the user's is its input."""

    messages: list[Message] = Field(min_length=1, max_length=2)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1, description="max_tokens by its newer name")
    logprobs: bool | None = False
    top_logprobs: int | None = Field(None, ge=0, le=20, description="only with logprobs")
    response_format: dict[Literal["type"], Literal["text"]] | None = None
    tools: Annotated[list[Any], Field(max_length=0)] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None
    metadata: dict[str, str] | None = None
    store: Literal[False] | None = None


class LoadAdapterRequest(StrictRequest):
    """Names and fields are vLLM's."""

    lora_name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
    lora_path: str = Field(min_length=1, description="a directory below the server's GPT2_ADAPTERS_DIR")


class UnloadAdapterRequest(StrictRequest):
    lora_name: str
