"""Sampling: chooses the tokens of a completion, with all controls of `GenerationConfig`.

`generate` and the engine both use it, so they generate the same tokens. Shape letters: B rows, V tokens.
"""

from collections.abc import Callable, Sequence
from functools import cache, cached_property
from math import inf
from random import Random
from typing import Protocol

import torch
from torch import Tensor

from gpt2core.config import GenerationConfig, GPT2Config
from gpt2core.tensors import int_tensor, read_later, to_device


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
        # on the host: a seed gives the same numbers on every device, and one copy moves those of all rows
        self.random = None if config.temperature == 0 else Random(config.seed)  # noqa: S311
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
            allowed = to_device(torch.frombuffer(bytearray(self._grammar.allowed()), dtype=torch.uint8), self._device)
            logits += _bit_biases(self._device).index_select(0, allowed.int()).flatten()[: len(logits)]
        return logits

    def _tensor(self, tokens: Sequence[int]) -> Tensor:
        return to_device(int_tensor(tokens), self._device)


def most_likely(logits: Tensor) -> Tensor:
    """The most likely token of each row of logits (B, V); -1 where the largest logit is NaN or infinite."""
    largest, tokens = logits.max(-1)  # of a NaN, if there is one
    return tokens.masked_fill(~largest.isfinite(), -1)


def draw(scores: Sequence[Tensor], configs: Sequence[GenerationConfig], numbers: Sequence[float]) -> Tensor:
    """A token (n) for each of n scores (V), with temperatures above 0.

    It is the first one at which the sum of the probabilities exceeds a share of their total. The shares are `numbers`,
    uniformly distributed from 0 to below 1.
    """
    if len(scores) > 1 and scores[0].device.type == "cpu":  # row by row, intermediate results stay in the cache
        return torch.cat([draw([s], [c], [n]) for s, c, n in zip(scores, configs, numbers, strict=True)])
    sums = distribution(torch.stack([*scores]), configs).cumsum(-1, dtype=torch.float64)
    shares = to_device(torch.tensor(numbers, dtype=torch.float64), sums.device)[:, None]
    return torch.searchsorted(sums, shares * sums[:, -1:], right=True)[:, 0]


def choose(
    samplers: Sequence[Sampler | None],
    logits: Tensor,
    completions: Sequence[Sequence[int]],
    best: Tensor | None = None,
    most_likely: Callable[[Tensor], Tensor] = most_likely,
    draw: Callable[[Sequence[Tensor], Sequence[GenerationConfig], Sequence[float]], Tensor] = draw,
    ahead: Callable[[Tensor], None] | None = None,
) -> list[int | Exception]:
    """The next token of each completion, from logits (B, V); for a row that failed, its exception instead.

    The host synchronizes with the device once, apart from what controls need.

    Args:
        samplers: None for a row to ignore.
        best: what `most_likely` finds, (B), if it is known.
        most_likely, draw: the functions of this module, or faster ones with their results.
        ahead: called with the tokens (B) before the host waits for them; those of rows that fail are not ids.
    """
    best = most_likely(logits) if best is None else best
    outputs: dict[int, int | Exception] = {}
    scores: dict[int, Tensor] = {}  # of rows that are not greedy
    used = {i: sampler for i, sampler in enumerate(samplers) if sampler is not None}
    for i, sampler in used.items():
        try:
            if not sampler.is_greedy:
                scores[i] = sampler.scores(logits[i], completions[i])
        except Exception as error:
            outputs[i] = error
    controlled = [i for i in scores if used[i].has_controls]
    drawn = {i: sampler.random.random() for i in scores if (sampler := used[i]).random is not None}
    parts = [best]
    if controlled:
        parts.append(most_likely(torch.stack([scores[i] for i in controlled])))
    if drawn:
        parts.append(draw([scores[i] for i in drawn], [used[i].config for i in drawn], [*drawn.values()]))
    on_device = torch.cat(parts)
    reading = read_later(on_device)
    if ahead is not None:
        chosen = on_device
        if scores:
            places = {i: k for k, i in enumerate([*range(len(best)), *controlled, *drawn])}  # the last one counts
            index = int_tensor([places[i] for i in range(len(best))])
            chosen = on_device.index_select(0, to_device(index, best.device))
        ahead(chosen)
    found: list[int] = reading()
    likely, others = found[: len(best)], found[len(best) :]
    after_controls = dict(zip(controlled, others[: len(controlled)], strict=True))
    tokens = dict(zip(drawn, others[len(controlled) :], strict=True))
    for i, sampler in used.items():
        if i in outputs:
            continue
        token = after_controls.get(i, likely[i])
        try:
            if likely[i] < 0:
                raise NonFiniteLogits
            if token < 0:
                raise ValueError("no token may follow: the controls of this request exclude all of them")
            token = tokens.get(i, token)
            if token >= logits.shape[1]:  # would fail the next step, and so every request of it
                last = logits.shape[1] - 1
                raise RuntimeError(f"token {token} was drawn, but the ids of the model are from 0 to {last}")
            outputs[i] = sampler.accept(token)
        except Exception as error:
            outputs[i] = error
    return [outputs.get(i, 0) for i in range(len(samplers))]


