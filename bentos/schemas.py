"""Bodies of requests and responses, except OpenAI's (`openai/protocol.py`). Names and defaults are gpt2core's."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from bentos.limits import MAX_STOPS
from gpt2core.config import GenerationConfig

DEFAULTS = GenerationConfig()
TUNED = "gpt2-instruct"  # the base with the run's adapter; the default model
BASE = "base"


def _whole_number(value: Any) -> Any:
    """JSON has one kind of number, so 3.0 is an integer too."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


WHOLE = BeforeValidator(_whole_number)
TopK = Annotated[int, Field(ge=1), WHOLE]
Seed = Annotated[int, Field(ge=0, lt=2**63), WHOLE]
# `set_limits` replaces the name by the model's number in the served document
MaxTokens = Annotated[int, Field(ge=1, json_schema_extra={"maximum": "n_positions"}), WHOLE]
Stop = Annotated[str, Field(min_length=1)]
Stops = Stop | Annotated[list[Stop], Field(max_length=MAX_STOPS)]


class StrictRequest(BaseModel):
    """Types are strict (neither true nor "0.5" is a number), and unknown fields are refused."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class PredictRequest(StrictRequest):
    """An instruction, and how to decode the answer."""

    instruction: str = Field(pattern=r"\S", description="not blank")
    input: str = ""
    max_new_tokens: MaxTokens = DEFAULTS.max_new_tokens
    temperature: float = Field(DEFAULTS.temperature, ge=0, description="0: greedy")
    top_k: TopK | None = DEFAULTS.top_k
    top_p: float | None = Field(DEFAULTS.top_p, gt=0, le=1)
    seed: Seed | None = DEFAULTS.seed
    stop: Stops = Field(default=[], description="the answer ends before the first of these")
    stream: bool = Field(False, description="server-sent events with new text of the answer each; [DONE] at the end")
    adapter: str = Field(TUNED, description="a name of /v1/models")


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class AdapterVersion(BaseModel):
    name: str
    sha256: str = Field(description="of its files, as in lineage.json")


class PredictResponse(BaseModel):
    answer: str
    finish_reason: Literal["stop", "length"] = Field(description="end of text or a stop text; or the token limit")
    usage: Usage
    model: str = Field(description="the Bento's tag; /metadata describes its content")
    adapter: AdapterVersion | None = Field(description="null: the base model alone")


class Envelope(BaseModel):
    """A response as mariovas3/llms sends it; the HTTP status is the same."""

    statusCode: int
    headers: dict[str, str]
    body: str = Field(description="JSON: the response, or the error")


class LoadAdapterRequest(StrictRequest):
    """Names and fields are vLLM's."""

    lora_name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
    lora_path: str = Field(min_length=1, description="a directory below the server's GPT2_ADAPTERS_DIR")


class UnloadAdapterRequest(StrictRequest):
    lora_name: str


class Error(BaseModel):
    type: str
    message: str
    param: str | None = Field(description="the field of the request that is wrong")
    code: str


class ErrorResponse(BaseModel):
    """The body of every error."""

    error: Error
