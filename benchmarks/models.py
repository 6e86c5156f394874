"""Random models and adapters of a given shape. Imports nothing beyond gpt2core: `benchmarks.gpu` runs without this
project's environment."""

from collections.abc import Sequence
from pathlib import Path

import torch

from gpt2core.batching import pack
from gpt2core.checkpoint import save_adapter
from gpt2core.config import GPT2Config, LoraConfig
from gpt2core.data import Example
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
    """Save a random adapter for models of this shape. The model is unchanged."""
    save_adapter(with_random_adapter(model, seed), directory)
    remove_lora(model)
    return directory


def matrix_weights(model: GPT2) -> int:
    """Count the weights that each token is multiplied with: the matrices of the blocks and of the head."""
    blocks = sum(
        w.numel() for n, w in model.named_parameters() if n.startswith("h.") and "lora_" not in n and w.dim() == 2
    )
    return blocks + model.wte.weight.numel()


def training_flop(model: GPT2, examples: Sequence[Example], batch_size: int) -> float:
    """FLOP that an epoch of LoRA on q and v needs at least: one product forward and one backward per matrix and token.

    A prefix that the records of a batch share counts once, the head only where a label is; so do the last layer's
    matrices, except for keys and values. The first layer's input needs no gradient. Attention's and LoRA's own products
    are left out.
    """
    head, first = model.wte.weight.numel(), model.h[0]
    of_layer = sum(w.numel() for n, w in first.named_parameters() if "lora_" not in n and w.dim() == 2)
    qkv, n_layer = 3 * model.config.n_embd**2, model.config.n_layer
    total = 0.0
    for start in range(0, len(examples), batch_size):
        batch = pack(examples[start : start + batch_size], "response")
        n_tokens, n_labels = batch.input_ids.numel(), len(batch.labels)
        full = (n_layer - 1) * of_layer + qkv  # weights that every token is multiplied with
        total += 2.0 * n_tokens * (full + full - qkv) + 4.0 * n_labels * (of_layer - qkv + head)
    return total
