"""A model packed for decoding: weights in fp32, bf16 or int8, and a forward over tokens of many requests at once.

Letters in the shape comments: N tokens of a step, whichever request each is of; R the ranks of all adapters together;
C, H, D and V as in model.py.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from math import expm1
from statistics import geometric_mean
from time import perf_counter
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpt2core.config import GPT2Config, LoraConfig
from gpt2core.linear import linear
from gpt2core.lora import TARGET_LAYERS, LoraLinear
from gpt2core.model import GPT2, Block

logger = logging.getLogger(__name__)

Format = Literal["fp32", "bf16", "int8"]
Attend = Callable[[int, Tensor], Tensor]  # (layer, qkv (N, 3, H, D)) -> (N, C)
Linear = Callable[[Tensor], Tensor]
# What another format has to be before it is taken in place of fp32: faster by this factor, and its perplexity higher by
# no more than this share.
WORTH, PERPLEXITY_COST = 1.3, 0.01
LARGE = 2**18  # weights; a matrix in fp32 with fewer is read too fast for oneDNN's calls to pay


class PackedModel:
    """GPT-2 for inference. Matrices are copied where the format asks for it; the model must not change meanwhile."""

    def __init__(self, model: GPT2, weights: Format, n_layer: int | None = None) -> None:
        """LoRA layers are taken as merged. `n_layer`: only the first blocks.

        Raises:
            ValueError: int8, on a device or processor that has no kernel for it.
        """
        if weights == "int8" and not has_int8(model.wte.weight.device):
            raise ValueError("weights are int8, for which there is no kernel on this device; take bf16 or fp32")
        self.config, self.weights = model.config, weights
        self.dtype = (
            torch.bfloat16 if weights == "bf16" else torch.float32
        )  # of what goes into a matrix, and of the cache
        self.wte, self.wpe, self.ln_f = model.wte.weight.detach(), model.wpe.weight.detach(), _Norm(model.ln_f)
        self.head = _pack(self.wte, None, weights)
        self.blocks = [_Block(cast(Block, block), weights) for block in list(model.h)[:n_layer]]

    def hidden(
        self, input_ids: Tensor, positions: Tensor, attend: Attend, adapters: "RowAdapters | None" = None
    ) -> Tensor:
        """The last layer's normalised states (N, C) of tokens (N); `attend` keeps keys and values."""

        def project(matrix: Linear, path: str, x: Tensor) -> Tensor:
            y = matrix(x)
            if adapters is not None:
                adapters.add_(y, layer, path, x)
            return y

        x = (F.embedding(input_ids, self.wte) + F.embedding(positions, self.wpe)).float()  # (N, C)
        for layer, block in enumerate(self.blocks):
            qkv = project(block.c_attn, "attn.c_attn", block.ln_1(x).to(self.dtype))  # (N, 3 * C)
            y = attend(layer, qkv.unflatten(-1, (3, self.config.n_head, -1)))
            x = x + project(block.attn_proj, "attn.c_proj", y)
            a = project(block.c_fc, "mlp.c_fc", block.ln_2(x).to(self.dtype))
            x = x + project(block.mlp_proj, "mlp.c_proj", block.activation(a))
        return self.ln_f(x).to(self.dtype)

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits (N, V), fp32, of states (N, C)."""
        return self.head(hidden).float()


class RowAdapters:
    """Which rows of a step go through which adapter."""

    def __init__(self, stack: "AdapterStack", of_row: Sequence[int]) -> None:
        """`of_row`: the index of each row's adapter; -1 is the base alone."""
        self.stack, self.masks = stack, dict[str, Tensor]()
        if len(set(of_row)) > 1:  # else there is nothing to mask: the stack holds the adapters of the step, here one
            rows = torch.tensor(of_row, device=stack.device)[:, None]
            self.masks = {path: (rows == owner).to(stack.dtype) for path, owner in stack.owner.items()}  # (N, R)

    def add_(self, y: Tensor, layer: int, path: str, x: Tensor) -> None:
        """Add each row's own low-rank product to y (N, out), in place; x is (N, in)."""
        if path in self.stack.owner:
            a, b = self.stack.matrices[layer, path]
            low = linear(x, a)  # (N, R)
            y.add_(linear(low.mul_(self.masks[path]) if self.masks else low, b))


Matrices = Mapping[tuple[int, str], tuple[Tensor, Tensor]]  # (layer, path) -> A (R, in) and scaled B (out, R)


