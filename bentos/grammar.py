"""Structured output: masks of the allowed next tokens make a completion match a JSON schema, a regex or a choice.

llguidance computes the masks in a separate thread, while the engine's thread computes the next step's logits.
"""

import json
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from decimal import Decimal
from math import lcm
from typing import Any

import llguidance
import llguidance.tiktoken
import tiktoken

from bentos.errors import ServiceError
from bentos.limits import GRAMMAR_FUEL, MASK_TIMEOUT, MAX_MULTIPLE, MAX_PATTERNS, MAX_STRUCTURE
from bentos.schemas import Structure

_GENERAL = llguidance.LLTokenizer.general_slices()
# Regexes of token sets that llguidance tests as a whole, the most general one last. The set of letters and spaces makes
# the masks of patterns such as [A-Za-z ]+ 5 to 14 times as fast.
SLICES = (*_GENERAL[:-1], "[a-zA-Z ]{1,14}", _GENERAL[-1])


class GrammarCompiler:
    """Compiles grammars for one tokenizer. Thread-safe."""

    def __init__(self, tokenizer: tiktoken.Encoding) -> None:
        self._tokenizer = llguidance.tiktoken.lltokenizer_from_encoding(
            tokenizer, eos_token=tokenizer.eot_token, slices=[*SLICES]
        )
        self._limits = llguidance.LLParserLimits(initial_lexer_fuel=GRAMMAR_FUEL)
        self._masks = ThreadPoolExecutor(1, "grammar-masks")
        self._compiling = ThreadPoolExecutor(1, "grammar-compiler")

    def submit(self, structure: Structure, n: int) -> "Future[list[LlguidanceGrammar]]":
        """Run `compile` in a separate thread."""
        return self._compiling.submit(self.compile, structure, n)

    def compile(self, structure: Structure, n: int) -> "list[LlguidanceGrammar]":
        """Compile one grammar for each of `n` completions.

        Raises:
            ServiceError: the schema, the regex or the choice is invalid, is not supported, is too large, or matches no
                text.
        """
        try:
            grammar = _source(structure)
            if error := llguidance.LLMatcher.validate_grammar(grammar, self._tokenizer, limits=self._limits):
                raise ValueError(error)
        except (ValueError, RecursionError) as error:
            raise _grammar_error(structure.param, str(error)) from None
        matcher = llguidance.LLMatcher(self._tokenizer, grammar, log_level=0, limits=self._limits)
        first = matcher.compute_bitmask()  # fails if no token is allowed at the start
        if matcher.is_error():
            raise _grammar_error(structure.param, f"no text matches it: {matcher.get_error()}")
        return [LlguidanceGrammar(matcher.deep_copy(), first, structure.param, self._masks) for _ in range(n)]

    def close(self) -> None:
        for threads in (self._masks, self._compiling):
            threads.shutdown(wait=False, cancel_futures=True)


class LlguidanceGrammar:
    """Implements `gpt2core.sampling.Grammar` with an llguidance matcher."""

    def __init__(self, matcher: llguidance.LLMatcher, first: bytes, param: str, masks: ThreadPoolExecutor) -> None:
        """
        Args:
            first: the mask of the first token.
            param: the field of the request, for errors.
            masks: the thread pool that computes the masks of the other tokens.
        """
        self._matcher, self._param, self._masks = matcher, param, masks
        self.complete = False
        self._mask: Future[bytes] | bytes = first

    def allowed(self) -> bytes:
        """
        Raises:
            ServiceError: the state of the grammar is too large, or computing the mask takes too long.
        """
        try:
            mask = self._mask if isinstance(self._mask, bytes) else self._mask.result(MASK_TIMEOUT)
        except TimeoutError:  # the engine, and so every request, waits for this mask
            message = f"computing the allowed tokens took more than {MASK_TIMEOUT:g} seconds; simplify it"
            raise _grammar_error(self._param, message) from None
        self._check()
        return mask

    def accept(self, token: int) -> None:
        self._matcher.consume_token(token)
        self._check()
        self.complete = self._matcher.is_stopped()
        if not self.complete:
            self._mask = self._masks.submit(self._matcher.compute_bitmask)

    def _check(self) -> None:
        if self._matcher.is_error():
            raise _grammar_error(self._param, f"its allowed tokens cannot be computed: {self._matcher.get_error()}")


def _grammar_error(param: str, reason: str) -> ServiceError:
    """Return the error of a field, with the line of the library's message that has the cause, or the first line."""
    lines = reason.strip().splitlines()
    causes = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return ServiceError("invalid_request", f"{param}: {f'invalid regex: {causes[0]}' if causes else lines[0]}", param)


def _source(structure: Structure) -> str:
    text = structure.value if isinstance(structure.value, str) else json.dumps(structure.value, ensure_ascii=False)
    if len(text) > MAX_STRUCTURE:
        raise ValueError(f"it has {len(text)} characters; it must have at most {MAX_STRUCTURE}")
    if structure.kind == "json":
        schema = json.loads(text)
        _check_schema(schema)
        json.dumps(schema, allow_nan=False)  # raises ValueError for Infinity and NaN, which are not JSON
        # Allow only the whitespace of json.dumps: a small model can fill the token limit with line breaks.
        return llguidance.LLMatcher.grammar_from_json_schema(
            schema, overrides={"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
        )
    if structure.kind == "regex":
        return llguidance.LLMatcher.grammar_from_regex(structure.value)
    return llguidance.LLMatcher.grammar_from_lark("start: " + " | ".join(map(json.dumps, structure.value)))


def _check_schema(schema: Any) -> None:
    """Reject a schema that llguidance would compile for minutes, with growing memory, or not follow exactly.

    Raises:
        ValueError: the schema has too many patterns, `multipleOf` values with a too large common multiple, or options
            of llguidance, such as the one that ignores keywords that it does not support.
    """
    if isinstance(schema, dict) and "x-guidance" in schema:
        raise ValueError("x-guidance is not supported")
    patterns, multiple = set[str](), 1
    for one in _objects(schema):
        patterns |= {value for key in ("pattern", "format") if isinstance(value := one.get(key), str)}
        if isinstance(by_pattern := one.get("patternProperties"), dict):
            patterns |= by_pattern.keys()
        if isinstance(step := one.get("multipleOf"), int | float) and not isinstance(step, bool):
            multiple = lcm(multiple, _digits(step) or 1)
    if len(patterns) > MAX_PATTERNS:
        raise ValueError(f"it has {len(patterns)} different patterns and formats; it must have at most {MAX_PATTERNS}")
    if multiple > MAX_MULTIPLE:
        raise ValueError(
            f"the least common multiple of its multipleOf, without decimal points, must be at most {MAX_MULTIPLE}"
        )


def _objects(value: Any) -> Iterator[dict[str, Any]]:
    """Yield all objects in a JSON value, including the value itself. Not recursive."""
    left = [value]
    while left:
        one = left.pop()
        if isinstance(one, dict):
            yield one
            left += one.values()
        elif isinstance(one, list):
            left += one


def _digits(number: float) -> int:
    """Return the digits of a finite number as an integer: 25 for 2.5, and 1 for 0.001."""
    _, digits, exponent = Decimal(str(number)).as_tuple()
    if not isinstance(exponent, int):
        raise ValueError(f"multipleOf is {number}; it must be finite")
    return int("".join(map(str, digits))) * 10 ** max(exponent, 0)
