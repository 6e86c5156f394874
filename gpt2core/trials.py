"""Trials of a sweep: the measurements of one variant with one seed."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import sqrt
from pathlib import Path
from time import perf_counter

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpt2core.adapter_files import ADAPTER_WEIGHTS
from gpt2core.checkpoint import load_adapter, load_pretrained
from gpt2core.config import AttentionConfig, GenerationConfig
from gpt2core.data import Record, encode_records
from gpt2core.evaluate import sample_answers
from gpt2core.files import file_sha256
from gpt2core.lora import merge_lora
from gpt2core.losses import token_losses
from gpt2core.model import best_device
from gpt2core.resources import machine
from gpt2core.tokenizer import load_tokenizer
from gpt2core.types import JsonDataclass, TrainSummary


@dataclass(frozen=True)
class Trial(JsonDataclass):
    """The results of one variant of a sweep with one seed."""

    label: str
    seed: int
    machine: str
    metrics: dict[str, float | None]  # None: not measured, or the training diverged
    curve: list[list[float]] = field(default_factory=list)  # [step, loss]
    sample: str = ""


def score_adapters(
    label: str,
    seed: int,
    base_dir: Path,
    adapters: Sequence[Path],
    base_sha256: str,
    val: Sequence[Record],
    test: Sequence[Record],
    history: Sequence[Mapping[str, float]],
    summary: TrainSummary,
    generation: GenerationConfig,
    n_samples: int,
) -> Trial:
    """Score a finetuned adapter, and return its trial.

    Args:
        adapters: adapters of repeated training runs with the same seed. The first one is scored; the metric same_bytes
            compares the files of all.
        history, summary: results of the first training run.

    Raises:
        ValueError: there is no validation record.
    """
    if not val:
        raise ValueError("there is no validation record; raise data.val_fraction, or give more records")
    tokenizer, model = load_tokenizer(base_dir), load_pretrained(base_dir, device=best_device())
    model = load_adapter(model, adapters[0], base_sha256)
    parameters = sum(weight.numel() for name, weight in model.named_parameters() if "lora_" in name)
    losses = token_losses(model, encode_records(val, tokenizer, model.config.n_positions), 16, "response")
    exact, distinct = sample_answers(merge_lora(model), tokenizer, test, generation, n_samples, seed)
    metrics: dict[str, float | None] = {
        "val_loss": sum(loss for loss, _ in losses) / sum(n for _, n in losses),
        "exact_match": exact,
        "train_loss": summary.loss,
        "parameters": float(parameters),
        "seconds": summary.tokens_seen / summary.tokens_per_second,
        "tokens_per_second": summary.tokens_per_second,
        "utilization": summary.utilization,
        "peak_mib": summary.peak_memory_mib,
        "same_bytes": float(len({file_sha256(adapter / ADAPTER_WEIGHTS) for adapter in adapters}) == 1),
        "distinct": distinct,
    }
    curve = [[entry["step"], entry["val/loss"]] for entry in history if "val/loss" in entry]
    return Trial(label, seed, machine(), metrics, curve)


def attention_trial(label: str, seed: int, config: AttentionConfig) -> Trial:
    """Measure time and memory of one attention layer: the memory kept for the backward pass, or on a GPU the peak."""
    device, generator = best_device(), torch.Generator().manual_seed(seed)
    B, T, H, C = config.batch_size, config.length, config.n_head, config.n_embd
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        projection = nn.Linear(C, 3 * C).to(device)
    x = torch.randn(B, T, C, generator=generator).to(device)
    saved_bytes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        saved_bytes[storage.data_ptr()] = storage.nbytes()
        return tensor

    times: dict[str, list[float]] = {"forward": [], "backward": []}
    for _ in range(4):  # the first iteration is a warm-up
        saved_bytes.clear()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        start = _now(device)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            q, k, v = projection(x).unflatten(-1, (3, H, -1)).permute(2, 0, 3, 1, 4)  # three of (B, H, T, D)
            y = ATTENTION[config.attention](q, k, v)
        middle = _now(device)
        y.sum().backward()
        times["forward"].append(middle - start)
        times["backward"].append(_now(device) - middle)
    mib = (torch.cuda.max_memory_allocated() if device.type == "cuda" else sum(saved_bytes.values())) / 2**20
    metrics: dict[str, float | None] = {"kept_mib": mib}
    metrics |= {f"{name}_ms": 1000 * min(seconds[1:]) for name, seconds in times.items()}
    return Trial(label, seed, machine(), metrics)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return perf_counter()


def _matrix_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Compute causal attention of q, k, v (…, T, D) with the whole matrix (…, T, T) of attention weights."""
    T = q.shape[-2]
    causal = torch.ones(T, T, dtype=torch.bool, device=q.device).tril()
    scores = (q @ k.transpose(-1, -2) / sqrt(q.shape[-1])).masked_fill(~causal, -torch.inf)
    return scores.softmax(-1) @ v


ATTENTION: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "loop": lambda q, k, v: torch.stack([_matrix_attention(q[:, h], k[:, h], v[:, h]) for h in range(q.shape[1])], 1),
    "fused": _matrix_attention,
    "sdpa": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
}