class AdapterStack:
    """Adapters side by side: for each layer one matrix A (R, in) and one B (out, R); each of R is one adapter's.

    All rows of a step are multiplied with all of its adapters and keep their own: two matrix products a layer, for a
    cost that grows with the sum of their ranks.
    """

    def __init__(self, adapters: Sequence[Matrices], dtype: torch.dtype, device: torch.device) -> None:
        """`adapters`: as `adapter_matrices` gives them."""
        self.dtype, self.device = dtype, device
        self.matrices: dict[tuple[int, str], tuple[Tensor, Tensor]] = {}
        self.owner: dict[str, Tensor] = {}  # path -> (R), which adapter each is of
        for path in sorted({path for own in adapters for _, path in own}):
            ranks = [len(own[0, path][0]) if (0, path) in own else 0 for own in adapters]
            self.owner[path] = torch.arange(len(adapters), device=device).repeat_interleave(
                torch.tensor(ranks, device=device)
            )
        for layer, path in sorted({key for own in adapters for key in own}):
            parts = [own[layer, path] for own in adapters if (layer, path) in own]
            self.matrices[layer, path] = (
                parts[0] if len(parts) == 1 else (torch.cat([a for a, _ in parts]), torch.cat([b for _, b in parts], 1))
            )

    def rows(self, of_row: Sequence[int]) -> RowAdapters | None:
        """For a step whose rows have these adapters; None where no row has one."""
        return RowAdapters(self, of_row) if any(adapter >= 0 for adapter in of_row) else None


def adapter_matrices(
    config: GPT2Config, lora: LoraConfig, state: Mapping[str, Tensor], dtype: torch.dtype, device: torch.device
) -> Matrices:
    """An adapter, as `gpt2core.checkpoint.read_adapter` gives it, ready for an `AdapterStack`."""
    matrices = {}
    for path in {TARGET_LAYERS[target][0] for target in lora.targets}:
        targets = [target for target, (own, _, _) in TARGET_LAYERS.items() if own == path and target in lora.targets]
        for layer in range(config.n_layer):
            name = f"h.{layer}.{path}"
            a, b = _dense(lora, state[f"{name}.lora_A"], state[f"{name}.lora_B"], targets)
            matrices[layer, path] = a.to(device, dtype).contiguous(), b.to(device, dtype).contiguous()
    return matrices


def _dense(lora: LoraConfig, a: Tensor, b: Tensor, targets: Sequence[str]) -> tuple[Tensor, Tensor]:
    """A (n * rank, in) and scaled B (out, n * rank) of one layer; B is zero outside of the adapted blocks of `out`."""
    n, width, rank = b.shape
    n_blocks = TARGET_LAYERS[targets[0]][2]
    dense = b.new_zeros(n, rank, n_blocks, width)
    for pair, target in enumerate(targets):
        dense[pair, :, TARGET_LAYERS[target][1]] = lora.scaling * b[pair].T
    return a.flatten(0, 1), dense.flatten(2).flatten(0, 1).T


def pack_fastest(model: GPT2, max_batch: int) -> PackedModel:
    """In the fastest format here that predicts as fp32 does, by a short measurement on this machine and these weights.

    Speed is that of a step of one row and of one with `max_batch`, on two blocks. A format is refused if the model's
    perplexity rises by more than a hundredth, taken as exp(KL) - 1 on random tokens.
    """
    device = model.wte.weight.device
    if device.type != "cpu":
        return PackedModel(model, "bf16")
    candidates: list[Format] = ["fp32", "bf16", *(["int8"] if has_int8(device) else [])]  # type: ignore[list-item]
    seconds = {weights: _step_seconds(PackedModel(model, weights, n_layer=2), max_batch) for weights in candidates}
    faster = sorted((name for name in candidates if seconds[name] * WORTH < seconds["fp32"]), key=seconds.__getitem__)
    for name in [*faster, "fp32"]:
        packed = PackedModel(model, name)
        if name == "fp32" or (cost := _perplexity_cost(model, packed)) <= PERPLEXITY_COST:
            break
        logger.warning("%s weights would be faster, but raise perplexity by %.1f %%", name, 100 * cost)
    measured = ", ".join(f"{name} {1e3 * value:.2f} ms" for name, value in seconds.items())
    logger.info("weights: %s (two blocks and the head, mean of 1 row and %d rows: %s)", name, max_batch, measured)
    return packed


