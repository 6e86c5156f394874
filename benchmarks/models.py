"""Random models and adapters of a given shape. Imports nothing beyond gpt2core: `benchmarks.gpu` runs without this
project's environment."""

from pathlib import Path

import torch

from gpt2core.checkpoint import save_adapter
from gpt2core.config import GPT2Config, LoraConfig
from gpt2core.lora import add_lora, lora_layers, remove_lora
from gpt2core.model import GPT2

# Randomly initialized blocks change the residual stream little, and the tied head then repeats the last token forever.
PERTURBATION = 4.0


def random_model(config: GPT2Config) -> GPT2:
    model = GPT2(config, torch.Generator().manual_seed(0))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.startswith("h.") and weight.dim() == 2:
                weight.mul_(PERTURBATION)
    return model.eval()


def with_random_adapter(model: GPT2, seed: int) -> GPT2:
    add_lora(model, LoraConfig(), seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, layer in lora_layers(model):
            layer.lora_B.normal_(0.0, 0.02, generator=generator)
    return model


def random_adapter(model: GPT2, directory: Path, seed: int) -> Path:
    """Save a random adapter for models of this shape; the model is unchanged."""
    save_adapter(with_random_adapter(model, seed), directory)
    remove_lora(model)
    return directory


def matrix_weights(model: GPT2) -> int:
    """Number of weights that each token is multiplied with: the matrices of the blocks and of the head."""
    blocks = sum(
        w.numel() for n, w in model.named_parameters() if n.startswith("h.") and "lora_" not in n and w.dim() == 2
    )
    return blocks + model.wte.weight.numel()
