"""What goes over the wire. Names are gpt2core's; so are the defaults."""

from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from gpt2core.config import GenerationConfig

DEFAULTS = GenerationConfig()


def _not_blank(text: str) -> str:
    if not text.strip():
        raise ValueError("it is empty")
    return text


Stop = Annotated[str, Field(min_length=1)]


class PredictRequest(BaseModel):
    """An instruction, and how to decode its answer. Types are strict: true is no number, and "0.5" is none either."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    instruction: Annotated[str, AfterValidator(_not_blank)]
    input: str = ""
    max_new_tokens: int = Field(DEFAULTS.max_new_tokens, ge=1)
    temperature: float = Field(DEFAULTS.temperature, ge=0, description="0: greedy")
    top_k: int | None = Field(DEFAULTS.top_k, ge=1)
    top_p: float | None = Field(DEFAULTS.top_p, gt=0, le=1)
    seed: int | None = Field(DEFAULTS.seed, ge=0, lt=2**63)
    stop: Stop | list[Stop] = Field(default=[], description="the answer ends before the first of these")


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class PredictResponse(BaseModel):
    answer: str
    finish_reason: Literal["stop", "length"] = Field(description="end of text or a stop; or no room for more tokens")
    usage: Usage
    model: str = Field(description="the Bento's tag; /metadata says what is in it")


class Error(BaseModel):
    type: str
    message: str
    param: str | None = Field(description="the field of the request that is wrong")


class ErrorResponse(BaseModel):
    """The one shape of every error."""

    error: Error
