"""Chooses the tokens of a completion: the one place that applies the controls of `GenerationConfig`.

`generate` and the engine both use it, so they generate the same tokens. Shape letters: B rows, V tokens.
"""

from collections.abc import Sequence
from math import isfinite
from typing import Protocol

import torch
from torch import Tensor

from gpt2core.config import GenerationConfig, GPT2Config


class NonFiniteLogits(RuntimeError):
    """The logits of a completion are NaN or infinite, so no token can be chosen."""

    def __init__(self) -> None:
        super().__init__("the logits are NaN or infinite; the weights or the adapter overflow or have diverged")


class Grammar(Protocol):
    """What a completion must match, and how much of it is read. Belongs to one completion."""

    complete: bool  # nothing more may follow

    def allowed(self) -> bytes:
        """Which tokens may follow, at least one: bit i % 8, the lowest first, of byte i // 8 is that of token i."""

    def accept(self, token: int) -> None:
        """Read the next token."""


class Sampler:
    """Chooses the tokens of one completion, in order."""

    def __init__(
        self, config: GenerationConfig, prompt: Sequence[int], device: torch.device, grammar: Grammar | None = None
    ) -> None:
        self.config, self._prompt, self._device, self._grammar = config, prompt, device, grammar
        self._generator = _make_generator(config, device)
        self._biased = self._tensor([token for token, _ in config.logit_bias])
        self._bias = torch.tensor([float(bias) for _, bias in config.logit_bias], device=device)
        last = [stop[0] for stop in config.stop if len(stop) == 1]
        eos = [] if config.eos_id is None or config.ignore_eos else [config.eos_id]
        self._ending = self._tensor([*eos, *config.stop_token_ids, *last])
        self._has_controls = grammar is not None or bool(
            config.logit_bias
            or config.repetition_penalty != 1
            or config.presence_penalty
            or config.frequency_penalty
            or config.min_tokens
        )

    def choose(self, logits: Tensor, row: int, best: int | None, completion: Sequence[int]) -> int:
        """The token that follows `completion`, from row `row` of logits (B, V).

        Args:
            best: what `most_likely` found for the row.

        Raises:
            NonFiniteLogits: `best` is None.
            ValueError: the controls exclude every token.
        """
        if best is None:
            raise NonFiniteLogits
        if self._has_controls:
            scores = self._control(logits[row], completion)
            token = int(scores.argmax())
            if not scores[token].isfinite():
                raise ValueError("no token may follow: the controls of this request exclude all of them")
            if self.config.temperature > 0:
                token = int(draw(scores, token, self.config, self._generator))
        else:
            token = best if self.config.temperature == 0 else int(draw(logits[row], best, self.config, self._generator))
        if self._grammar is not None:
            self._grammar.accept(token)
        return token

    def has_ended(self, completion: Sequence[int]) -> bool:
        """Whether the completion, all of whose tokens this sampler chose, ends with its last token."""
        return ended(completion, self.config) or (self._grammar is not None and self._grammar.complete)

    def _control(self, logits: Tensor, completion: Sequence[int]) -> Tensor:
        """Logits (V) after every control that does not depend on the temperature, in the order of transformers."""
        config, logits = self.config, logits.clone()
        if config.logit_bias:
            logits[self._biased] += self._bias
        if config.repetition_penalty != 1:  # CTRL, arXiv:1909.05858, section 4.1; also of the prompt's tokens
            seen = self._tensor(sorted({*self._prompt, *completion}))
            scores = logits[seen]
            penalty = config.repetition_penalty
            logits[seen] = torch.where(scores < 0, scores * penalty, scores / penalty)
        if (config.presence_penalty or config.frequency_penalty) and completion:  # OpenAI's definition
            tokens, counts = self._tensor(completion).unique(return_counts=True)
            logits[tokens] -= config.frequency_penalty * counts + config.presence_penalty
        if len(completion) < config.min_tokens:
            logits[self._ending] = -torch.inf
        if self._grammar is not None:
            logits.masked_fill_(~_unpack(self._grammar.allowed(), len(logits)).to(self._device), -torch.inf)
        return logits

    def _tensor(self, tokens: Sequence[int]) -> Tensor:
        return torch.tensor(tokens, dtype=torch.long, device=self._device)


def most_likely(logits: Tensor) -> list[int | None]:
    """The most likely token of each row of logits (B, V); None where the largest logit is NaN or infinite."""
    largest, tokens = (column.tolist() for column in logits.max(-1))  # of a NaN, if there is one
    return [token if isfinite(value) else None for value, token in zip(largest, tokens, strict=True)]


def draw(logits: Tensor, best: int, config: GenerationConfig, generator: torch.Generator | None) -> Tensor:
    """A token () drawn from logits (V), whose largest is `best`, at a temperature above 0."""
    # relative to the largest and in fp64, so that no temperature above 0, however small, overflows
    logits = (logits - logits[best]).double() / config.temperature
    if config.top_k is not None and config.top_k < len(logits):
        logits = logits.masked_fill(logits < logits.topk(config.top_k).values[-1], -torch.inf)
    probabilities = logits.softmax(-1)
    if config.top_p is not None:
        # nucleus sampling, arXiv:1904.09751: the smallest set of tokens whose probabilities reach top_p
        ordered, order = probabilities.sort(descending=True, stable=True)
        beyond = ordered.cumsum(-1) - ordered >= config.top_p
        probabilities = probabilities.index_fill(0, order[beyond], 0.0)
    if config.min_p is not None:  # arXiv:2407.01082
        probabilities = probabilities.masked_fill(probabilities < config.min_p * probabilities.max(), 0.0)
    return torch.multinomial(probabilities, 1, generator=generator)[0]


def ended(completion: Sequence[int], config: GenerationConfig) -> bool:
    """Whether the completion ends with `eos_id`, one of `stop_token_ids`, or a whole stop sequence."""
    if not completion or len(completion) < config.min_tokens:
        return False
    if completion[-1] in config.stop_token_ids or (completion[-1] == config.eos_id and not config.ignore_eos):
        return True
    return any(tuple(completion[-len(stop) :]) == stop for stop in config.stop)


def _unpack(mask: bytes, n: int) -> Tensor:
    """The first n bits of a mask as bool (n)."""
    packed = torch.frombuffer(bytearray(mask), dtype=torch.uint8)
    return (packed[:, None] >> torch.arange(8, dtype=torch.uint8)).bitwise_and_(1).flatten()[:n].bool()


def check_tokens(config: GenerationConfig, model: GPT2Config) -> None:
    """
    Raises:
        ValueError: `logit_bias` or `stop_token_ids` contains an id that the model never generates.
    """
    for name, tokens in (("logit_bias", dict(config.logit_bias)), ("stop_token_ids", config.stop_token_ids)):
        for token in tokens:
            if not 0 <= token < model.token_count:
                raise ValueError(f"{name} contains the token id {token}; ids are from 0 to {model.token_count - 1}")


def _make_generator(config: GenerationConfig, device: torch.device) -> torch.Generator | None:
    """The random generator of one completion; None if it is greedy."""
    if config.temperature == 0:
        return None
    generator = torch.Generator(device)
    if config.seed is None:
        generator.seed()
    else:
        generator.manual_seed(config.seed)
    return generator
