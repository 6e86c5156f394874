"""POST /tokenize and /detokenize, as in vLLM."""

import asyncio
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse

from bentos.body import read_body
from bentos.dependencies import served
from bentos.errors import ServiceError
from bentos.openai.chat import prompt_of
from bentos.openai.logprobs import token_text
from bentos.openai.protocol import DetokenizeRequest, TokenizeRequest
from bentos.openapi import ERRORS, operation
from bentos.schemas import DEFAULTS, TUNED
from bentos.settings import MultiTurn

if TYPE_CHECKING:
    from bentos.generation import TextGenerator

router = APIRouter()


@router.post("/tokenize", response_model=dict[str, Any], responses=ERRORS, openapi_extra=operation(TokenizeRequest))
async def tokenize(request: Request) -> JSONResponse:
    """Return the tokens of a text, or of the prompt that /v1/chat/completions builds from messages."""
    body = await read_body(request, TokenizeRequest)
    generator = served(request).generator
    generator.adapters.check_model(body.model or TUNED, "model")
    if (body.prompt is None) == (body.messages is None):
        raise ServiceError("invalid_request", "prompt: either prompt or messages is required", "prompt")
    return await asyncio.to_thread(_tokens, body, generator, served(request).multi_turn)  # 0.8 s for 1 MB of text


def _tokens(body: TokenizeRequest, generator: "TextGenerator", multi_turn: MultiTurn) -> JSONResponse:
    if body.messages is None:
        tokens = generator.tokenizer.encode_ordinary(body.prompt or "")
    else:
        tokens, _ = prompt_of(body.messages, generator, multi_turn, DEFAULTS.max_new_tokens)
    texts = [token_text(token, generator.tokenizer) for token in tokens] if body.return_token_strs else None
    content = {"count": len(tokens), "max_model_len": generator.n_positions, "tokens": tokens, "token_strs": texts}
    return JSONResponse(content)


@router.post("/detokenize", response_model=dict[str, Any], responses=ERRORS, openapi_extra=operation(DetokenizeRequest))
async def detokenize(request: Request) -> JSONResponse:
    """Return the text of tokens."""
    body = await read_body(request, DetokenizeRequest)
    generator = served(request).generator
    generator.adapters.check_model(body.model or TUNED, "model")
    return await asyncio.to_thread(_text, body, generator)


def _text(body: DetokenizeRequest, generator: "TextGenerator") -> JSONResponse:
    generator.check_known(body.tokens, "tokens")
    return JSONResponse({"prompt": generator.tokenizer.decode(body.tokens)})
