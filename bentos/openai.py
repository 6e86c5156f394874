"""The OpenAI API: what its requests mean here, and its answers. What this server cannot do is refused, not passed over.

https://platform.openai.com/docs/api-reference/completions and .../chat
"""

from collections.abc import Sequence
from time import time
from typing import Any

import tiktoken

from bentos.answering import Answerer, Part, Reply, Wanted, usage
from bentos.errors import RequestError
from bentos.schemas import DEFAULTS, ChatRequest, CompletionRequest
from gpt2core.inference.request import TokenLogprobs
from gpt2core.prompt import format_prompt


class Completions:
    """/v1/completions: the request as replies to want, and replies as the answer."""

    name, chunk_name, prefix, param = "text_completion", "text_completion", "cmpl", "prompt"

    def __init__(self, request: CompletionRequest, answerer: Answerer) -> None:
        self.request, self.tokenizer = request, answerer.tokenizer
        self.max_new_tokens, self.max_param = request.max_tokens or DEFAULTS.max_new_tokens, "max_tokens"
        self.logprobs = request.logprobs
        prompt = request.prompt
        many = [prompt] if isinstance(prompt, str) or isinstance(prompt[0], int) else prompt
        self.prompts: list[list[int]] = [
            self.tokenizer.encode_ordinary(one) if isinstance(one, str) else list(one) for one in many
        ]

    def choice(self, i: int, part: Part, finish_reason: str | None, offset: int) -> dict[str, Any]:
        logprobs = None
        if self.logprobs is not None:
            texts = [_text(token, self.tokenizer) for token in part.tokens]
            offsets = [offset + len("".join(texts[:k])) for k in range(len(texts))]
            logprobs = {
                "tokens": texts,
                "token_logprobs": [one.logprob for one in part.logprobs],
                "top_logprobs": [
                    {_text(id, self.tokenizer): value for id, value in _with_own(token, one)}
                    for token, one in zip(part.tokens, part.logprobs, strict=True)
                ],
                "text_offset": offsets,
            }
        return {"index": i, "text": part.text, "logprobs": logprobs, "finish_reason": finish_reason}

    def chunk_choice(self, i: int, part: Part, finish_reason: str | None, first: bool, offset: int) -> dict[str, Any]:
        return self.choice(i, part, finish_reason, offset)


class Chat:
    """/v1/chat/completions: the same."""

    name, chunk_name, prefix, param = "chat.completion", "chat.completion.chunk", "chatcmpl", "messages"

    def __init__(self, request: ChatRequest, answerer: Answerer) -> None:
        self.request, self.tokenizer = request, answerer.tokenizer
        if request.top_logprobs is not None and not request.logprobs:
            raise RequestError(400, "invalid_request", "top_logprobs: only together with logprobs", "top_logprobs")
        self.logprobs = (request.top_logprobs or 0) if request.logprobs else None
        if request.max_tokens and request.max_completion_tokens:
            message = "max_completion_tokens: max_tokens is there already, and means the same"
            raise RequestError(400, "invalid_request", message, "max_completion_tokens")
        self.max_param = "max_completion_tokens" if request.max_completion_tokens else "max_tokens"
        self.max_new_tokens = request.max_completion_tokens or request.max_tokens or DEFAULTS.max_new_tokens
        roles = [message.role.replace("developer", "system") for message in request.messages]
        if roles not in (["user"], ["system", "user"]):
            message = "messages: one of the user, or the system's and then the user's; this model answers one turn"
            raise RequestError(400, "invalid_request", message, "messages")
        instruction, *input = [message.text for message in request.messages]
        if not instruction.strip():
            raise RequestError(400, "invalid_request", "messages: the first one is empty", "messages")
        self.prompts = [self.tokenizer.encode_ordinary(format_prompt(instruction, *input))]

    def choice(self, i: int, part: Part, finish_reason: str | None, offset: int) -> dict[str, Any]:
        message = {"role": "assistant", "content": part.text, "refusal": None}
        return {"index": i, "message": message, "logprobs": self._logprobs(part), "finish_reason": finish_reason}

    def chunk_choice(self, i: int, part: Part, finish_reason: str | None, first: bool, offset: int) -> dict[str, Any]:
        delta = ({"role": "assistant"} if first else {}) | {"content": part.text}
        return {"index": i, "delta": delta, "logprobs": self._logprobs(part), "finish_reason": finish_reason}

    def _logprobs(self, part: Part) -> dict[str, Any] | None:
        if self.logprobs is None:
            return None

        def one(token: int, logprob: float) -> dict[str, Any]:
            data = self.tokenizer.decode_single_token_bytes(token)
            return {"token": data.decode("utf-8", "replace"), "logprob": logprob, "bytes": list(data)}

        return {
            "content": [
                one(token, value.logprob) | {"top_logprobs": [one(*pair) for pair in value.top]}
                for token, value in zip(part.tokens, part.logprobs, strict=True)
            ],
            "refusal": None,
        }


