"""A model prepared for decoding: weights in fp32, bf16 or int8, and a forward over tokens of many requests at once.

Shape letters: N tokens of a step, of any request; C, H, D and V as in model.py.
"""

import logging
from collections.abc import Callable, Sequence
from math import expm1
from statistics import geometric_mean
from time import perf_counter
from typing import cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpt2core import cuda
from gpt2core.config import GenerationConfig, GPT2Config, WeightFormat
from gpt2core.generate import generate
from gpt2core.inference import native
from gpt2core.inference.adapters import Adapter, AdapterStack, NativeAdapterStack, RowAdapters
from gpt2core.inference.kv_cache import new_cache
from gpt2core.kernels import (
    has_bf16_instructions,
    has_onednn,
    has_onednn_int8,
    int8_product,
    onednn_linear,
    prepack,
    prepack_int8,
)
from gpt2core.lora import LoraLinear
from gpt2core.model import GPT2, Block, eval_mode, pad_rows
from gpt2core.sampling import most_likely

logger = logging.getLogger(__name__)

# Attention callback: (layer, qkv (N, 3, H, D)) -> output (N, C). It reads and extends the KV caches of the step's
# sequences. Where native.py computes the layers, the list of the sequences' locations in the caches is passed instead.
Attention = Callable[[int, Tensor], Tensor] | Sequence[native.Span]
Projection = Callable[[Tensor], Tensor]  # (N, in) -> (N, out)
# A format replaces fp32 if it is faster by at least this factor and raises perplexity by at most this share.
MIN_SPEEDUP, MAX_PERPLEXITY_COST = 1.3, 0.01
SAMPLES, SAMPLE_TOKENS = 4, 32  # number of texts to measure perplexity on, and number of sampled tokens per text
MIN_WEIGHTS_TO_QUANTIZE = 2**22  # a smaller model fits into a processor's caches: it stays in fp32, as it was evaluated
MIN_WEIGHTS_FOR_ONEDNN = 2**18  # for a smaller fp32 matrix, oneDNN's call overhead exceeds its gain


