"""POST /v1/chat/completions: answers an instruction."""

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
from bentos.limits import DEADLINE
from bentos.openai.logprobs import token_text
from bentos.openai.protocol import ChatRequest, Message
from bentos.openai.serving import Route, respond
from bentos.openapi import ERRORS, operation
from bentos.schemas import DEFAULTS
from bentos.settings import MultiTurn
from gpt2core.prompt import format_turns

if TYPE_CHECKING:
    from bentos.generation import TextGenerator

router = APIRouter()


@router.post(
    "/v1/chat/completions",
    response_model=dict[str, Any],
    responses=ERRORS,
    openapi_extra=operation(ChatRequest, stream=True),
)
async def chat_completions(request: Request) -> Response:
    """Answer an instruction, the last user turn, with the request and response format of OpenAI's route."""
    deadline = monotonic() + DEADLINE
    body = await read_body(request, ChatRequest)
    route = ChatRoute(body, served(request).generator, served(request).multi_turn)
    return await respond(request, route, deadline)


class ChatRoute(Route):
    object, chunk_object, id_prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"
    prompt_field, clean = "messages", True

    def __init__(self, body: ChatRequest, generator: "TextGenerator", multi_turn: MultiTurn) -> None:
        self.body, self.tokenizer = body, generator.tokenizer
        if body.top_logprobs and not body.logprobs:
            raise ServiceError("invalid_request", "top_logprobs: only together with logprobs", "top_logprobs")
        self.logprobs = (body.top_logprobs or 0) if body.logprobs else None
        self.max_new_tokens = body.max_completion_tokens or body.max_tokens or DEFAULTS.max_new_tokens
        prompt, n_ignored = prompt_of(body.messages, generator, multi_turn, self.max_new_tokens)
        self.prompts = [prompt]
        self.extra_fields = {"ignored_messages": n_ignored}

    def choice(
        self, index: int, chunk: Chunk, finish_reason: FinishReason | None, offsets: Sequence[int]
    ) -> dict[str, Any]:
        message = {"role": "assistant", "content": chunk.text, "refusal": None}
        return {"index": index, "message": message, "logprobs": self._logprobs(chunk), "finish_reason": finish_reason}

    def event_choice(
        self, index: int, chunk: Chunk, finish_reason: FinishReason | None, offsets: Sequence[int], first: bool
    ) -> dict[str, Any]:
        delta = ({"role": "assistant"} if first else {}) | {"content": chunk.text}
        return {"index": index, "delta": delta, "logprobs": self._logprobs(chunk), "finish_reason": finish_reason}

    def _logprobs(self, chunk: Chunk) -> dict[str, Any] | None:
        if self.logprobs is None:
            return None
        content = [
            self._token(token, value.logprob) | {"top_logprobs": [self._token(*pair) for pair in value.top]}
            for token, value in zip(chunk.tokens, chunk.logprobs, strict=True)
            if value is not None
        ]
        return {"content": content, "refusal": None}

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        data = self.tokenizer.decode_single_token_bytes(token)
        return {"token": token_text(token, self.tokenizer), "logprob": logprob, "bytes": list(data)}


def prompt_of(
    messages: Sequence[Message], generator: "TextGenerator", multi_turn: MultiTurn, max_new_tokens: int
) -> tuple[list[int], int]:
    """Return the prompt of a conversation, and the number of messages with content that are not part of it.

    The last user turn is the instruction. A system message is ignored: the prompt template has no field for it, and as
    part of the instruction it would change the answer. With `multi_turn` "history", earlier turns of user and assistant
    are the input, as in training on conversations. The newest turns are used, as many as fit: the prompt may fill the
    context except for `max_new_tokens`, and at least half of the context.

    Raises:
        ServiceError: see `instruction_of`.
    """
    instruction, earlier = instruction_of(messages, multi_turn)
    prompt, n_used = generator.encode_instruction(instruction), 0
    if multi_turn == "history":
        max_prompt_tokens = generator.n_positions - min(max_new_tokens, generator.n_positions // 2)
        turns = [(message.role, message.text) for message in earlier if message.role in ("user", "assistant")]
        written = [(role, text) for role, text in turns if text is not None and text.strip()]
        for n in range(1, len(written) + 1):
            longer = generator.encode_instruction(instruction, format_turns(written[-n:]))
            if len(longer) > max_prompt_tokens:
                break
            prompt, n_used = longer, n
    n_others = sum(message.text is None or bool(message.text.strip()) for message in messages) - 1
    return prompt, n_others - n_used


def instruction_of(messages: Sequence[Message], multi_turn: MultiTurn) -> tuple[str, list[Message]]:
    """Return the text of the last user turn, and the turns before it.

    Raises:
        ServiceError: the last turn is not text of the user, or there are earlier turns and `multi_turn` is "refuse".
    """
    turns = [message for message in messages if message.role not in ("system", "developer")]
    if not turns or turns[-1].role != "user":
        raise ServiceError("invalid_request", "messages: the last message must be the user's", "messages")
    instruction = turns[-1].text
    if instruction is None:
        message = "messages: the last message must be text: only content parts of type text are supported"
        raise ServiceError("invalid_request", message, "messages")
    if not instruction.strip():
        raise ServiceError("invalid_request", "messages: the last message is blank", "messages")
    if len(turns) > 1 and multi_turn == "refuse":
        message = (
            f"messages: there are {len(turns)} turns, but this server accepts only one (GPT2_MULTI_TURN=refuse); send "
            "only the last user message"
        )
        raise ServiceError("invalid_request", message, "messages")
    return instruction, turns[:-1]
