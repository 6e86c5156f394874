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
from gpt2core.tensors import to_device

SHORTLIST = 256  # tokens: if these suffice for top_k or top_p, the rest is not examined


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
            allowed = torch.frombuffer(bytearray(self._grammar.allowed()), dtype=torch.uint8).to(self._device)
            logits += _bit_biases(self._device).index_select(0, allowed.int()).flatten()[: len(logits)]
        return logits

    def _tensor(self, tokens: Sequence[int]) -> Tensor:
        return to_device(torch.tensor(tokens, dtype=torch.long), self._device)


def most_likely(logits: Tensor) -> Tensor:
    """The most likely token of each row of logits (B, V); -1 where the largest logit is NaN or infinite."""
    largest, tokens = logits.max(-1)  # of a NaN, if there is one
    return tokens.masked_fill(~largest.isfinite(), -1)


def choose(
    samplers: Sequence[Sampler | None],
    logits: Tensor,
    completions: Sequence[Sequence[int]],
    best: Tensor | None = None,
    argmax: Callable[[Tensor], Tensor] = most_likely,
) -> list[int | Exception]:
    """The next token of each completion, from logits (B, V); for a row that failed, its exception instead.

    The host synchronizes with the device once, apart from what controls need.

    Args:
        samplers: None for a row to ignore.
        best: what `argmax` finds, (B), if it is known.
        argmax: `most_likely`, or a faster function with its results.
    """
    best = argmax(logits) if best is None else best
    outputs: dict[int, int | Exception] = {i: 0 for i, sampler in enumerate(samplers) if sampler is None}
    special: dict[int, Tensor] = {}  # scores (V) by row
    for i, (sampler, completion) in enumerate(zip(samplers, completions, strict=True)):
        if sampler is not None and not sampler.is_greedy:
            try:
                special[i] = sampler.scores(logits[i], completion)
            except Exception as error:
                outputs[i] = error
    special_samplers = [sampler for i, sampler in enumerate(samplers) if sampler is not None and i in special]
    chosen = _choose_special(special_samplers, [*special.values()], [best[i : i + 1] for i in special], argmax)
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


def _choose_special(
    samplers: Sequence[Sampler],
    scores: Sequence[Tensor],
    best: Sequence[Tensor],
    argmax: Callable[[Tensor], Tensor],
) -> list[Tensor]:
    """The tokens of n samplers from their scores (V), in parts (n'): -1 where no score is finite. `best`: n of (1)."""
    if scores and scores[0].device.type == "cpu":  # row by row, what is computed stays in the processor's cache
        return [
            _choose_batch([sampler], own[None], one, argmax)
            for sampler, own, one in zip(samplers, scores, best, strict=True)
        ]
    return [_choose_batch(samplers, torch.stack([*scores]), torch.cat([*best]), argmax)] if scores else []


def _choose_batch(
    samplers: Sequence[Sampler], scores: Tensor, best: Tensor, argmax: Callable[[Tensor], Tensor]
) -> Tensor:
    """The tokens (B) of samplers from their scores (B, V); `best` (B) are the most likely ones before the controls."""
    tokens = argmax(scores) if any(sampler.has_controls for sampler in samplers) else best
    drawn = [i for i, sampler in enumerate(samplers) if sampler.random is not None]
    if not drawn:
        return tokens
    rows = to_device(torch.tensor(drawn), scores.device)
    of_drawn = scores if len(drawn) == len(samplers) else scores[rows]
    numbers = torch.tensor([sampler.random.random() for sampler in samplers if sampler.random], dtype=torch.float64)
    random = draw(*distribution(of_drawn, [samplers[i].config for i in drawn]), to_device(numbers, scores.device))
    return tokens.index_copy(0, rows, random.masked_fill(tokens[rows] < 0, -1))


def distribution(logits: Tensor, configs: Sequence[GenerationConfig]) -> tuple[Tensor, Tensor | None]:
    """The distributions to sample from, for logits (B, V) and temperatures above 0.

    Returns probabilities (B, n), fp32 and not normalized, and which tokens they are of, (B, n); None: all V, in order.
    """
    V = logits.shape[1]
    top_k, top_p = [min(c.top_k or V, V) for c in configs], [1.0 if c.top_p is None else c.top_p for c in configs]
    settings = [
        (max(c.temperature, 1e-30), k, inf if p == 1 else p, c.min_p or 0.0)
        for c, k, p in zip(configs, top_k, top_p, strict=True)
    ]
    columns = to_device(torch.tensor(settings, dtype=torch.float64), logits.device)
    temperature, kept, nucleus, min_p = columns.T.contiguous()[..., None]  # four of (B, 1)
    # relative to the largest, so that no temperature above 0, however small, overflows
    probabilities = (logits - logits.amax(-1, keepdim=True)).div_(temperature.float()).softmax(-1)
    tokens = None
    is_limited = min(top_p) < 1 or min(top_k) < V
    if is_limited and V > SHORTLIST and logits.device.type == "cpu":  # on a GPU, this would synchronize
        largest, indices = probabilities.topk(SHORTLIST)
        reached = largest.sum(-1, keepdim=True, dtype=torch.float64) >= nucleus
        if ((kept <= SHORTLIST) | ((kept == V) & reached)).all():
            probabilities, tokens = largest, indices
    if limits := [k for k in top_k if k < V]:
        largest = probabilities.topk(max(limits)).values if tokens is None else probabilities
        smallest = largest.gather(1, kept.long().clamp(max=max(limits)) - 1)
        probabilities.mul_((probabilities >= smallest).logical_or_(kept == V))
        probabilities.div_(probabilities.sum(-1, keepdim=True))
    if min(top_p) < 1:
        if tokens is None:
            probabilities = _nucleus(probabilities, nucleus)
        else:  # they are in order
            before = probabilities.cumsum(-1, dtype=torch.float64) - probabilities
            probabilities.masked_fill_(before >= nucleus, 0.0)
    if any(c.min_p for c in configs):  # arXiv:2407.01082
        probabilities.mul_(probabilities >= min_p.float() * probabilities.amax(-1, keepdim=True))
    if tokens is not None:  # in order, so that a random number selects the same token with and without a shortlist
        tokens, order = tokens.sort()
        probabilities = probabilities.gather(1, order)
    return probabilities, tokens


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


def draw(probabilities: Tensor, tokens: Tensor | None, numbers: Tensor) -> Tensor:
    """Draw a token (B) per row of a `distribution`: the first whose cumulative probability exceeds a random share.

    The shares are `numbers` (B), uniformly distributed from 0 to below 1, fp64.
    """
    sums = probabilities.cumsum(-1, dtype=torch.float64)
    place = torch.searchsorted(sums, numbers[:, None] * sums[:, -1:], right=True)
    return (place if tokens is None else tokens.gather(1, place))[:, 0]


def ended(completion: Sequence[int], config: GenerationConfig) -> bool:
    """Whether the completion ends with `eos_id`, one of `stop_token_ids`, or a whole stop sequence."""
    if not completion or len(completion) < config.min_tokens:
        return False
    if completion[-1] in config.stop_token_ids or (completion[-1] == config.eos_id and not config.ignore_eos):
        return True
    return any(tuple(completion[-len(stop) :]) == stop for stop in config.stop)


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
        for token in tokens:
            if not 0 <= token < model.token_count:
                raise ValueError(f"{name} contains the token id {token}; ids are from 0 to {model.token_count - 1}")