def wanted(asked: Completions | Chat, answerer: Answerer, deadline: float, answered: dict[str, Any]) -> list[Wanted]:
    """The replies that a request wants: n to each prompt."""
    request = asked.request
    answerer.check_model(request.model, "model")
    if request.stream_options is not None and not request.stream:
        raise RequestError(400, "invalid_request", "stream_options: only together with stream", "stream_options")
    stops = [request.stop] if isinstance(request.stop, str) else request.stop or []

    def one(prompt: list[int], choice: int) -> Wanted:
        config = answerer.config(
            asked.max_new_tokens,
            asked.max_param,
            temperature=DEFAULTS.temperature if request.temperature is None else request.temperature,
            top_k=request.top_k,
            top_p=request.top_p,
            seed=None if request.seed is None else (request.seed + choice) % 2**63,
        )
        return Wanted(
            prompt,
            config,
            request.model,
            deadline,
            stops,
            clean=isinstance(asked, Chat),
            logprobs=asked.logprobs,
            stream=bool(request.stream),
            answered=answered,
        )

    return [one(prompt, choice) for prompt in asked.prompts for choice in range(request.n or 1)]


class Answer:
    """An answer in OpenAI's form, whole or in chunks."""

    def __init__(self, asked: Completions | Chat, replies: Sequence[Reply], request_id: str, bento: str) -> None:
        self.asked, self.replies = asked, replies
        adapter = replies[0].adapter
        self._rest = {
            "id": f"{asked.prefix}-{request_id}",
            "created": int(time()),
            "model": asked.request.model,
            # what answers: the Bento, and the adapter by its content
            "system_fingerprint": f"{bento}+{adapter.sha256[:16]}" if adapter else bento,
            "adapter": adapter and adapter.model_dump(),
        }
        self._offsets = [0] * len(replies)
        self._begun: set[int] = set()

    def whole(self, parts: Sequence[Part]) -> dict[str, Any]:
        choices = [
            self.asked.choice(i, part, reply.finish_reason, 0)
            for i, (part, reply) in enumerate(zip(parts, self.replies, strict=True))
        ]
        return {"object": self.asked.name, **self._rest, "choices": choices, "usage": usage(self.replies).model_dump()}

    def chunk(self, i: int, part: Part, finish_reason: str | None) -> dict[str, Any]:
        choice = self.asked.chunk_choice(i, part, finish_reason, i not in self._begun, self._offsets[i])
        self._begun.add(i)
        self._offsets[i] += sum(len(_text(token, self.asked.tokenizer)) for token in part.tokens)
        return {"object": self.asked.chunk_name, **self._rest, "choices": [choice], **self._usage(None)}

    def last_chunk(self) -> dict[str, Any] | None:
        """Token counts, if the request asks for them."""
        counts = self._usage(usage(self.replies).model_dump())
        return {"object": self.asked.chunk_name, **self._rest, "choices": [], **counts} if counts else None

    def _usage(self, counts: dict[str, int] | None) -> dict[str, Any]:
        options = self.asked.request.stream_options
        return {"usage": counts} if options and options.include_usage else {}


def _text(token: int, tokenizer: tiktoken.Encoding) -> str:
    return tokenizer.decode_single_token_bytes(token).decode("utf-8", "replace")


def _with_own(token: int, logprobs: TokenLogprobs) -> list[tuple[int, float]]:
    """The most likely tokens, and the drawn one if it is none of them."""
    own = [] if token in dict(logprobs.top) else [(token, logprobs.logprob)]
    return [*logprobs.top, *own]
