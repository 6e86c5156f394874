"""Decoding: prefill, then one token a step against a key-value cache. Plain, and the reference for faster ways."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from gpt2core.config import GenerationConfig, GPT2Config
from gpt2core.model import GPT2, KVCache


def generate(model: GPT2, prompts: Sequence[Sequence[int]], config: GenerationConfig) -> list[list[int]]:
    """New tokens for each prompt, the one that ended the reply (end of text, or a stop's last) included.

    A reply ends at `eos_id`, at a `stop`, after `max_new_tokens`, or when the context is full. Prompts are answered
    together and never change each other's answer: each draws from a generator of its own.

    Raises:
        ValueError: a prompt is empty, leaves no room in the context, or holds an id outside of the vocabulary.
    """
    replies: list[list[int]] = [[] for _ in prompts]
    for step in decode(model, prompts, config):
        for row, token in step:
            replies[row].append(token)
    return replies


def stream(model: GPT2, prompt: Sequence[int], config: GenerationConfig) -> Iterator[int]:
    """The tokens that `generate` gives for one prompt, as they come; closing the iterator ends the computation."""
    for step in decode(model, [prompt], config):
        for _, token in step:
            yield token


def decode(model: GPT2, prompts: Sequence[Sequence[int]], config: GenerationConfig) -> Iterator[list[tuple[int, int]]]:
    """One list of (row, new token) a step, for the rows whose reply goes on."""
    for prompt in prompts:
        check_prompt(prompt, model.config)
    return _decode(model, prompts, config) if prompts else iter(())


def check_prompt(prompt: Sequence[int], config: GPT2Config) -> None:
    """Raise ValueError if there is nothing to continue, no room to continue it in, or an id that is no token's."""
    if not prompt:
        raise ValueError("a prompt is empty; there is nothing to continue")
    if len(prompt) >= config.n_positions:
        raise ValueError(f"prompt has {len(prompt)} tokens but n_positions is {config.n_positions}; shorten the input")
    if not 0 <= min(prompt) <= max(prompt) < config.vocab_size:
        raise ValueError(f"a prompt holds a token id outside of 0...{config.vocab_size - 1}; wrong tokenizer?")


def _decode(model: GPT2, prompts: Sequence[Sequence[int]], config: GenerationConfig) -> Iterator[list[tuple[int, int]]]:
    device = model.wte.weight.device
    T = max(map(len, prompts))
    input_ids = torch.zeros(len(prompts), T, dtype=torch.long)
    attention_mask = torch.zeros(len(prompts), T, dtype=torch.long)
    for row, prompt in enumerate(prompts):  # padded on the left: all replies grow at the same place
        input_ids[row, T - len(prompt) :] = torch.tensor(prompt)
        attention_mask[row, T - len(prompt) :] = 1
    input_ids, attention_mask = input_ids.to(device), attention_mask.to(device)

    generators = [make_generator(config, device) for _ in prompts]
    room = [min(config.max_new_tokens, model.config.n_positions - len(prompt)) for prompt in prompts]
    replies: list[list[int]] = [[] for _ in prompts]
    going = list(range(len(prompts)))  # the rows of the batch, by prompt
    padded = min(map(len, prompts)) < T
    # A padded row holds columns beyond its own tokens, so the columns may be more than n_positions; positions are not.
    cache = KVCache(model, len(prompts), T + max(room) - 1)
    while going:
        with _evaluating(model):  # entered each step: between steps the model is the caller's
            logits = _last_logits(model, input_ids, attention_mask if padded else None, cache)  # (B, V)
            tokens = [int(sample_token(logits[i], config, generators[row])) for i, row in enumerate(going)]
        step = list(zip(going, tokens, strict=True))
        for row, token in step:
            replies[row].append(token)
        yield step
        keep = [i for i, row in enumerate(going) if len(replies[row]) < room[row] and not ended(replies[row], config)]
        if not keep:
            return
        if len(keep) < len(going):
            rows = torch.tensor(keep, device=device)
            cache.keep(rows)
            attention_mask = attention_mask[rows]
            going = [going[i] for i in keep]
        input_ids = torch.tensor([[tokens[i]] for i in keep], device=device)
        attention_mask = torch.cat([attention_mask, attention_mask.new_ones(len(keep), 1)], -1)


@torch.inference_mode()
def _last_logits(model: GPT2, input_ids: Tensor, attention_mask: Tensor | None, cache: KVCache) -> Tensor:
    """Logits (B, V) of the last position, fp32: the head is not computed for the others."""
    return model.head(model.hidden(input_ids, attention_mask, cache)[:, -1]).float()


def sample_token(logits: Tensor, config: GenerationConfig, generator: torch.Generator | None) -> Tensor:
    """A token id () drawn from logits (V): the largest at temperature 0, else among those top_k and top_p leave."""
    if config.temperature == 0:
        return logits.argmax()
    # from the largest down, and in fp64: no temperature above 0, however small, makes an infinity of it
    logits = (logits - logits.max()).double() / config.temperature
    if config.top_k is not None and config.top_k < len(logits):
        logits = logits.masked_fill(logits < logits.topk(config.top_k).values[-1], -torch.inf)
    probabilities = logits.softmax(-1)
    if config.top_p is not None:
        # nucleus sampling, arXiv:1904.09751: the fewest tokens that together reach top_p
        ordered, order = probabilities.sort(descending=True, stable=True)
        beyond = ordered.cumsum(-1) - ordered >= config.top_p
        probabilities = probabilities.index_fill(0, order[beyond], 0.0)
    return torch.multinomial(probabilities, 1, generator=generator)[0]


def ended(reply: Sequence[int], config: GenerationConfig) -> bool:
    """Whether the reply's last token ends it: end of text, or the last of a stop sequence."""
    if reply and reply[-1] == config.eos_id:
        return True
    return any(tuple(reply[-len(stop) :]) == stop for stop in config.stop)


def make_generator(config: GenerationConfig, device: torch.device) -> torch.Generator | None:
    """What one reply draws from; None where it is greedy."""
    if config.temperature == 0:
        return None
    generator = torch.Generator(device)
    if config.seed is None:
        generator.seed()
    else:
        generator.manual_seed(config.seed)
    return generator


@contextmanager
def _evaluating(model: GPT2) -> Iterator[None]:
    """Dropout off, and every module's mode as it was afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
