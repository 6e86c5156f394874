"""Helpers of the engine's tests: prompts, settings and adapters of many kinds."""

from pathlib import Path

import torch

from gpt2core.checkpoint import save_adapter
from gpt2core.config import GenerationConfig, LoraConfig
from gpt2core.lora import add_lora
from gpt2core.model import GPT2


def random_prompts(n: int, longest: int = 63, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest + 1, (n,), generator=generator).tolist()
    return [torch.randint(97, (length,), generator=generator).tolist() for length in lengths]


def mixed_configs(n: int) -> list[GenerationConfig]:
    """Greedy and sampled in turn, of many lengths, some with an end-of-text token that occurs."""
    return [
        GenerationConfig(max_new_tokens=1 + i * 7 % 23, temperature=(i % 3) * 0.6, top_p=0.9, seed=i, eos_id=i % 97)
        for i in range(n)
    ]


def save_random_adapter(model: GPT2, config: LoraConfig, seed: int, directory: Path, spread: float = 0.3) -> Path:
    """Add LoRA layers with a random lora_B to the model and save them."""
    add_lora(model, config, seed)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B"):
            parameter.data.normal_(0, spread, generator=generator)
    return save_adapter(model, directory)


def check_bf16_completion(
    reference: GPT2, prompt: list[int], completion: list[int], logprobs: list[float] | None = None
) -> None:
    """The tokens of a greedy completion in bf16, and their log probabilities, are about as likely in fp32.

    By rounding another token may be the largest. Logits of these models spread over about 10, and bf16 has 8 bits.
    """
    with torch.no_grad():
        logits = reference(torch.tensor([prompt + completion[:-1]]))[0, len(prompt) - 1 :]
    expected = logits.log_softmax(-1)
    own = expected.gather(1, torch.tensor(completion)[:, None])[:, 0]
    assert (expected.max(-1).values - own).max() < 0.15
    if logprobs is not None:
        torch.testing.assert_close(torch.tensor(logprobs), own, rtol=0, atol=0.15)
