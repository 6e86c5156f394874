"""Optimizers for finetuning and pretraining, and the schedule of their learning rates."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from gpt2core.config import LoraConfig, PretrainConfig, TrainConfig


def finetuning_optimizers(
    weights: Mapping[str, nn.Parameter], config: TrainConfig, lora: LoraConfig | None
) -> list[torch.optim.Optimizer]:
    """Return AdamW. With `b_lr_ratio` (LoRA+, arXiv:2402.12354), lora_B has another learning rate.

    The base's biases and gains of LayerNorm have no weight decay, as in pretraining and in transformers' Trainer.
    """
    decayed = {name: weight for name, weight in weights.items() if weight.dim() >= 2 or "lora_" in name}
    vectors = [weight for name, weight in weights.items() if name not in decayed]
    groups: list[dict[str, Any]] = [{"params": [*decayed.values()]}]
    if lora is not None and lora.b_lr_ratio != 1:  # DoRA's magnitudes get lora_B's rate, as in PEFT
        first = [name for name in decayed if not name.endswith(("lora_B", "lora_magnitude"))]
        groups = [
            {"params": [decayed[name] for name in first]},
            {
                "params": [weight for name, weight in decayed.items() if name not in first],
                "lr": config.learning_rate * lora.b_lr_ratio,
            },
        ]
    if vectors:
        groups.append({"params": vectors, "weight_decay": 0.0})
    return [
        torch.optim.AdamW(
            groups, lr=config.learning_rate, betas=config.betas, weight_decay=config.weight_decay, fused=True
        )
    ]


def pretraining_optimizers(weights: Mapping[str, nn.Parameter], config: PretrainConfig) -> list[torch.optim.Optimizer]:
    """Return Muon for the matrices within the blocks and AdamW for the other weights; or, if configured, only AdamW."""
    matrices = [weight for name, weight in weights.items() if name.startswith("h.") and weight.dim() == 2]
    others = [weight for name, weight in weights.items() if not (name.startswith("h.") and weight.dim() == 2)]
    groups = [{"params": others, "weight_decay": 0.0}]
    if config.optimizer == "adamw":
        groups.append({"params": matrices, "weight_decay": config.weight_decay})
    adamw = torch.optim.AdamW(groups, lr=config.adamw_learning_rate, betas=config.betas, fused=True)
    if config.optimizer == "adamw":
        return [adamw]
    kind = CpuMuon if all(weight.device.type == "cpu" for weight in matrices) else torch.optim.Muon
    muon = kind(matrices, lr=config.learning_rate, momentum=config.momentum, weight_decay=config.weight_decay)
    return [muon, adamw]


class CpuMuon(torch.optim.Muon):
    """torch's Muon with its default options, and products in fp32 instead of bf16. States are those of torch's Muon.

    A processor without bf16 instructions needs up to 40 times as long for bf16: on one with AVX2, pretraining the
    demo's base took 13 minutes instead of 3. Processors with these instructions use it too, for similar results.
    """

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update the weights, with Nesterov momentum and decoupled weight decay."""
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                state, momentum, rate = self.state[weight], group["momentum"], group["lr"]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(weight.grad)
                buffer = state["momentum_buffer"].lerp_(weight.grad, 1 - momentum)
                update = _orthogonalized(weight.grad.lerp(buffer, momentum), group)
                weight.mul_(1 - rate * group["weight_decay"])
                weight.add_(update, alpha=-rate * math.sqrt(max(1, len(weight) / weight.shape[1])))


def _orthogonalized(matrix: torch.Tensor, group: Mapping[str, Any]) -> torch.Tensor:
    """Return about U V^T for matrix = U S V^T, by Newton-Schulz iterations (Jordan et al. 2024)."""
    is_tall = len(matrix) > matrix.shape[1]
    x = matrix.T if is_tall else matrix
    x = x / x.norm().clamp(min=group["eps"])
    a, b, c = group["ns_coefficients"]
    for _ in range(group["ns_steps"]):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if is_tall else x


def learning_rate_factor(step: int, total_steps: int, config: TrainConfig | PretrainConfig) -> float:
    """Return the factor of the learning rate at a step, counted from 0: warm-up, plateau, decay (arXiv:2404.06395).

    The decay is linear or half a cosine (arXiv:1608.03983); the schedule `constant` has none. It starts after the
    warm-up at the earliest, as in transformers.
    """
    if step < config.warmup_steps:
        return (step + 1) / (config.warmup_steps + 1)
    decay_steps = min(config.decay_fraction * total_steps, total_steps - config.warmup_steps)
    if config.schedule == "constant":
        decay_steps = 0
    decay = min(1.0, (total_steps - step) / decay_steps) if decay_steps else 1.0
    if config.schedule == "cosine":
        decay = (1 - math.cos(math.pi * decay)) / 2
    return config.final_lr_ratio + (1 - config.final_lr_ratio) * decay
