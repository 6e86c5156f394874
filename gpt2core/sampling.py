"""Sampling: chooses the tokens of a completion, with all controls of `GenerationConfig`.

`generate` and the engine both use it, so they generate the same tokens. Shape letters: B rows, V tokens.
"""

from collections.abc import Sequence
from functools import cached_property
from math import inf
from typing import Protocol

import torch
from torch import Tensor

from gpt2core.config import GenerationConfig, GPT2Config
from gpt2core.tensors import to_device


class NonFiniteLogits(RuntimeError):
    """The logits of a completion are NaN or infinite, so no token can be chosen."""

    def __init__(self) -> None:
        super().__init__("the logits are NaN or infinite; the weights or the adapter overflow or have diverged")


class Grammar(Protocol):
    """A grammar that one completion must match, and its state after the tokens accepted so far."""

    complete: bool  # no further token is allowed

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
        self.generator = _make_generator(config, device)
        self.has_controls = grammar is not None or bool(
            config.logit_bias
            or config.repetition_penalty != 1
            or config.presence_penalty
            or config.frequency_penalty
            or config.min_tokens
        )

    @property
    def is_greedy(self) -> bool:
        """Whether every token is the most likely one."""
        return self.config.temperature == 0 and not self.has_controls

    def scores(self, logits: Tensor, completion: Sequence[int]) -> Tensor:
        """Logits (V) of the token that follows `completion`, after the controls."""
        return self._control(logits, completion) if self.has_controls else logits

    def accept(self, token: int) -> int:
        """Read the chosen token; returns it."""
        if self._grammar is not None:
            self._grammar.accept(token)
        return token

    def has_ended(self, completion: Sequence[int]) -> bool:
        """Whether the completion, all of whose tokens this sampler chose, ends with its last token."""
        return ended(completion, self.config) or (self._grammar is not None and self._grammar.complete)

    @cached_property
    def _ending(self) -> Tensor:
        """Tokens that end a completion by themselves."""
        last = [stop[0] for stop in self.config.stop if len(stop) == 1]
        eos = [] if self.config.eos_id is None or self.config.ignore_eos else [self.config.eos_id]
        return self._tensor([*eos, *self.config.stop_token_ids, *last])

    @cached_property
    def _bias(self) -> tuple[Tensor, Tensor]:
        """Tokens of logit_bias, and what is added to their logits."""
        biases = torch.tensor([float(bias) for _, bias in self.config.logit_bias])
        return self._tensor([token for token, _ in self.config.logit_bias]), to_device(biases, self._device)

    def _control(self, logits: Tensor, completion: Sequence[int]) -> Tensor:
        """Logits (V) after every control that does not depend on the temperature, in the order of transformers."""
        config, logits = self.config, logits.clone()
        if config.logit_bias:
            tokens, biases = self._bias
            logits[tokens] += biases
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
        return to_device(torch.tensor(tokens, dtype=torch.long), self._device)


def choose(
    samplers: Sequence[Sampler | None], logits: Tensor, best: Tensor, completions: Sequence[Sequence[int]]
) -> list[int | Exception]:
    """The next token of each completion, from logits (B, V); for a row that failed, its exception instead.

    The host synchronizes with the device once, apart from what controls need.

    Args:
        samplers: None for a row to ignore.
        best: what `most_likely` found, (B).
    """
    outputs: dict[int, int | Exception] = {i: 0 for i, sampler in enumerate(samplers) if sampler is None}
    special: dict[int, Tensor] = {}  # scores (V) by row
    for i, (sampler, completion) in enumerate(zip(samplers, completions, strict=True)):
        if sampler is not None and not sampler.is_greedy:
            try:
                special[i] = sampler.scores(logits[i], completion)
            except Exception as error:
                outputs[i] = error
    special_samplers = [sampler for i, sampler in enumerate(samplers) if sampler is not None and i in special]
    chosen = _choose_special(special_samplers, [*special.values()], [best[i : i + 1] for i in special])
    found: list[int] = torch.cat([best, *chosen]).tolist()  # waits for the device
    by_row = dict(zip(special, found[len(best) :], strict=True))
    for i, sampler in enumerate(samplers):
        if sampler is None or i in outputs:
            continue
        token = by_row.get(i, found[i])
        try:
            if found[i] < 0:
                raise NonFiniteLogits
            if token < 0:
                raise ValueError("no token may follow: the controls of this request exclude all of them")
            outputs[i] = sampler.accept(token)
        except Exception as error:
            outputs[i] = error
    return [outputs[i] for i in range(len(samplers))]


