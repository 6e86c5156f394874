"""POST /v1/completions: continues one or several texts, without a prompt template."""

from collections.abc import Sequence
from time import monotonic
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from bentos.body import read_body
from bentos.completion import Chunk, FinishReason
from bentos.dependencies import served
from bentos.errors import ServiceError
from bentos.limits import DEADLINE, MAX_PROMPTS
from bentos.openai.logprobs import token_text
from bentos.openai.protocol import CompletionRequest
from bentos.openai.serving import Route, respond
from bentos.openapi import ERRORS, operation
from bentos.schemas import DEFAULTS

if TYPE_CHECKING:
    from bentos.generation import TextGenerator
    from gpt2core.inference.request import TokenLogprobs

router = APIRouter()


@router.post(
    "/v1/completions",
    response_model=dict[str, Any],
    responses=ERRORS,
    openapi_extra=operation(CompletionRequest, stream=True),
)
async def completions(request: Request) -> Response:
    """Continue one or several texts, with the request and response format of OpenAI's route."""
    deadline = monotonic() + DEADLINE
    body = await read_body(request, CompletionRequest)
    return await respond(request, CompletionRoute(body, served(request).generator), deadline)


class CompletionRoute(Route):
    object, chunk_object, id_prefix = "text_completion", "text_completion", "cmpl"
    prompt_field, clean = "prompt", False

    def __init__(self, body: CompletionRequest, generator: "TextGenerator") -> None:
        self.body, self.tokenizer = body, generator.tokenizer
        self.max_new_tokens = DEFAULTS.max_new_tokens if body.max_tokens is None else body.max_tokens
        self.logprobs, self.echo = body.logprobs, bool(body.echo)
        if body.best_of not in (None, 1, body.n or 1):
            message = f"best_of is {body.best_of}; it must be n: this server returns every completion that it generates"
            raise ServiceError("invalid_request", message, "best_of")
        prompt = body.prompt or ""
        many = [prompt] if isinstance(prompt, str) or isinstance(prompt[0], int) else prompt
        if len(many) * (body.n or 1) > MAX_PROMPTS:
            message = f"{len(many)} prompts with n={body.n}; one request may have at most {MAX_PROMPTS} completions"
            raise ServiceError("invalid_request", message, "prompt")
        for ids in many:
            if not isinstance(ids, str):
                generator.check_known(ids, "prompt")
        self.prompts = [self._tokens(one) if isinstance(one, str) else list(one) for one in many]

    def choice(
        self, index: int, chunk: Chunk, finish_reason: FinishReason | None, offsets: Sequence[int]
    ) -> dict[str, Any]:
        logprobs = None
        if self.logprobs is not None:
            logprobs = {
                "tokens": [self._text(token) for token in chunk.tokens],
                "token_logprobs": [one and one.logprob for one in chunk.logprobs],
                "top_logprobs": [
                    one and {self._text(id): value for id, value in _with_own(token, one)}
                    for token, one in zip(chunk.tokens, chunk.logprobs, strict=True)
                ],
                "text_offset": list(offsets),
            }
        return {"index": index, "text": chunk.text, "logprobs": logprobs, "finish_reason": finish_reason}

    def event_choice(
        self, index: int, chunk: Chunk, finish_reason: FinishReason | None, offsets: Sequence[int], first: bool
    ) -> dict[str, Any]:
        return self.choice(index, chunk, finish_reason, offsets)

    def _tokens(self, text: str) -> list[int]:
        """Encode a text. An empty text becomes end of text, after which the model begins a new text."""
        return self.tokenizer.encode_ordinary(text) or [self.tokenizer.eot_token]

    def _text(self, token: int) -> str:
        return token_text(token, self.tokenizer)


def _with_own(token: int, logprobs: "TokenLogprobs") -> list[tuple[int, float]]:
    """Return the most likely tokens, and the generated token if it is not one of them."""
    own = [] if token in dict(logprobs.top) else [(token, logprobs.logprob)]
    return [*logprobs.top, *own]