class QuantizedModel:
    """GPT-2 for inference, with its own copy of the weights. Matrices are stored in the format `weights`."""

    def __init__(self, model: GPT2, weights: WeightFormat, n_layer: int | None = None) -> None:
        """Copy the weights, with the LoRA layers merged.

        Args:
            n_layer: use only this many of the first blocks; None: use all.

        Raises:
            ValueError: `weights` is not a format, norm_position is "post", or int8 has no kernel for this model on this
                device or processor.
        """
        if weights not in get_args(WeightFormat):
            raise ValueError(f"weights is {weights!r}; it must be one of {', '.join(get_args(WeightFormat))}")
        if model.config.norm_position != "pre":
            raise ValueError("norm_position is 'post'; the engine supports only 'pre'. Use gpt2core.generate instead")
        self.device = model.wte.weight.device
        if weights == "int8" and weights not in supported_formats(model.config, self.device):
            raise ValueError(
                "weights is 'int8', but int8 has no kernel for this model on this device or processor; use fp32 or auto"
            )
        self.config, self.weights = model.config, weights
        self.perplexity_increase: float | None = None  # fraction relative to fp32, set by `quantize_fastest`
        in_bf16 = weights == "bf16" and _has_bf16_products(self.device)
        self.dtype = torch.bfloat16 if in_bf16 else torch.float32  # dtype of activations
        self._kernels = cuda.kernels_for(model.config, self.dtype, self.device)
        self._has_tanh_gelu = model.config.activation_function in ("gelu_new", "gelu_pytorch_tanh")
        scratch = None  # memory of native.py, if it computes the layers
        if weights == "int8" and native.is_available(model.config):
            scratch = native.Scratch(model.config.n_embd, model.config.mlp_width)
        self.wte, self.wpe = (_copy(embedding.weight) for embedding in (model.wte, model.wpe))
        self.ln_f = _Norm(model.ln_f)
        head = self.wte[: self.config.token_count]
        self.head = _projection(pad_rows(head) if self.device.type == "cuda" else head, None, weights, scratch)
        kernels = scratch or self._kernels
        self.blocks = [_Block(cast(Block, block), weights, kernels) for block in list(model.h)[:n_layer]]
        self._native_layers = None
        if scratch is not None:
            self._native_layers = native.Layers(
                cast(list[native.BlockWeights], self.blocks), model.config.n_head, scratch
            )

    @property
    def is_native(self) -> bool:
        """Whether native.py computes the layers and reads the caches."""
        return self._native_layers is not None

    @property
    def adapter_dtype(self) -> torch.dtype:
        """Dtype of adapter matrices."""
        return native.ADAPTER_DTYPE if self.is_native else self.dtype

    @property
    def cache_dtype(self) -> torch.dtype:
        """Dtype of cached keys and values."""
        return native.CACHE_DTYPE if self.is_native else self.dtype

    def stack(self, adapters: Sequence[Adapter]) -> AdapterStack | NativeAdapterStack:
        """Prepare the adapters that the rows of a step can use."""
        if self.is_native:
            return NativeAdapterStack(adapters, len(self.blocks))
        return AdapterStack(adapters, self.device)

    def hidden(
        self,
        input_ids: Tensor,
        positions: Tensor,
        attention: Attention | None = None,
        adapters: RowAdapters | native.RowAdapters | None = None,
    ) -> Tensor:
        """Compute the last layer's hidden states (N, C) of tokens (N), normalized by ln_f unless `is_native`.

        Args:
            attention: made by the owner of the KV caches; None: the tokens are one sequence, without a cache.
            adapters: the adapter of each token, by `for_rows` of this model's `stack`; None: the base model.
        """
        x = (F.embedding(input_ids, self.wte) + F.embedding(positions, self.wpe)).float()  # (N, C)
        if self._native_layers is None:
            attend = cast(Callable[[int, Tensor], Tensor], attention or self._attend_to_itself)
            return self._plain_layers(x, attend, cast(RowAdapters | None, adapters))
        kv = None if attention else self._new_cache(len(x))
        spans = attention or [native.span(cast(Tensor, kv), 0, len(x))]
        return self._native_layers(x, cast(Sequence[native.Span], spans), cast(native.RowAdapters | None, adapters))

    def logits(self, hidden: Tensor) -> Tensor:
        """Compute the logits (N, token_count), fp32, of results (N, C) of `hidden`, without the head's padding rows."""
        if isinstance(self.head, native.Int8Linear):
            return self.head(hidden, self.ln_f)
        return self.head(hidden)[:, : self.config.token_count].float()

    def most_likely(self, logits: Tensor) -> Tensor:
        """Return the most likely token of each row of `logits`; -1 where the largest logit is NaN or infinite."""
        return most_likely(logits) if self._kernels is None else self._kernels.most_likely(logits)

    def _new_cache(self, n: int) -> Tensor:
        """Allocate memory for the keys and values (n_layer, 2, H, n, D) of one sequence of n tokens."""
        H = self.config.n_head
        shape = (len(self.blocks), 2, H, n, self.config.head_width)
        return new_cache(shape, self.cache_dtype, self.device)

    def _attend_to_itself(self, layer: int, qkv: Tensor) -> Tensor:
        q, k, v = qkv.permute(1, 2, 0, 3)  # three of (H, N, D)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.blocks[layer].scale)
        return y.transpose(0, 1).flatten(1)

    def _plain_layers(
        self, x: Tensor, attention: Callable[[int, Tensor], Tensor], adapters: RowAdapters | None
    ) -> Tensor:
        def project(matrix: Projection, path: str, x: Tensor) -> Tensor:
            y = matrix(x)
            if adapters is not None:
                adapters.add_delta_(y, layer, path, x)
            return y

        normalized = self.blocks[0].ln_1(x).to(self.dtype)
        for layer, block in enumerate(self.blocks):
            c_attn, attn_proj, c_fc, mlp_proj = block.projections
            qkv = project(c_attn, "attn.c_attn", normalized)  # (N, 3 * C)
            y = project(attn_proj, "attn.c_proj", attention(layer, qkv.unflatten(-1, (3, self.config.n_head, -1))))
            x, normalized = self._add(x, y, block.ln_2)
            if adapters is None and isinstance(c_fc, _KernelLinear) and self._has_tanh_gelu:
                expanded = c_fc(normalized, gelu=True)
            else:
                expanded = block.activation(project(c_fc, "mlp.c_fc", normalized))
            y = project(mlp_proj, "mlp.c_proj", expanded)
            last = layer + 1 == len(self.blocks)
            x, normalized = self._add(x, y, self.ln_f if last else self.blocks[layer + 1].ln_1)
        return normalized

    def _add(self, x: Tensor, y: Tensor, norm: "_Norm") -> tuple[Tensor, Tensor]:
        """Return the sum of x (N, C), fp32, and y (N, C), and its layer norm in y's dtype.

        The CUDA kernels add to x in place; otherwise x is unchanged.
        """
        if self._kernels is not None:
            return x, self._kernels.add_norm(x, y, norm.weight, norm.bias, norm.eps)
        x = x + y
        return x, norm(x).to(self.dtype)


