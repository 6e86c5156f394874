"""Generation with the engine, without HTTP. Errors have a type, which `bentos/errors.py` maps to a status.

Only this module of the package imports torch and gpt2core's engine; the others import their types for mypy only.
"""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from time import monotonic
from typing import Any

from bentos.adapters import Adapters
from bentos.canary import Canary
from bentos.completion import Completion, CompletionResult, GenerationRequest, TokenNotifier
from bentos.errors import ServiceError
from bentos.grammar import GrammarCompiler
from bentos.limits import MAX_BATCH, MAX_QUEUE
from bentos.metrics import Metrics, engine_gauges
from bentos.request_log import RequestLog
from bentos.schemas import BASE, Structure
from bentos.shadow import ShadowQueue
from gpt2core.checkpoint import load_pretrained
from gpt2core.config import GenerationConfig, Weights
from gpt2core.engine import Engine, EngineFull
from gpt2core.inference.detokenizer import IncrementalDetokenizer
from gpt2core.inference.request import EngineClosed
from gpt2core.model import best_device
from gpt2core.prompt import format_prompt
from gpt2core.sampling import Grammar, check_tokens
from gpt2core.tokenizer import load_tokenizer


class TextGenerator:
    """Generates completions with the base model and its adapters. Not thread-safe: use it from one event loop."""

    def __init__(
        self,
        base_dir: str | Path,
        adapter_dir: str | Path,
        metrics: Metrics,
        weights: Weights = "auto",
        adapters_dir: str = "",
        request_log: RequestLog | None = None,
        base_sha256: str | None = None,
        accept_other_base: bool = False,
        follow_adapters: bool = False,
    ) -> None:
        """Load base and adapter, and start the engine.

        Args:
            weights: format of the engine's weights. Only fp32 generates exactly the evaluated completions.
            adapters_dir, follow_adapters: as for `Adapters`.
            base_sha256: adapters of another base are rejected.
            accept_other_base: adapters of another base are accepted, with a warning.
        """
        self.tokenizer = load_tokenizer(base_dir)
        self._grammars = GrammarCompiler(self.tokenizer)
        self._metrics, self._request_log = metrics, request_log
        self.canary = Canary()
        self._shadows = ShadowQueue(self._submit, self.canary, self.tokenizer.decode, metrics, request_log)
        model = load_pretrained(base_dir, device=best_device(), mapped=True)
        self.engine = Engine(model, MAX_BATCH, weights, MAX_QUEUE, base_sha256, accept_other_base)
        self.adapters = Adapters(
            self.engine, Path(adapter_dir), self.canary, self._shadows, adapters_dir, follow_adapters
        )
        self.engine.start()

    def close(self) -> None:
        """Stop the engine; unfinished completions are lost."""
        self._shadows.clear()
        self.engine.close()
        self._grammars.close()
        if self._request_log is not None:
            self._request_log.close()

    @property
    def n_positions(self) -> int:
        return self.engine.config.n_positions

    def encode_instruction(self, instruction: str, input: str = "") -> list[int]:
        """Return the prompt of an instruction, as in training."""
        return self.tokenizer.encode_ordinary(format_prompt(instruction, input))

    def config(self, max_new_tokens: int, sampling: Mapping[str, Any]) -> GenerationConfig:
        """Return the engine's configuration for the sampling parameters of a request.

        The engine also caps `max_new_tokens` at the space that the prompt leaves in the context.

        Raises:
            ServiceError: a parameter has an unknown token id, conflicts with another one, or does not fit into 64 bits.
        """
        max_new_tokens = min(max_new_tokens, self.n_positions)
        if (least := sampling.get("min_tokens", 0)) > max_new_tokens:
            message = f"min_tokens is {least}; it must be at most the token limit, {max_new_tokens}"
            raise ServiceError("invalid_request", message, "min_tokens")
        try:
            config = GenerationConfig(max_new_tokens=max_new_tokens, eos_id=self.tokenizer.eot_token, **sampling)
            check_tokens(config, self.engine.config)
        except ValueError as error:
            message = str(error).removeprefix(f"{GenerationConfig.__name__}.")
            raise ServiceError("invalid_request", message, message.split()[0]) from None
        return config

    def check_known(self, tokens: Sequence[int], param: str) -> None:
        """
        Raises:
            ServiceError: the tokenizer has no such token.
        """
        for token in sorted(set(tokens)):
            try:
                self.tokenizer.decode_single_token_bytes(token)
            except (KeyError, OverflowError):
                message = f"{param}: there is no token id {token}; ids are from 0 to {self.tokenizer.n_vocab - 1}"
                raise ServiceError("invalid_request", message, param) from None

    async def grammars(self, structure: Structure, n: int, deadline: float) -> list[Grammar | None]:
        """Compile the grammars of `n` completions.

        Raises:
            ServiceError: the schema, the regex or the choice is invalid, not supported or too large, or compiling does
                not end before the deadline (by `time.monotonic`).
        """
        try:
            async with asyncio.timeout(deadline - monotonic()):
                return [*await asyncio.wrap_future(self._grammars.submit(structure, n))]
        except TimeoutError:
            message = (
                f"{structure.param}: compiling it took longer than the request's time limit; simplify it, or retry"
            )
            raise ServiceError("deadline_exceeded", message, structure.param) from None

    def submit(
        self,
        requests: Sequence[GenerationRequest],
        param: str,
        on_end: Callable[[CompletionResult], None] | None = None,
    ) -> list[Completion]:
        """Queue all requests, or none if one is rejected.

        Args:
            param: the field that holds the prompt, for errors.
            on_end: called once for each completion, when it has ended.

        Raises:
            ServiceError: a prompt fills the context, or the queue is full.
        """
        longest = max(len(request.prompt) for request in requests)
        if longest >= self.n_positions:
            # OpenAI's wording: LiteLLM and other clients recognize it
            limit = f"this model's maximum context length is {self.n_positions} tokens"
            message = f"{limit}, but the prompt has {longest}; shorten it"
            raise ServiceError("context_length_exceeded", message, param)
        # route and submit without an await in between: otherwise the chosen adapter could be unloaded first
        requests = [self.canary.route(request) for request in requests]
        completions: list[Completion] = []
        self._shadows.interrupt()
        try:
            for request in requests:
                completions.append(self._submit(request, [self._observe, *([on_end] if on_end else [])], param))
        except ServiceError:
            for completion in completions:
                completion.withdraw()
            raise
        for _ in completions:
            self._shadows.request_started()
        return completions

    def metrics_text(self) -> str:
        """Return the engine's state as gauges, in the Prometheus text format."""
        return engine_gauges(self.engine)

    def _submit(
        self, request: GenerationRequest, on_end: Sequence[Callable[[CompletionResult], None]], param: str = "prompt"
    ) -> Completion:
        notifier = TokenNotifier(every_token=request.stream or bool(request.stop))
        try:
            running = self.engine.submit(
                request.prompt,
                request.config,
                adapter=None if request.model == BASE else request.model,
                deadline=request.deadline,
                on_progress=notifier.notify,
                logprobs=request.logprobs,
                grammar=request.grammar,
                prompt_logprobs=request.echo is not None and request.logprobs is not None,
            )
        except EngineFull as error:
            self._metrics.refused.inc()
            raise ServiceError("overloaded", str(error)) from None
        except EngineClosed:
            raise ServiceError("shutting_down", "the service is shutting down; retry") from None
        except ValueError as error:
            raise ServiceError("invalid_request", str(error), param) from None
        detokenizer = IncrementalDetokenizer(
            self.tokenizer, request.stop, request.clean, request.config.stop_token_ids, request.config.min_tokens
        )
        return Completion(request, self.adapters.models[request.model], running, notifier, detokenizer, on_end)

    def _observe(self, result: CompletionResult) -> None:
        try:
            self._metrics.observe(result)
            if self._request_log is not None:
                self._request_log.write(result, self.tokenizer.decode)
            self.canary.observe(result)
        finally:  # after an error too: a request that stays counted as in flight would stop shadow mode forever
            self._shadows.request_ended(result)