def sampling_values(config: GenerationConfig, vocab_size: int) -> tuple[float, int, float, float]:
    """temperature (neither 0 nor inf in fp32), top_k, top_p and min_p; without effect where they are not set."""
    temperature = min(max(config.temperature, 1e-30), 1e30)  # -inf, of an excluded token, / inf would be NaN
    top_p = 1.0 if config.top_p is None else config.top_p
    return temperature, min(config.top_k or vocab_size, vocab_size), top_p, config.min_p or 0.0


def distribution(logits: Tensor, configs: Sequence[GenerationConfig]) -> Tensor:
    """The probabilities (B, V) to sample from, fp32 and not normalized, for logits (B, V) and temperatures above 0."""
    V = logits.shape[1]
    settings = [sampling_values(config, V) for config in configs]
    _, top_k, top_p, smallest_p = zip(*settings, strict=True)
    columns = to_device(torch.tensor(settings, dtype=torch.float64), logits.device)
    temperature, kept, nucleus, min_p = columns.T.contiguous()[..., None]  # four of (B, 1)
    # relative to the largest, so that no temperature above 0, however small, overflows
    probabilities = (logits - logits.amax(-1, keepdim=True)).div_(temperature.float()).softmax(-1)
    if limits := [k for k in top_k if k < V]:
        smallest = probabilities.topk(max(limits)).values.gather(1, kept.long().clamp(max=max(limits)) - 1)
        probabilities.mul_((probabilities >= smallest).logical_or_(kept == V))
        probabilities.div_(probabilities.sum(-1, keepdim=True))
    if min(top_p) < 1:
        probabilities = _nucleus(probabilities, nucleus.masked_fill(nucleus == 1, inf))
    if any(smallest_p):  # arXiv:2407.01082
        probabilities.mul_(probabilities >= min_p.float() * probabilities.amax(-1, keepdim=True))
    return probabilities


def _nucleus(probabilities: Tensor, top_p: Tensor) -> Tensor:
    """Nucleus sampling, arXiv:1904.09751: 0 for tokens outside the smallest set whose sum reaches top_p (B, 1).

    A radix selection, many times faster than sorting V probabilities (B, V): floats from 0 to 1 have the order of
    their lowest 30 bits. Tokens exactly as likely as the last one are kept.
    """
    bits, missing, candidates = probabilities.view(torch.int32), top_p, probabilities.double()
    last = torch.zeros_like(top_p, dtype=torch.int32)  # the known leading bits of the least likely token of the set
    for shift in (20, 10, 0):
        digits = bits.bitwise_right_shift(shift).bitwise_and(1023)
        sums = candidates.new_zeros(len(bits), 1024).scatter_add_(1, 1023 - digits.long(), candidates)
        reached = sums.cumsum(-1)  # from the largest digit down
        place = torch.searchsorted(reached, missing).clamp_(max=1023)
        missing = missing - (reached - sums).gather(1, place)
        last = 1024 * last + 1023 - place.int()
        candidates = torch.where(digits == 1023 - place, candidates, 0.0)
    return torch.where(bits >= last, probabilities, 0.0)


def ended(completion: Sequence[int], config: GenerationConfig) -> bool:
    """Whether the completion ends with `eos_id`, one of `stop_token_ids`, or a whole stop sequence."""
    if not completion or len(completion) < config.min_tokens:
        return False
    if completion[-1] in config.stop_token_ids or (completion[-1] == config.eos_id and not config.ignore_eos):
        return True
    return bool(config.stop) and any(tuple(completion[-len(stop) :]) == stop for stop in config.stop)


@cache
def _bit_biases(device: torch.device) -> Tensor:
    """What is added to 8 logits for each byte of a mask (256, 8): 0 where bit i of the byte is set, otherwise -inf."""
    bits = torch.arange(256)[:, None] >> torch.arange(8) & 1
    return bits.double().log().float().to(device)


def check_tokens(config: GenerationConfig, model: GPT2Config) -> None:
    """
    Raises:
        ValueError: `logit_bias` or `stop_token_ids` contains an id that the model never generates.
    """
    for name, tokens in (("logit_bias", dict(config.logit_bias)), ("stop_token_ids", config.stop_token_ids)):
        for token in (min(tokens), max(tokens)) if tokens else ():
            if not 0 <= token < model.token_count:
                raise ValueError(f"{name} contains the token id {token}; ids are from 0 to {model.token_count - 1}")
