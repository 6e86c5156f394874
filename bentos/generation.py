"""The engine and its adapters, without HTTP. Errors have a type, which `bentos/errors.py` maps to a status.

Only this module of the package imports torch and gpt2core's engine; the others import their types for mypy only.
"""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from time import monotonic
from typing import Any

from bentos.canary import Canary
from bentos.compat import MODEL_FILE
from bentos.completion import Completion, CompletionResult, GenerationRequest, TokenNotifier
from bentos.errors import ServiceError
from bentos.grammar import GrammarCompiler
from bentos.limits import DEADLINE, MAX_ADAPTERS, MAX_BATCH, MAX_QUEUE
from bentos.metrics import Metrics, engine_gauges
from bentos.request_log import RequestLog
from bentos.schemas import BASE, TUNED, AdapterVersion, CanaryRequest, CanaryStatus, Structure
from bentos.shadow import Comparison, ShadowQueue
from bentos.shared_adapters import MANIFEST, Manifest
from gpt2core.checkpoint import load_pretrained
from gpt2core.config import GenerationConfig, Weights
from gpt2core.engine import Engine, EngineFull
from gpt2core.files import directory_sha256, list_files
from gpt2core.inference.detokenizer import IncrementalDetokenizer
from gpt2core.inference.request import EngineClosed
from gpt2core.metrics import exact_match, token_f1
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
            adapters_dir: directory below which other adapters may be loaded; "": no other adapters.
            base_sha256: adapters of another base are rejected.
            accept_other_base: adapters of another base are accepted, with a warning.
            follow_adapters: only `follow` may change adapters and canary; other changes are rejected.
        """
        self.tokenizer = load_tokenizer(base_dir)
        self._grammars = GrammarCompiler(self.tokenizer)
        self._metrics, self._request_log = metrics, request_log
        self._adapters_dir, self._follow_adapters = adapters_dir, follow_adapters
        self._adapters: dict[str, AdapterVersion] = {}
        self._canary = Canary()
        self._shadows = ShadowQueue(self._submit_shadow, self._compare_shadow, self._drop_shadow)
        self._changing = asyncio.Lock()
        model = load_pretrained(base_dir, device=best_device(), mapped=True)
        self.engine = Engine(model, MAX_BATCH, weights, MAX_QUEUE, base_sha256, accept_other_base)
        self._load(TUNED, Path(adapter_dir))
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

    @property
    def models(self) -> dict[str, AdapterVersion | None]:
        """Return the names that requests may use: base with the run's adapter, base alone, and loaded adapters."""
        return {TUNED: self._adapters[TUNED], BASE: None, **self._adapters}

    def check_model(self, name: str, param: str | None) -> None:
        """
        Raises:
            ServiceError: no model has that name.
        """
        if name not in self.models:
            message = f"there is no model {name!r}; available: {', '.join(self.models)}"
            raise ServiceError("model_not_found", message, param)

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
        requests = [self._canary.route(request) for request in requests]
        completions: list[Completion] = []
        self._shadows.interrupt()
        try:
            for request in requests:
                completions.append(self._submit(request, [self._observe, *([on_end] if on_end else [])]))
        except (EngineFull, EngineClosed, ValueError) as error:
            for completion in completions:
                completion.withdraw()
            raise self._engine_error(error, param) from None
        for _ in completions:
            self._shadows.request_started()
        return completions

    async def load(self, name: str, directory: str) -> AdapterVersion:
        """Load an adapter, or replace the adapter of this name. Running completions keep their adapter.

        Raises:
            ServiceError: the name is reserved, too many are loaded, or the directory holds no adapter for this base.
        """
        if not self._adapters_dir:
            raise ServiceError("forbidden", "loading adapters is disabled: GPT2_ADAPTERS_DIR is not set")
        self._check_not_following()
        if name in (TUNED, BASE):
            raise ServiceError("invalid_request", f"lora_name: {name} is reserved", "lora_name")
        try:
            path = self._find(directory)
        except FileNotFoundError as error:
            raise ServiceError("adapter_not_found", f"lora_path: {error}", "lora_path") from None
        async with self._changing:
            if name not in self._adapters and len(self._adapters) > MAX_ADAPTERS:
                message = f"{MAX_ADAPTERS} adapters are already loaded; unload one first"
                raise ServiceError("too_many_adapters", message, "lora_name")
            try:
                version = await asyncio.to_thread(self._load, name, path)
            except (ValueError, OSError) as error:
                raise ServiceError("invalid_adapter", f"lora_path: {error}", "lora_path") from None
            self._set_canary(self._canary.request)  # its adapter may be another version now
            return version

    async def unload(self, name: str) -> None:
        """Unload an adapter; running completions keep it.

        Raises:
            ServiceError: no adapter has that name, it is reserved, or it is the canary.
        """
        self._check_not_following()
        async with self._changing:
            if name in (TUNED, BASE):
                raise ServiceError("invalid_request", f"lora_name: {name} cannot be unloaded", "lora_name")
            self.check_model(name, "lora_name")
            if self._canary.adapter == name:
                raise ServiceError("invalid_request", f"lora_name: {name} is the canary; end it first", "lora_name")
            self._unload(name)

    async def set_canary(self, request: CanaryRequest | None) -> None:
        """Start a canary, change its share, or end it (None). Running completions keep their adapter.

        Raises:
            ServiceError: no adapter has that name.
        """
        self._check_not_following()
        async with self._changing:
            if request is not None and request.adapter not in self._adapters.keys() - {TUNED}:
                message = f"adapter: {request.adapter!r} is not loaded; load it with POST /v1/load_lora_adapter"
                raise ServiceError("adapter_not_found", message, "adapter")
            self._set_canary(request)

    def canary_status(self) -> CanaryStatus:
        return self._canary.status()

    async def follow(self, manifest: Manifest) -> None:
        """Serve the adapters and the canary of the manifest.

        No request fails: an adapter is loaded before requests are routed to it, and unloaded afterwards.

        Raises:
            ValueError, OSError: an adapter is missing, or differs from the manifest. Adapters that were loaded before
                stay loaded, and the canary does not change.
        """
        async with self._changing:
            for name, shared in manifest.adapters.items():
                loaded = self._adapters.get(name)
                if loaded is None or loaded.sha256 != shared.sha256:
                    await asyncio.to_thread(self._load, name, self._find(shared.path), shared.sha256)
            self._set_canary(manifest.canary)
            for name in self._adapters.keys() - {TUNED, *manifest.adapters}:
                self._unload(name)

    def metrics_text(self) -> str:
        """Return the engine's state as gauges, in the Prometheus text format."""
        return engine_gauges(self.engine)

    def _set_canary(self, request: CanaryRequest | None) -> None:
        names = [] if request is None else [TUNED, request.adapter]
        if self._canary.set(request, [self._adapters[name] for name in names]):
            self._shadows.clear()

    def _check_not_following(self) -> None:
        if self._follow_adapters:
            message = f"GPT2_FOLLOW_ADAPTERS is true: {MANIFEST} in GPT2_ADAPTERS_DIR says which adapters are served"
            raise ServiceError("forbidden", message)

    def _submit(self, request: GenerationRequest, on_end: Sequence[Callable[[CompletionResult], None]]) -> Completion:
        notifier = TokenNotifier(every_token=request.stream or bool(request.stop))
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
        detokenizer = IncrementalDetokenizer(
            self.tokenizer, request.stop, request.clean, request.config.stop_token_ids, request.config.min_tokens
        )
        return Completion(request, self.models[request.model], running, notifier, detokenizer, on_end)

    def _engine_error(self, error: Exception, param: str) -> ServiceError:
        if isinstance(error, EngineFull):
            self._metrics.refused.inc()
            return ServiceError("overloaded", str(error))
        if isinstance(error, EngineClosed):
            return ServiceError("shutting_down", "the service is shutting down; retry")
        return ServiceError("invalid_request", str(error), param)

    def _find(self, directory: str) -> Path:
        """Return the path of an adapter's directory.

        Raises:
            FileNotFoundError: the directory does not exist or is not below GPT2_ADAPTERS_DIR.
        """
        root = Path(self._adapters_dir).resolve()
        try:
            path = (root / directory).resolve()
            if root in path.parents and path.is_dir():
                return path
        except (OSError, ValueError, RuntimeError):  # too long a name, a NUL, a cycle of symbolic links
            pass
        raise FileNotFoundError(f"there is no directory {directory!r} below GPT2_ADAPTERS_DIR")

    def _load(self, name: str, directory: Path, sha256: str | None = None) -> AdapterVersion:
        files = list_files(directory, exclude=[MODEL_FILE])
        if name != TUNED:
            self._check_links(directory, files)
        version = AdapterVersion(name=name, sha256=directory_sha256(directory, files))
        if sha256 not in (None, version.sha256):
            raise ValueError(f"{directory} has the sha256 {version.sha256}, not {sha256} as {MANIFEST} says")
        self.engine.load_adapter(name, directory)
        self._adapters[name] = version
        return version

    def _check_links(self, directory: Path, files: Sequence[str]) -> None:
        """
        Raises:
            ValueError: a file is a symbolic link to a file outside of GPT2_ADAPTERS_DIR.
        """
        root = Path(self._adapters_dir).resolve()
        for file in files:
            if root not in (directory / file).resolve().parents:
                raise ValueError(f"{directory / file} is a link to a file outside of GPT2_ADAPTERS_DIR")

    def _unload(self, name: str) -> None:
        del self._adapters[name]
        self.engine.unload_adapter(name)

    def _observe(self, result: CompletionResult) -> None:
        try:
            self._metrics.observe(result)
            if self._request_log is not None:
                self._request_log.write(result, self.tokenizer.decode)
            self._canary.observe(result)
        finally:  # after an error too: a request that stays counted as in flight would stop shadow mode forever
            self._shadows.request_ended(result if self._canary.repeats(result) else None)

    def _submit_shadow(
        self, request: GenerationRequest, on_end: Sequence[Callable[[CompletionResult], None]]
    ) -> Completion:
        assert self._canary.adapter is not None  # waiting requests are dropped when the canary ends
        again = replace(request, model=self._canary.adapter, logprobs=0, stream=False, echo=None)
        try:
            return self._submit(replace(again, deadline=monotonic() + DEADLINE), on_end)
        except (EngineFull, EngineClosed, ValueError) as error:
            raise self._engine_error(error, "prompt") from None

    def _compare_shadow(self, answered: CompletionResult, shadow: CompletionResult, logprob: float | None) -> None:
        if not self._canary.observe(shadow):
            return  # the answer is from a version that has been replaced
        texts = [self.tokenizer.decode(result.answer) for result in (answered, shadow)]
        comparison = Comparison(shadow, exact_match(*texts) == 1, token_f1(*texts), logprob)
        if not shadow.failed:
            self._canary.observe_shadow(comparison)
        self._metrics.observe_shadow(comparison)
        if self._request_log is not None:
            self._request_log.write_shadow(comparison, texts[1])

    def _drop_shadow(self) -> None:
        self._canary.observe_dropped()
        self._metrics.dropped_shadows.inc()
