"""The model behind the endpoint: one request at a time, each with a deadline. Knows no HTTP."""

from pathlib import Path
from threading import Lock
from time import monotonic

from bentos.errors import RequestError
from bentos.schemas import PredictRequest, PredictResponse, Usage
from gpt2core.checkpoint import load_adapter, load_pretrained
from gpt2core.config import GenerationConfig
from gpt2core.evaluate import answer_text
from gpt2core.generate import stream
from gpt2core.lora import merge_lora
from gpt2core.model import best_device
from gpt2core.prompt import format_prompt
from gpt2core.tokenizer import load_tokenizer


class Answerer:
    def __init__(self, base_dir: str | Path, adapter_dir: str | Path, name: str) -> None:
        """Load base and adapter, merged; `name` is what answers say they are from."""
        self.name = name
        self.tokenizer = load_tokenizer(base_dir)
        self.model = merge_lora(load_adapter(load_pretrained(base_dir, device=best_device()), adapter_dir))
        self.lock = Lock()

    def answer(self, request: PredictRequest, deadline: float) -> PredictResponse:
        """Wait for the model, then decode.

        Args:
            deadline: in `time.monotonic`'s seconds; waiting counts.

        Raises:
            RequestError: the prompt or max_new_tokens is beyond the context, or the deadline has passed.
        """
        prompt = self.tokenizer.encode_ordinary(format_prompt(request.instruction, request.input))
        n_positions = self.model.config.n_positions
        if request.max_new_tokens > n_positions:
            message = f"max_new_tokens is {request.max_new_tokens}, but the context holds {n_positions} tokens"
            raise RequestError(400, "invalid_request", message, "max_new_tokens")
        if len(prompt) >= n_positions:
            message = f"the prompt has {len(prompt)} tokens, but the context holds {n_positions}; shorten it"
            raise RequestError(400, "context_length_exceeded", message, "input" if request.input else "instruction")
        if not self.lock.acquire(timeout=max(0.0, deadline - monotonic())):
            raise _late()
        try:
            reply, cut = self._decode(prompt, request, deadline)
        finally:
            self.lock.release()
        text = answer_text(reply, self.tokenizer)
        return PredictResponse(
            answer=text if cut is None else cut,
            finish_reason="stop" if cut is not None or reply[-1] == self.tokenizer.eot_token else "length",
            usage=Usage(prompt_tokens=len(prompt), completion_tokens=len(reply), total_tokens=len(prompt) + len(reply)),
            model=self.name,
        )

    def _decode(self, prompt: list[int], request: PredictRequest, deadline: float) -> tuple[list[int], str | None]:
        """The reply's tokens, and the answer up to the first stop text, if one was met."""
        config = GenerationConfig(
            max_new_tokens=request.max_new_tokens,
            temperature=request.temperature,
            top_k=request.top_k,
            top_p=request.top_p,
            seed=request.seed,
            eos_id=self.tokenizer.eot_token,
        )
        stops = [request.stop] if isinstance(request.stop, str) else request.stop
        reply: list[int] = []
        for token in stream(self.model, prompt, config):
            reply.append(token)
            if stops:
                text = answer_text(reply, self.tokenizer)
                places = [place for stop in stops if (place := text.find(stop)) >= 0]
                if places:
                    return reply, text[: min(places)].rstrip()
            if monotonic() > deadline:
                raise _late()
        return reply, None


def _late() -> RequestError:
    return RequestError(504, "deadline_exceeded", "the answer was not ready in time; ask for fewer tokens, or later")