def quantize_fastest(model: GPT2, max_batch: int) -> QuantizedModel:
    """Return the model in the fastest weight format on this machine that predicts as well as fp32.

    The time is measured on two blocks and the head, in steps of one row and of `max_batch` rows. A format is rejected
    if it raises the perplexity by more than MAX_PERPLEXITY_COST on text that the model itself generates. Two cases are
    not measured: a model with fewer than MIN_WEIGHTS_TO_QUANTIZE weights stays in fp32, and a GPU uses bf16.
    """
    device = model.wte.weight.device
    if device.type != "cpu":
        return QuantizedModel(model, "bf16")
    if sum(weight.numel() for weight in model.parameters()) < MIN_WEIGHTS_TO_QUANTIZE:
        return QuantizedModel(model, "fp32")
    # a processor without bf16 instructions emulates bf16, which is never the fastest
    candidates = [
        weights for weights in supported_formats(model.config, device) if weights != "bf16" or has_bf16_instructions()
    ]
    seconds = {weights: _step_seconds(QuantizedModel(model, weights, n_layer=2), max_batch) for weights in candidates}
    faster = [weights for weights in candidates if seconds[weights] * MIN_SPEEDUP < seconds["fp32"]]
    for weights in [*sorted(faster, key=seconds.__getitem__), *candidates[:1]]:
        quantized = QuantizedModel(model, weights)
        cost = 0.0 if weights == "fp32" else _perplexity_cost(model, quantized)
        quantized.perplexity_increase = cost
        if cost <= MAX_PERPLEXITY_COST:
            break
        logger.warning("weights %s rejected: faster, but perplexity rises by %.1f %%", weights, 100 * cost)
    measured = ", ".join(f"{name} {1e3 * value:.2f} ms" for name, value in seconds.items())
    logger.info(
        "weights: %s, perplexity %+.2f %% (two blocks and the head, mean of 1 row and %d rows: %s)",
        *(weights, 100 * cost, max_batch, measured),
    )
    return quantized


def supported_formats(config: GPT2Config, device: torch.device) -> list[WeightFormat]:
    """Return the formats with a kernel for this model on this device, fp32 first."""
    with_int8 = device.type == "cpu" and (has_onednn_int8() or native.is_available(config))
    return [weights for weights in get_args(WeightFormat) if weights != "int8" or with_int8]


@torch.inference_mode()
def _step_seconds(model: QuantizedModel, max_batch: int) -> float:
    """Return the geometric mean of the shortest times of two steps of one sequence: 1 token, and `max_batch` tokens."""
    best = []
    for n in (1, max_batch):
        ids = torch.zeros(n, dtype=torch.long)
        times = []
        for _ in range(8):
            start = perf_counter()
            model.logits(model.hidden(ids, ids))
            times.append(perf_counter() - start)
        best.append(min(times))
    return geometric_mean(best)


@torch.inference_mode()
def _perplexity_cost(model: GPT2, quantized: QuantizedModel) -> float:
    """Return the relative increase of perplexity on text that the model itself generates: exp(KL divergence) - 1.

    A trained model generates natural text, and its predictions are the reference distribution of the divergence.
    """
    config, n_tokens = model.config, model.config.token_count
    bos = config.bos_token_id
    start = bos if bos is not None and bos < n_tokens else n_tokens - 1  # GPT-2's end of text is its last token

    def log_probabilities(ids: Tensor) -> Tensor:
        """Return the model's log probabilities (B, T, token_count) for ids (B, T)."""
        with eval_mode(model):
            return model(ids)[..., :n_tokens].float().log_softmax(-1)

    likely = log_probabilities(torch.tensor([[start]]))[0, 0].exp()
    firsts = torch.multinomial(likely, SAMPLES, replacement=True, generator=torch.Generator().manual_seed(0)).tolist()
    prompts = [[start, first] for first in firsts]  # different prompts, since all texts use the same seed
    completions = generate(model, prompts, GenerationConfig(SAMPLE_TOKENS, temperature=1.0, seed=0))
    ids = torch.tensor([prompt + tokens for prompt, tokens in zip(prompts, completions, strict=True)])  # (B, T)
    positions = torch.arange(ids.shape[1])
    logprobs = torch.stack([quantized.logits(quantized.hidden(row, positions)) for row in ids]).log_softmax(-1)
    divergence = F.kl_div(
        logprobs.flatten(0, 1), log_probabilities(ids).flatten(0, 1), log_target=True, reduction="batchmean"
    )
    return expm1(min(float(divergence), 700.0))


