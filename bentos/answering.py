"""The model behind the endpoint: the engine, asked for one answer. Knows no HTTP."""

import asyncio
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal, get_args

from bentos.errors import RequestError
from bentos.schemas import PredictRequest, PredictResponse, Usage
from gpt2core.checkpoint import load_adapter, load_pretrained
from gpt2core.config import GenerationConfig
from gpt2core.engine import Engine, EngineFull, Weights
from gpt2core.evaluate import answer_text
from gpt2core.lora import merge_lora
from gpt2core.model import best_device
from gpt2core.prompt import format_prompt
from gpt2core.request import Request
from gpt2core.tokenizer import load_tokenizer

MAX_BATCH = 16  # answers written at the same time
MAX_QUEUE = 64  # requests that wait for their turn; more are told to come back later
RETRY_AFTER = 1  # seconds


class Answerer:
    def __init__(self, base_dir: str | Path, adapter_dir: str | Path, name: str, weights: str) -> None:
        """Load base and adapter, merged, and start the engine.

        Args:
            name: what answers say they are from.
            weights: the engine's; only fp32 answers to the letter as the model was evaluated.
        """
        if weights not in get_args(Weights):
            raise ValueError(f"GPT2_WEIGHTS is {weights!r}; it must be one of {', '.join(get_args(Weights))}")
        self.name = name
        self.tokenizer = load_tokenizer(base_dir)
        # In a thread that ends: OpenMP keeps its workers for each thread that has ever computed, and with more of them
        # than cores they sleep between operations. A step of gpt2 took 9.8 ms then, and 5.9 without (two cores).
        with ThreadPoolExecutor(1) as thread:
            self.engine = thread.submit(_load_engine, base_dir, adapter_dir, weights).result()
        self.engine.start()

    def close(self) -> None:
        """End the engine; answers that are being written end with what there is of them."""
        self.engine.close()

    async def answer(self, request: PredictRequest, deadline: float) -> PredictResponse:
        """Join the engine's batch. A task that is cancelled leaves it before the next token.

        Args:
            deadline: in `time.monotonic`'s seconds; waiting counts.

        Raises:
            RequestError: the prompt or max_new_tokens is beyond the context, too many requests wait already, or the
                deadline has passed.
        """
        prompt = self.tokenizer.encode_ordinary(format_prompt(request.instruction, request.input))
        n_positions = self.engine.packed.config.n_positions
        if request.max_new_tokens > n_positions:
            message = f"max_new_tokens is {request.max_new_tokens}, but the context holds {n_positions} tokens"
            raise RequestError(400, "invalid_request", message, "max_new_tokens")
        if len(prompt) >= n_positions:
            message = f"the prompt has {len(prompt)} tokens, but the context holds {n_positions}; shorten it"
            raise RequestError(400, "context_length_exceeded", message, "input" if request.input else "instruction")
        config = GenerationConfig(
            max_new_tokens=request.max_new_tokens,
            temperature=request.temperature,
            top_k=request.top_k,
            top_p=request.top_p,
            seed=request.seed,
            eos_id=self.tokenizer.eot_token,
        )
        loop, progress = asyncio.get_running_loop(), asyncio.Event()
        try:
            running = self.engine.submit(
                prompt, config, deadline=deadline, on_progress=lambda _: loop.call_soon_threadsafe(progress.set)
            )
        except EngineFull as error:
            raise RequestError(429, "overloaded", str(error), headers={"Retry-After": str(RETRY_AFTER)}) from None
        try:
            text, finish_reason, n_reply = await self._finished(running, progress, request.stop)
        finally:
            running.cancel()
        return PredictResponse(
            answer=text,
            finish_reason=finish_reason,
            usage=Usage(prompt_tokens=len(prompt), completion_tokens=n_reply, total_tokens=len(prompt) + n_reply),
            model=self.name,
        )

    async def _finished(
        self, running: Request, progress: asyncio.Event, stop: str | list[str]
    ) -> tuple[str, Literal["stop", "length"], int]:
        """The answer, up to the first stop text if one is met; why it ended; and after how many tokens."""
        stops = [stop] if isinstance(stop, str) else stop
        seen = 0
        while True:
            await progress.wait()
            progress.clear()
            reason = running.finish_reason  # before the tokens are looked at: the last ones are among them then
            while stops and seen < len(running.tokens):  # one by one, so that how far the engine is ahead is no matter
                seen += 1
                text = answer_text(running.tokens[:seen], self.tokenizer)
                places = [place for stop in stops if (place := text.find(stop)) >= 0]
                if places:
                    return text[: min(places)].rstrip(), "stop", seen
            if reason == "deadline":
                raise RequestError(
                    504, "deadline_exceeded", "the answer was not ready in time; ask for fewer tokens, or later"
                )
            if reason == "cancelled":
                raise RequestError(503, "shutting_down", "the service ends, or has lost this request; ask again")
            if reason is not None:
                return answer_text(running.tokens, self.tokenizer), reason, len(running.tokens)


def _load_engine(base_dir: str | Path, adapter_dir: str | Path, weights: str) -> Engine:
    model = merge_lora(load_adapter(load_pretrained(base_dir, device=best_device()), adapter_dir))
    return Engine(model, MAX_BATCH, weights, MAX_QUEUE)  # type: ignore[arg-type]