def _choose_special(samplers: Sequence[Sampler], scores: Sequence[Tensor], best: Sequence[Tensor]) -> list[Tensor]:
    """The tokens of n samplers from their scores (V), in parts (n'): -1 where no score is finite. `best`: n of (1)."""
    if scores and scores[0].device.type == "cpu":  # row by row, what is computed stays in the processor's cache
        return [_choose_batch([s], own[None], one) for s, own, one in zip(samplers, scores, best, strict=True)]
    return [_choose_batch(samplers, torch.stack([*scores]), torch.cat([*best]))] if scores else []


def _choose_batch(samplers: Sequence[Sampler], scores: Tensor, best: Tensor) -> Tensor:
    """The tokens (B) of samplers from their scores (B, V); `best` (B) are the most likely ones before the controls."""
    tokens = most_likely(scores) if any(sampler.has_controls for sampler in samplers) else best
    drawn = [i for i, sampler in enumerate(samplers) if sampler.generator is not None]
    if not drawn:
        return tokens
    rows = to_device(torch.tensor(drawn), scores.device)
    of_drawn = scores if len(drawn) == len(samplers) else scores[rows]
    probabilities = distribution(of_drawn, [samplers[i].config for i in drawn])
    random = draw(probabilities, [samplers[i].generator for i in drawn])
    return tokens.index_copy(0, rows, random.masked_fill(tokens[rows] < 0, -1))


def most_likely(logits: Tensor) -> Tensor:
    """The most likely token of each row of logits (B, V); -1 where the largest logit is NaN or infinite."""
    largest, tokens = logits.max(-1)  # of a NaN, if there is one
    return tokens.masked_fill(~largest.isfinite(), -1)


def distribution(logits: Tensor, configs: Sequence[GenerationConfig]) -> Tensor:
    """The distribution to sample from, for each row of logits (B, V): fp64, not normalized, temperature above 0."""
    V = logits.shape[1]
    top_k, top_p = [min(c.top_k or V, V) for c in configs], [inf if c.top_p is None else c.top_p for c in configs]
    settings = [(c.temperature, k, p, c.min_p or 0.0) for c, k, p in zip(configs, top_k, top_p, strict=True)]
    columns = to_device(torch.tensor(settings, dtype=torch.float64), logits.device)
    temperature, kept, nucleus, min_p = columns.T[..., None]  # four of (B, 1)
    # relative to the largest and in fp64, so that no temperature above 0, however small, overflows
    logits = (logits - logits.amax(-1, keepdim=True)).double().div_(temperature)
    if limits := [k for k in top_k if k < V]:
        values = logits.topk(max(limits)).values
        smallest = values.gather(1, kept.long().clamp(max=max(limits)) - 1)
        logits = logits.masked_fill((logits < smallest) & (kept < V), -torch.inf)
    probabilities = logits.softmax(-1)
    if any(p < inf for p in top_p):
        # nucleus sampling, arXiv:1904.09751: the smallest set of tokens whose probabilities reach top_p
        ordered, order = probabilities.sort(descending=True, stable=True)
        beyond = ordered.cumsum(-1) - ordered >= nucleus
        probabilities = probabilities.masked_fill(torch.empty_like(beyond).scatter_(1, order, beyond), 0.0)
    if any(c.min_p for c in configs):  # arXiv:2407.01082
        smallest = min_p * probabilities.amax(-1, keepdim=True)
        probabilities = probabilities.masked_fill(probabilities < smallest, 0.0)
    return probabilities


def draw(probabilities: Tensor, generators: Sequence[torch.Generator | None]) -> Tensor:
    """A token (B) per row of probabilities (B, V), each with its own random generator.

    The method of `torch.multinomial` for one sample: the largest of V quotients of probability and exponential random
    variable. That function takes one generator for all rows, and synchronizes with a GPU.
    """
    clocks = torch.empty_like(probabilities)
    for row, generator in zip(clocks, generators, strict=True):
        row.exponential_(generator=generator)
    return torch.div(probabilities, clocks, out=clocks).argmax(-1)


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
