"""Sampling: choose the next token of each completion by the parameters of `GenerationConfig`.

`generate` and the engine both use it, so they generate the same tokens. Logits processors change the logits before a
token is chosen: logit_bias, the penalties, min_tokens and a grammar. Shape letters: B rows, V tokens.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import cache, cached_property
from math import inf
from random import Random
from typing import Protocol

import torch
from torch import Tensor

from gpt2core.config import GenerationConfig, GPT2Config
from gpt2core.tensors import copy_to_host_async, int_tensor, to_device


class NonFiniteLogits(RuntimeError):
    """The logits of a completion are NaN or infinite, so no token can be chosen."""

    def __init__(self) -> None:
        super().__init__("the logits are NaN or infinite; the weights or the adapter overflow or have diverged")


class Grammar(Protocol):
    """A grammar that one completion must match. It holds the state after the accepted tokens."""

    complete: bool  # no further token is allowed

    def allowed(self) -> bytes:
        """Return a bit mask of the tokens that may follow, at least one.

        Token i has bit i % 8 of byte i // 8, where bit 0 is the lowest.
        """

    def accept(self, token: int) -> None:
        """Advance the state by the next token."""


class Sampler:
    """Chooses the tokens of one completion, in order."""

    def __init__(
        self, config: GenerationConfig, prompt: Sequence[int], device: torch.device, grammar: Grammar | None = None
    ) -> None:
        self.config, self._prompt, self._device, self._grammar = config, prompt, device, grammar
        # Random numbers are drawn on the host: a seed then gives the same numbers on every device, and one copy to the
        # device suffices for all rows.
        self.random = None if config.temperature == 0 else Random(config.seed)  # noqa: S311
        self.has_processors = grammar is not None or bool(
            config.logit_bias
            or config.repetition_penalty != 1
            or config.presence_penalty
            or config.frequency_penalty
            or config.min_tokens
        )

    def accept(self, token: int) -> int:
        """Advance the grammar by the chosen token, and return the token."""
        if self._grammar is not None:
            self._grammar.accept(token)
        return token

    def has_ended(self, completion: Sequence[int]) -> bool:
        """Return whether the last token finishes the completion. This sampler must have chosen all of its tokens."""
        return ended(completion, self.config) or (self._grammar is not None and self._grammar.complete)

    @cached_property
    def _ending(self) -> Tensor:
        """Ids of the tokens that finish a completion by themselves."""
        last = [stop[0] for stop in self.config.stop if len(stop) == 1]
        eos = [] if self.config.eos_id is None or self.config.ignore_eos else [self.config.eos_id]
        return self._tensor([*eos, *self.config.stop_token_ids, *last])

    @cached_property
    def _bias(self) -> tuple[Tensor, Tensor]:
        """Token ids (n) of logit_bias, and the values (n) to add to their logits."""
        biases = torch.tensor([float(bias) for _, bias in self.config.logit_bias])
        return self._tensor([token for token, _ in self.config.logit_bias]), to_device(biases, self._device)

    def process(self, logits: Tensor, completion: Sequence[int]) -> None:
        """Apply all processors, in the order of transformers, to the logits (V) of the token after `completion`."""
        config = self.config
        if config.logit_bias:
            tokens, biases = self._bias
            logits[tokens] += biases
        if config.repetition_penalty != 1:  # CTRL, arXiv:1909.05858, section 4.1; prompt tokens count too
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

    def _tensor(self, tokens: Sequence[int]) -> Tensor:
        return to_device(int_tensor(tokens), self._device)


def most_likely(logits: Tensor) -> Tensor:
    """Return the most likely token of each row of logits (B, V); -1 where the largest logit is NaN or infinite."""
    largest, tokens = logits.max(-1)  # max propagates NaN: a row with a NaN has the maximum NaN
    return tokens.masked_fill(~largest.isfinite(), -1)


def draw(scores: Sequence[Tensor], configs: Sequence[GenerationConfig], numbers: Sequence[float]) -> Tensor:
    """Sample one token (n) per row of scores, logits (V) after the processors, by inverse transform sampling.

    The token is the first one at which the cumulative sum of the probabilities exceeds number * total.

    Args:
        configs: temperatures must be above 0.
        numbers: one uniform random number in [0, 1) per row.
    """
    if len(scores) > 1 and scores[0].device.type == "cpu":  # row by row: intermediate results stay in the CPU's cache
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
    """Choose the next token of each completion from logits (B, V). The result of a row that failed is its exception.

    The host synchronizes with the device once per call; logits processors can add synchronizations.

    Args:
        samplers: None: ignore the row; its result is meaningless.
        best: the result (B) of `most_likely`, if it was computed before.
        most_likely, draw: implementations of argmax and sampling; the native kernels replace the defaults.
        ahead: callback that gets the tokens (B) on the device before they are copied to the host, for asynchronous
            scheduling. The tokens of rows that failed are not valid ids.
    """
    best = most_likely(logits) if best is None else best
    used = {i: sampler for i, sampler in enumerate(samplers) if sampler is not None}
    processed = [i for i, sampler in used.items() if sampler.has_processors]
    scores, outputs = _process(used, processed, logits, completions)
    numbers = {i: sampler.random for i, sampler in used.items() if i not in outputs}
    drawn = {i: random.random() for i, random in numbers.items() if random is not None}
    parts = [best]
    if processed:
        parts.append(most_likely(scores))
    if drawn:
        rows = {i: logits[i] for i in drawn} | dict(zip(processed, scores, strict=True))
        parts.append(draw([rows[i] for i in drawn], [used[i].config for i in drawn], [*drawn.values()]))
    candidates = torch.cat(parts)  # of every row, then of the rows `processed`, then of the rows `drawn`
    reading = copy_to_host_async(candidates)
    if ahead is not None:
        ahead(_last_candidates(candidates, [*range(len(best)), *processed, *drawn]) if len(parts) > 1 else candidates)
    read: list[int] = reading()
    likely, others = read[: len(best)], read[len(best) :]
    after_processing = dict(zip(processed, others, strict=False))
    sampled = dict(zip(drawn, others[len(processed) :], strict=True))
    for i in used.keys() - outputs.keys():
        try:
            outputs[i] = used[i].accept(_token(likely[i], after_processing.get(i), sampled.get(i), logits.shape[1]))
        except Exception as error:
            outputs[i] = error
    return [outputs.get(i, 0) for i in range(len(samplers))]


def _process(
    samplers: Mapping[int, Sampler], rows: Sequence[int], logits: Tensor, completions: Sequence[Sequence[int]]
) -> tuple[Tensor, dict[int, int | Exception]]:
    """Return the processed logits (n, V) of these rows, and {row: exception} of rows whose processors failed."""
    scores = logits.index_select(0, to_device(int_tensor(rows), logits.device)) if rows else logits[:0]
    failed: dict[int, int | Exception] = {}
    for i, row_scores in zip(rows, scores, strict=True):
        try:
            samplers[i].process(row_scores, completions[i])
        except Exception as error:
            failed[i] = error
    return scores, failed


def _last_candidates(candidates: Tensor, rows: Sequence[int]) -> Tensor:
    """Return the last candidate (B) of each row. `rows` has the row of each candidate."""
    places = {row: place for place, row in enumerate(rows)}
    index = int_tensor([places[row] for row in range(len(places))])
    return candidates.index_select(0, to_device(index, candidates.device))


def _token(likely: int, after_processing: int | None, sampled: int | None, vocab_size: int) -> int:
    """Return the token of a row, which is the last of its candidates.

    Args:
        likely: the result of `most_likely` for the row's logits.
        after_processing: the same for its logits after the processors. None: it has no processors.
        sampled: the token that was drawn. None: the row is not sampled.
    """
    if likely < 0:
        raise NonFiniteLogits
    if after_processing is not None and after_processing < 0:
        raise ValueError("no token may follow: the logits processors of this request exclude all of them")
    token = likely if after_processing is None else after_processing
    token = token if sampled is None else sampled
    if token >= vocab_size:  # it would fail the next step, and so every request of the step
        raise RuntimeError(f"token {token} was drawn, but the ids of the model are from 0 to {vocab_size - 1}")
    return token


def sampling_values(config: GenerationConfig, vocab_size: int) -> tuple[float, int, float, float]:
    """Return temperature, top_k, top_p and min_p; fields that are not set get values without effect.

    The temperature is clamped, so that it is neither 0 nor infinite in fp32.
    """
    temperature = min(max(config.temperature, 1e-30), 1e30)  # an excluded token's logit is -inf, and -inf / inf is NaN
    top_p = 1.0 if config.top_p is None else config.top_p
    return temperature, min(config.top_k or vocab_size, vocab_size), top_p, config.min_p or 0.0


def distribution(logits: Tensor, configs: Sequence[GenerationConfig]) -> Tensor:
    """Compute the probabilities (B, V), in fp32 and not normalized, to sample from.

    The logits are (B, V), and the temperatures must be above 0.
    """
    V = logits.shape[1]
    settings = [sampling_values(config, V) for config in configs]
    _, top_k, top_p, smallest_p = zip(*settings, strict=True)
    columns = to_device(torch.tensor(settings, dtype=torch.float64), logits.device)
    temperature, k, p, min_p = columns.T.contiguous()[..., None]  # four of (B, 1)
    # Logits are taken relative to the largest one, so that the division cannot overflow, however small the temperature.
    probabilities = (logits - logits.amax(-1, keepdim=True)).div_(temperature.float()).softmax(-1)
    if limits := [k for k in top_k if k < V]:
        smallest = probabilities.topk(max(limits)).values.gather(1, k.long().clamp(max=max(limits)) - 1)
        probabilities.mul_((probabilities >= smallest).logical_or_(k == V))
        probabilities.div_(probabilities.sum(-1, keepdim=True))
    if min(top_p) < 1:
        probabilities = _nucleus(probabilities, p.masked_fill(p == 1, inf))
    if any(smallest_p):  # arXiv:2407.01082
        probabilities.mul_(probabilities >= min_p.float() * probabilities.amax(-1, keepdim=True))
    return probabilities


def _nucleus(probabilities: Tensor, top_p: Tensor) -> Tensor:
    """Nucleus sampling, arXiv:1904.09751: set tokens outside the smallest set whose sum reaches top_p (B, 1) to 0.

    The set is found by radix selection, which is many times faster than sorting V probabilities (B, V). It works on the
    lowest 30 bits of the floats, which have the same order as the floats from 0 to 1. Tokens exactly as likely as the
    last one of the set are kept.
    """
    bits, missing, candidates = probabilities.view(torch.int32), top_p, probabilities.double()
    last = torch.zeros_like(top_p, dtype=torch.int32)  # leading bits, found so far, of the set's least likely token
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
    """Return whether the completion ends with `eos_id`, one of `stop_token_ids`, or a complete stop sequence."""
    if not completion or len(completion) < config.min_tokens:
        return False
    if completion[-1] in config.stop_token_ids or (completion[-1] == config.eos_id and not config.ignore_eos):
        return True
    return bool(config.stop) and any(tuple(completion[-len(stop) :]) == stop for stop in config.stop)


@cache
def _bit_biases(device: torch.device) -> Tensor:
    """Return the values (256, 8) to add to the 8 logits of each byte of a mask: 0 if bit i is set, otherwise -inf."""
    bits = torch.arange(256)[:, None] >> torch.arange(8) & 1
    return bits.double().log().float().to(device)


def check_tokens(config: GenerationConfig, model: GPT2Config) -> None:
    """Check the token ids in a config.

    Raises:
        ValueError: `logit_bias` or `stop_token_ids` contains an id that the model never generates.
    """
    for name, tokens in (("logit_bias", dict(config.logit_bias)), ("stop_token_ids", config.stop_token_ids)):
        for token in (min(tokens), max(tokens)) if tokens else ():
            if not 0 <= token < model.token_count:
                raise ValueError(f"{name} contains the token id {token}; ids are from 0 to {model.token_count - 1}")
