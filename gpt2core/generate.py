"""Batched decoding: prefill, then one token per step with a KV cache. A simple reference for `gpt2core.engine`."""

import reprlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from gpt2core.config import GenerationConfig, GPT2Config
from gpt2core.model import GPT2, KVCache, eval_mode
from gpt2core.sampling import Sampler, check_tokens, choose
from gpt2core.tensors import as_ints, to_device


def generate(model: GPT2, prompts: Sequence[Sequence[int]], config: GenerationConfig) -> list[list[int]]:
    """Generate a completion of each prompt: the new tokens, including the token that ended it.

    A completion ends at `eos_id`, at one of `stop_token_ids`, at a `stop` sequence, after `max_new_tokens`, or when the
    context is full. Prompts are decoded as one batch and do not affect each other: each has its own random generator.

    Ids of `model.config.token_count` and above have no token in the model's tokenizer and are never generated.

    Raises:
        TypeError: a prompt is not a sequence of token ids, but for example text.
        ValueError: a prompt is empty or fills the whole context; or a prompt, `logit_bias` or `stop_token_ids` contains
            an id outside the vocabulary.
        NonFiniteLogits: the logits are NaN or infinite, since the model's weights have diverged.
    """
    prompts = list(prompts)
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
    """Yield one list of (prompt index, new token) per step, for the completions that have not ended before."""
    prompts = [check_prompt(prompt, model.config) for prompt in prompts]
    check_tokens(config, model.config)
    return _decode(model, prompts, config) if prompts else iter(())


def check_prompt(prompt: Sequence[int], config: GPT2Config) -> list[int]:
    """Return the prompt as a list of ints.

    Raises:
        TypeError, ValueError: as `generate`.
    """
    try:
        if isinstance(prompt, str | bytes):
            raise TypeError
        ids = as_ints(prompt)
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
    return ids


def _decode(model: GPT2, prompts: Sequence[Sequence[int]], config: GenerationConfig) -> Iterator[list[tuple[int, int]]]:
    device = model.wte.weight.device
    T = max(map(len, prompts))
    input_ids = torch.zeros(len(prompts), T, dtype=torch.long)
    attention_mask = torch.zeros(len(prompts), T, dtype=torch.long)
    for row, prompt in enumerate(prompts):  # padding on the left: all completions then grow at the same column
        input_ids[row, T - len(prompt) :] = torch.tensor(prompt)
        attention_mask[row, T - len(prompt) :] = 1
    input_ids, attention_mask = to_device(input_ids, device), to_device(attention_mask, device)

    samplers = [Sampler(config, prompt, device) for prompt in prompts]
    limits = [min(config.max_new_tokens, model.config.n_positions - len(prompt)) for prompt in prompts]
    completions: list[list[int]] = [[] for _ in prompts]
    active = list(range(len(prompts)))  # prompt index of each row of the batch
    padded = min(map(len, prompts)) < T
    # With padding there may be more columns than n_positions; positions stay below it.
    cache = KVCache(model, len(prompts), T + max(limits) - 1)
    while active:
        with eval_mode(model):  # in each step, so that the model has the caller's mode between steps
            logits = _last_logits(model, input_ids, attention_mask if padded else None, cache)  # (B, V)
            outputs = choose([samplers[row] for row in active], logits, [completions[row] for row in active])
        tokens = [_raise_error(output) for output in outputs]
        step = list(zip(active, tokens, strict=True))
        for row, token in step:
            completions[row].append(token)
        yield step
        keep = [
            i
            for i, row in enumerate(active)
            if len(completions[row]) < limits[row] and not samplers[row].has_ended(completions[row])
        ]
        if not keep:
            return
        if len(keep) < len(active):
            rows = to_device(torch.tensor(keep), device)
            cache.keep(rows)
            attention_mask = attention_mask[rows]
            active = [active[i] for i in keep]
        input_ids = to_device(torch.tensor([[tokens[i]] for i in keep]), device)
        attention_mask = torch.cat([attention_mask, attention_mask.new_ones(len(keep), 1)], -1)


def _raise_error(output: int | Exception) -> int:
    if isinstance(output, Exception):
        raise output
    return output


@torch.inference_mode()
def _last_logits(model: GPT2, input_ids: Tensor, attention_mask: Tensor | None, cache: KVCache) -> Tensor:
    """Compute the logits (B, token_count) of the last position, in fp32; the head skips the other positions."""
    return model.head(model.hidden(input_ids, attention_mask, cache)[:, -1])[:, : model.config.token_count].float()