class _Norm:
    def __init__(self, norm: nn.LayerNorm) -> None:
        self.weight, self.bias, self.eps = _copy(norm.weight, torch.float32), _copy(norm.bias, torch.float32), norm.eps

    def __call__(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


class _Block:
    def __init__(self, block: Block, weights: WeightFormat, kernels: native.Scratch | cuda.Kernels | None) -> None:
        def projection(path: str) -> Projection:
            layer = block.get_submodule(path)
            linear = cast(nn.Linear, layer.linear if isinstance(layer, LoraLinear) else layer)
            weight = linear.weight.detach()
            if isinstance(layer, LoraLinear) and not layer.merged:
                weight = weight.float() + layer.delta_weight().detach()
            return _projection(weight, linear.bias.detach(), weights, kernels)

        self.ln_1, self.ln_2 = _Norm(block.ln_1), _Norm(block.ln_2)
        self.projections = [projection(path) for path in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")]
        self.scale = block.attn.scale
        self.activation = block.mlp.activate


def _copy(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Return a contiguous copy in `dtype`; None: in the tensor's own dtype."""
    return tensor.detach().to(dtype or tensor.dtype, copy=True, memory_format=torch.contiguous_format)


def _projection(
    weight: Tensor, bias: Tensor | None, weights: WeightFormat, kernels: native.Scratch | cuda.Kernels | None = None
) -> Projection:
    """Return a function that computes x W^T + b for x (N, in). It holds a copy of W (out, in) in the given format."""
    if isinstance(kernels, native.Scratch):
        return native.Int8Linear(weight, bias, kernels)
    if weights == "int8":
        return _int8_projection(weight.float().contiguous(), None if bias is None else _copy(bias, torch.float32))
    dtype = torch.bfloat16 if weights == "bf16" else torch.float32
    weight, bias = _copy(weight, dtype), None if bias is None else _copy(bias, dtype)
    if kernels is not None and bias is not None:
        return _KernelLinear(weight, bias, kernels)
    if not _has_bf16_products(weight.device):
        weight, bias = weight.float(), None if bias is None else bias.float()
    large = weight.dtype == torch.bfloat16 or weight.numel() >= MIN_WEIGHTS_FOR_ONEDNN
    if large and weight.device.type == "cpu" and has_onednn(weight.dtype):
        packed = prepack(weight)
        return lambda x: onednn_linear(x, packed, bias)
    return lambda x: F.linear(x, weight, bias)


def _has_bf16_products(device: torch.device) -> bool:
    """Return whether products with bf16 weights are computed in bf16; otherwise they are computed in fp32.

    On a CPU for which oneDNN has none, torch's own bf16 products are slow, and a row depends on the number of rows.
    """
    return device.type != "cpu" or has_onednn(torch.bfloat16)


class _KernelLinear:
    """x W^T + b for x (N, in), or GELU (tanh) of it: by a kernel of cuda.py for few rows, else by torch."""

    def __init__(self, weight: Tensor, bias: Tensor, kernels: cuda.Kernels) -> None:
        self._weight, self._bias, self._kernels = weight, bias, kernels

    def __call__(self, x: Tensor, gelu: bool = False) -> Tensor:
        if len(x) in cuda.LINEAR_ROWS:
            return self._kernels.linear(x, self._weight, self._bias, gelu)
        y = F.linear(x, self._weight, self._bias)
        return F.gelu(y, approximate="tanh") if gelu else y


def _int8_projection(weight: Tensor, bias: Tensor | None) -> Projection:
    """Return an int8 projection: one scale per row of W, and at run time one per row of x, so rows stay independent."""
    scale = (weight.abs().amax(1) / 127).clamp(min=1e-30)  # (out)
    packed = prepack_int8((weight / scale[:, None]).round().to(torch.int8))
    zero_points = torch.zeros(len(scale), dtype=torch.int32)

    def project(x: Tensor) -> Tensor:
        step = (x.abs().amax(-1, keepdim=True) / 127).clamp_(min=1e-30)  # (N, 1)
        unsigned = (x / step).add_(128.5).to(torch.uint8)  # truncation after adding a half rounds to nearest
        y = int8_product(unsigned, packed, scale, zero_points)
        return y * step if bias is None else torch.addcmul(bias, y, step)

    return project
