"""Batched decoding: prefill, then one token per step with a KV cache. The simple reference for `gpt2core.engine`."""

import reprlib
from collections.abc import Iterator, Sequence
from operator import index

import torch
from torch import Tensor

from gpt2core.config import GenerationConfig, GPT2Config
from gpt2core.model import GPT2, KVCache, evaluating


class NonFiniteLogits(RuntimeError):
    """The logits of a completion are NaN or infinite, so no token can be chosen."""

    def __init__(self) -> None:
        super().__init__("the logits are NaN or infinite; the weights or the adapter overflow or have diverged")


def generate(model: GPT2, prompts: Sequence[Sequence[int]], config: GenerationConfig) -> list[list[int]]:
    """The completion of each prompt: new tokens only, including the token that ended it (`eos_id` or a stop's last).

    A completion ends at `eos_id`, at a `stop` sequence, after `max_new_tokens`, or when the context is full. Prompts
    are decoded as one batch and do not affect each other: each has its own random generator.

    Ids from `config.token_count` of the model on belong to no token of its tokenizer and are never generated.

    Raises:
        TypeError: a prompt is not a sequence of token ids, but for example text.
        ValueError: a prompt is empty, fills the whole context, or contains an id outside the vocabulary.
        NonFiniteLogits: the model's weights have diverged.
    """
    completions: list[list[int]] = [[] for _ in prompts]
    for step in decode(model, prompts, config):
        for row, token in step:
            completions[row].append(token)
    return completions


def stream(model: GPT2, prompt: Sequence[int], config: GenerationConfig) -> Iterator[int]:
    """Yield the tokens of `generate` for one prompt as they are computed; closing the iterator stops decoding."""
    for step in decode(model, [prompt], config):
        for _, token in step:
            yield token


def decode(model: GPT2, prompts: Sequence[Sequence[int]], config: GenerationConfig) -> Iterator[list[tuple[int, int]]]:
    """Yield one list of (prompt index, new token) per step, for the completions that have not ended."""
    for prompt in prompts:
        check_prompt(prompt, model.config)
    return _decode(model, prompts, config) if prompts else iter(())


def check_prompt(prompt: Sequence[int], config: GPT2Config) -> None:
    """
    Raises:
        TypeError, ValueError: as `generate`.
    """
    try:
        if isinstance(prompt, str | bytes):
            raise TypeError
        ids = [index(token) for token in prompt]
    except TypeError:
        raise TypeError(
            f"a prompt is {reprlib.repr(prompt)}; it must be a list of token ids: encode text with the tokenizer first"
        ) from None
    if not ids:
        raise ValueError("a prompt is empty; it needs at least one token")
    if len(ids) >= config.n_positions:
        raise ValueError(f"prompt has {len(ids)} tokens but n_positions is {config.n_positions}; shorten the input")
    if not 0 <= min(ids) <= max(ids) < config.vocab_size:
        raise ValueError(
            f"a prompt contains a token id outside 0...{config.vocab_size - 1}; was it encoded by another tokenizer?"
        )


def _decode(model: GPT2, prompts: Sequence[Sequence[int]], config: GenerationConfig) -> Iterator[list[tuple[int, int]]]:
    device = model.wte.weight.device
    T = max(map(len, prompts))
    input_ids = torch.zeros(len(prompts), T, dtype=torch.long)
    attention_mask = torch.zeros(len(prompts), T, dtype=torch.long)
    for row, prompt in enumerate(prompts):  # padded on the left: all completions grow at the same column
        input_ids[row, T - len(prompt) :] = torch.tensor(prompt)
        attention_mask[row, T - len(prompt) :] = 1
    input_ids, attention_mask = input_ids.to(device), attention_mask.to(device)

    generators = [make_generator(config, device) for _ in prompts]
    limits = [min(config.max_new_tokens, model.config.n_positions - len(prompt)) for prompt in prompts]
    completions: list[list[int]] = [[] for _ in prompts]
    active = list(range(len(prompts)))  # prompt index of each row of the batch
    padded = min(map(len, prompts)) < T
    # With padding there may be more columns than n_positions; positions stay below it.
    cache = KVCache(model, len(prompts), T + max(limits) - 1)
    while active:
        with evaluating(model):  # per step: between steps the model has the caller's mode
            logits = _last_logits(model, input_ids, attention_mask if padded else None, cache)  # (B, V)
            tokens = [int(sample_token(logits[i], config, generators[row])) for i, row in enumerate(active)]
        step = list(zip(active, tokens, strict=True))
        for row, token in step:
            completions[row].append(token)
        yield step
        keep = [
            i
            for i, row in enumerate(active)
            if len(completions[row]) < limits[row] and not ended(completions[row], config)
        ]
        if not keep:
            return
        if len(keep) < len(active):
            rows = torch.tensor(keep, device=device)
            cache.keep(rows)
            attention_mask = attention_mask[rows]
            active = [active[i] for i in keep]
        input_ids = torch.tensor([[tokens[i]] for i in keep], device=device)
        attention_mask = torch.cat([attention_mask, attention_mask.new_ones(len(keep), 1)], -1)


@torch.inference_mode()
def _last_logits(model: GPT2, input_ids: Tensor, attention_mask: Tensor | None, cache: KVCache) -> Tensor:
    """Logits (B, token_count) of the last position in fp32; the head is not computed for the others."""
    return model.head(model.hidden(input_ids, attention_mask, cache)[:, -1])[:, : model.config.token_count].float()


def sample_token(logits: Tensor, config: GenerationConfig, generator: torch.Generator | None) -> Tensor:
    """A token id () from logits (V): the most likely one at temperature 0, else drawn after top_k and top_p.

    Raises:
        NonFiniteLogits: the largest logit is NaN or infinite.
    """
    best = logits.argmax()  # of a NaN, if there is one
    if not logits[best].isfinite():
        raise NonFiniteLogits
    if config.temperature == 0:
        return best
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
    return torch.multinomial(probabilities, 1, generator=generator)[0]


def ended(completion: Sequence[int], config: GenerationConfig) -> bool:
    """Whether the completion ends with `eos_id` or a whole stop sequence."""
    if completion and completion[-1] == config.eos_id:
        return True
    return any(tuple(completion[-len(stop) :]) == stop for stop in config.stop)


def make_generator(config: GenerationConfig, device: torch.device) -> torch.Generator | None:
    """The random generator of one completion; None if it is greedy."""
    if config.temperature == 0:
        return None
    generator = torch.Generator(device)
    if config.seed is None:
        generator.seed()
    else:
        generator.manual_seed(config.seed)
    return generator
