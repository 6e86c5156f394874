"""Structured output: masks of the allowed next tokens, so that a completion matches a JSON schema, regex or choice.

llguidance computes the masks in a separate thread, while the engine's thread computes the next step's logits.
"""

import json
from concurrent.futures import Future, ThreadPoolExecutor

import llguidance
import llguidance.tiktoken
import tiktoken

from bentos.errors import ServiceError
from bentos.schemas import Structure


class GrammarCompiler:
    """Compiles grammars for one tokenizer. Thread-safe."""

    def __init__(self, tokenizer: tiktoken.Encoding) -> None:
        self._tokenizer = llguidance.tiktoken.lltokenizer_from_encoding(tokenizer, eos_token=tokenizer.eot_token)
        self._threads = ThreadPoolExecutor(1, "grammar")

    def compile(self, structure: Structure, n: int) -> "list[LlguidanceGrammar]":
        """For `n` completions.

        Raises:
            ServiceError: the schema, the regex or the choice is invalid, is not supported, or matches no text.
        """
        try:
            grammar = _source(structure)
            if error := llguidance.LLMatcher.validate_grammar(grammar, self._tokenizer):
                raise ValueError(error)
        except ValueError as error:
            raise _refused(structure.param, str(error)) from None
        matcher = llguidance.LLMatcher(self._tokenizer, grammar, log_level=0)
        first = matcher.compute_bitmask()  # fails if no token is allowed at the start
        if matcher.is_error():
            raise _refused(structure.param, f"no text matches it: {matcher.get_error()}")
        return [LlguidanceGrammar(matcher.deep_copy(), first, structure.param, self._threads) for _ in range(n)]

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)


class LlguidanceGrammar:
    """A `gpt2core.sampling.Grammar`."""

    def __init__(self, matcher: llguidance.LLMatcher, first: bytes, param: str, threads: ThreadPoolExecutor) -> None:
        """
        Args:
            first: the mask of the first token.
            param: the field of the request, for errors.
        """
        self._matcher, self._param, self._threads = matcher, param, threads
        self.complete = False
        self._mask: Future[bytes] | bytes = first

    def allowed(self) -> bytes:
        """
        Raises:
            ServiceError: the state of the grammar has become too large.
        """
        mask = self._mask if isinstance(self._mask, bytes) else self._mask.result()
        self._check()
        return mask

    def accept(self, token: int) -> None:
        self._matcher.consume_token(token)
        self._check()
        self.complete = self._matcher.is_stopped()
        if not self.complete:
            self._mask = self._threads.submit(self._matcher.compute_bitmask)

    def _check(self) -> None:
        if self._matcher.is_error():
            raise _refused(self._param, f"it cannot be followed: {self._matcher.get_error()}")


def _refused(param: str, reason: str) -> ServiceError:
    """Only the first line of the library's reason; the others describe its state."""
    return ServiceError("invalid_request", f"{param}: {reason.strip().splitlines()[0]}", param)


def _source(structure: Structure) -> str:
    if structure.kind == "json":
        schema = structure.value
        if isinstance(schema, str):
            schema = json.loads(schema)
        # The whitespace of json.dumps: otherwise a small model fills the token limit with line breaks.
        return llguidance.LLMatcher.grammar_from_json_schema(
            schema, overrides={"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
        )
    if structure.kind == "regex":
        return llguidance.LLMatcher.grammar_from_regex(structure.value)
    return llguidance.LLMatcher.grammar_from_lark("start: " + " | ".join(map(json.dumps, structure.value)))