@torch.inference_mode()
def _step_seconds(packed: PackedModel, max_batch: int) -> float:
    """Geometric mean of the best time of a step with one row and with `max_batch`, without attention."""
    best = []
    for n in (1, max_batch):
        ids = torch.zeros(n, dtype=torch.long)
        times = []
        for _ in range(8):
            start = perf_counter()
            packed.logits(packed.hidden(ids, ids, lambda layer, qkv: qkv[:, 2].flatten(1)))
            times.append(perf_counter() - start)
        best.append(min(times))
    return geometric_mean(best)


@torch.inference_mode()
def _perplexity_cost(model: GPT2, packed: PackedModel) -> float:
    """By how much perplexity rises on text that the model itself would write: exp of the divergence, less one."""
    T = min(64, model.config.n_positions)
    generator = torch.Generator().manual_seed(0)
    ids, positions = torch.randint(model.config.vocab_size, (T,), generator=generator), torch.arange(T)
    training = model.training
    reference = model.eval()(ids[None])[0].float().log_softmax(-1)  # (T, V)
    model.train(training)
    other = packed.logits(packed.hidden(ids, positions, causal(packed))).log_softmax(-1)
    return expm1(min(float(F.kl_div(other, reference, log_target=True, reduction="batchmean")), 700.0))


def causal(packed: PackedModel) -> Attend:
    """Attention of one prompt's tokens to each other, without a cache."""

    def attend(layer: int, qkv: Tensor) -> Tensor:
        q, k, v = qkv.permute(1, 2, 0, 3)  # three of (H, N, D)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=packed.blocks[layer].scale)
        return y.transpose(0, 1).flatten(1)

    return attend


def has_int8(device: torch.device) -> bool:
    """Whether oneDNN's int8 matrix product is there: x86 processors."""
    return device.type == "cpu" and "onednn" in torch.backends.quantized.supported_engines


class _Norm:
    def __init__(self, norm: nn.LayerNorm) -> None:
        self.weight, self.bias, self.eps = norm.weight.detach().float(), norm.bias.detach().float(), norm.eps

    def __call__(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


class _Block:
    def __init__(self, block: Block, weights: Format) -> None:
        def pack(path: str) -> Linear:
            layer = block.get_submodule(path)
            linear = cast(nn.Linear, layer.linear if isinstance(layer, LoraLinear) else layer)
            weight = linear.weight.detach()
            if isinstance(layer, LoraLinear) and not layer.merged:
                weight = weight.float() + layer.delta_weight().detach()
            return _pack(weight, linear.bias.detach(), weights)

        self.ln_1, self.ln_2 = _Norm(block.ln_1), _Norm(block.ln_2)
        self.c_attn, self.attn_proj, self.c_fc, self.mlp_proj = map(
            pack, ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
        )
        self.scale = block.attn.scale
        self.activation = block.mlp.activate


def _pack(weight: Tensor, bias: Tensor | None, weights: Format) -> Linear:
    """y = W x + b for x (N, in), from W (out, in)."""
    if weights == "int8":
        return _int8(weight.float(), None if bias is None else bias.float())
    dtype = torch.bfloat16 if weights == "bf16" else torch.float32
    weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
    large = dtype == torch.bfloat16 or weight.numel() >= LARGE
    if large and weight.device.type == "cpu" and torch.backends.mkldnn.is_available():
        # laid out once as oneDNN reads it, and not at each call
        packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), None)
        return lambda x: torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
    return lambda x: F.linear(x, weight, bias)


def _int8(weight: Tensor, bias: Tensor | None) -> Linear:
    """Symmetric int8: one scale a row of W, and one a row of x as it comes, so no row depends on its neighbours."""
    scale = (weight.abs().amax(1) / 127).clamp(min=1e-30)  # (out)
    packed = torch.ops.onednn.qlinear_prepack((weight / scale[:, None]).round().to(torch.int8), None)
    zero_points = torch.zeros(len(scale), dtype=torch.int32)
    rest: tuple[Any, ...] = (
        None,
        1.0,
        0,
        torch.float32,
        "none",
        [],
        "",
    )  # no bias; output scale, zero point, dtype; no operation after

    def linear(x: Tensor) -> Tensor:
        step = (x.abs().amax(-1, keepdim=True) / 127).clamp_(min=1e-30)  # (N, 1)
        unsigned = (x / step).add_(128.5).to(torch.uint8)  # what is cut off rounds to the nearest
        y = torch.ops.onednn.qlinear_pointwise(unsigned, 1.0, 128, packed, scale, zero_points, *rest)
        return y * step if bias is None else torch.addcmul(bias, y, step)

    return linear
