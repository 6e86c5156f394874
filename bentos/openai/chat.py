"""POST /v1/chat/completions: answers an instruction."""

from time import monotonic
from typing import Any

import tiktoken
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from bentos.body import read_body
from bentos.completion import Chunk, FinishReason
from bentos.dependencies import served
from bentos.errors import ServiceError
from bentos.limits import DEADLINE
from bentos.openai.protocol import ChatRequest
from bentos.openai.serving import Route, respond
from bentos.openapi import ERRORS, operation
from bentos.schemas import DEFAULTS
from gpt2core.prompt import format_prompt

router = APIRouter()


@router.post(
    "/v1/chat/completions",
    response_model=dict[str, Any],
    responses=ERRORS,
    openapi_extra=operation(ChatRequest, stream=True),
)
async def chat_completions(request: Request) -> Response:
    """Answer an instruction, as OpenAI's route of that name does: a user's turn, perhaps after a system message."""
    deadline = monotonic() + DEADLINE
    body = await read_body(request, ChatRequest)
    return await respond(request, ChatRoute(body, served(request).generator.tokenizer), deadline)


class ChatRoute(Route):
    object, chunk_object, id_prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"
    prompt_field, clean = "messages", True

    def __init__(self, body: ChatRequest, tokenizer: tiktoken.Encoding) -> None:
        self.body, self._tokenizer = body, tokenizer
        if body.top_logprobs is not None and not body.logprobs:
            raise ServiceError("invalid_request", "top_logprobs: only together with logprobs", "top_logprobs")
        self.logprobs = (body.top_logprobs or 0) if body.logprobs else None
        if body.max_tokens and body.max_completion_tokens:
            message = "max_completion_tokens: max_tokens is given too, and means the same"
            raise ServiceError("invalid_request", message, "max_completion_tokens")
        self.max_tokens_field = "max_completion_tokens" if body.max_completion_tokens else "max_tokens"
        self.max_new_tokens = body.max_completion_tokens or body.max_tokens or DEFAULTS.max_new_tokens
        self.prompts = [tokenizer.encode_ordinary(format_prompt(*_instruction(body)))]

    def choice(self, index: int, chunk: Chunk, finish_reason: FinishReason | None) -> dict[str, Any]:
        message = {"role": "assistant", "content": chunk.text, "refusal": None}
        return {"index": index, "message": message, "logprobs": self._logprobs(chunk), "finish_reason": finish_reason}

    def chunk_choice(
        self, index: int, chunk: Chunk, finish_reason: FinishReason | None, first: bool, offset: int
    ) -> dict[str, Any]:
        delta = ({"role": "assistant"} if first else {}) | {"content": chunk.text}
        return {"index": index, "delta": delta, "logprobs": self._logprobs(chunk), "finish_reason": finish_reason}

    def length(self, chunk: Chunk) -> int:
        return len(chunk.text)

    def _logprobs(self, chunk: Chunk) -> dict[str, Any] | None:
        if self.logprobs is None:
            return None
        content = [
            self._token(token, value.logprob) | {"top_logprobs": [self._token(*pair) for pair in value.top]}
            for token, value in zip(chunk.tokens, chunk.logprobs, strict=True)
        ]
        return {"content": content, "refusal": None}

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        data = self._tokenizer.decode_single_token_bytes(token)
        return {"token": data.decode("utf-8", "replace"), "logprob": logprob, "bytes": list(data)}


def _instruction(body: ChatRequest) -> list[str]:
    """The instruction, and its input if there is one."""
    roles = [message.role.replace("developer", "system") for message in body.messages]
    if roles not in (["user"], ["system", "user"]):
        message = "messages: must be a user's message, or a system message and a user's; only one turn is answered"
        raise ServiceError("invalid_request", message, "messages")
    texts = [message.text for message in body.messages]
    if not texts[0].strip():
        raise ServiceError("invalid_request", "messages: the first one is empty", "messages")
    return texts
