"""GPT-2 (Radford et al. 2019) with a key-value cache. Independent of files, sampling and loss.

Shape letters: B batch, T new tokens, S cached tokens, C = n_embd, H heads, D = C/H, V vocabulary.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from math import sqrt

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gpt2core.config import GPT2Config
from gpt2core.linear import Linear, PrepackedWeight, linear
from gpt2core.sequences import Sequences

ALIGNED = 64  # rows of the head are padded to a multiple of this


def pad_rows(weight: Tensor) -> Tensor:
    """Append rows of zeros to the matrix (out, in), up to a multiple of ALIGNED rows.

    With an odd number of outputs, such as 50,257, a product takes a GPU up to five times as long.
    """
    return F.pad(weight, (0, 0, 0, -len(weight) % ALIGNED))


def pad_bias(n_outputs: int, like: Tensor) -> Tensor:
    """Return the bias for a product with `pad_rows`: 0 for the n_outputs of the weight, -inf for the additional ones.

    It has the dtype and device of `like`.
    """
    return F.pad(like.new_zeros(n_outputs), (0, -n_outputs % ALIGNED), value=-torch.inf)


def best_device() -> torch.device:
    """Return the GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Context manager within which the model is in eval mode. It restores the mode of every module at the end."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


class GPT2(nn.Module):
    """The language model. Its output head is the token embedding (tied weights)."""

    def __init__(self, config: GPT2Config, generator: torch.Generator | None = None) -> None:
        """Draw random weights, scaled as in section 2.3 of the paper, from `generator` (None: torch's global one)."""
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False  # set by `gpt2core.train`; has an effect only in train mode
        self.prepacked_head: PrepackedWeight | None = None  # replaces the head's weight, as in `Linear`
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.n_positions, config.n_embd)
        self.h = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, config.layer_norm_epsilon)
        _init_weights(self, generator)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, cache: "KVCache | None" = None
    ) -> Tensor:
        """Compute the logits (B, T, V) for input_ids (B, T).

        Args:
            attention_mask: (B, S + T), 1 for a token and 0 for padding, on either side. Positions count only tokens,
                so padding does not change a row's logits. The logits at padded positions are meaningless.
            cache: keys and values of S earlier tokens. The keys and values of the T new tokens are appended in place.

        Raises:
            ValueError: input_ids has another shape, or there are more tokens than n_positions, or more columns than
                the cache's capacity.
        """
        return self.head(self.hidden(input_ids, attention_mask, cache))

    def hidden(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | Sequences | None = None,
        cache: "KVCache | None" = None,
        positions: Tensor | None = None,
        keep: Tensor | None = None,
    ) -> Tensor:
        """Compute the last layer's normalized hidden states (B, T, C): `forward` without the head.

        Args:
            attention_mask: as in `forward`, or the `Sequences` of a packed batch, which requires `positions`.
            positions: (B, T), below n_positions; used only with `Sequences`.
            keep: (n), indices of tokens in the flattened B * T tokens. Only their hidden states (n, C) are returned.
                Of the other tokens, the last layer computes only keys and values.
        """
        if input_ids.dim() != 2:
            raise ValueError(f"input_ids has the shape {tuple(input_ids.shape)}; it must be (B, T)")
        T = input_ids.shape[1]
        S = 0 if cache is None else cache.length
        if cache is not None and S + T > cache.capacity:
            raise ValueError(
                f"{S + T} tokens are more than the cache's capacity of {cache.capacity}; make a larger one"
            )
        mask = attention_mask
        if not isinstance(mask, Sequences):
            positions = torch.arange(S, S + T, device=input_ids.device)  # (T)
            if mask is not None:
                positions = (mask.long().cumsum(-1) - 1).clamp(min=0)[:, S:]  # (B, T)
            if S + T > self.config.n_positions and int(positions.max()) >= self.config.n_positions:
                raise ValueError(
                    f"{S + T} tokens are more than n_positions={self.config.n_positions}; shorten the input"
                )
            mask = _attention_mask(mask, T, S, input_ids.device)

        x = self.wte(input_ids) + self.wpe(positions)  # (B, T, C)
        for layer, block in enumerate(self.h):
            block_keep = keep if layer + 1 == len(self.h) else None
            if self.gradient_checkpointing and self.training:
                x = checkpoint(block, x, mask, None, block_keep, use_reentrant=False)
            else:
                x = block(x, mask, None if cache is None else (cache, layer), block_keep)
        if cache is not None:
            cache.length += T
        return self.ln_f(x)

    def head(self, hidden: Tensor) -> Tensor:
        """Compute the logits (..., V) of hidden states (..., C)."""
        logits, n = self.padded_head(hidden), len(self.wte.weight)
        return logits if logits.shape[-1] == n else logits[..., :n]

    def padded_head(self, hidden: Tensor) -> Tensor:
        """Compute the logits (..., >= V) of hidden states (..., C). Additional logits at the end are -inf.

        Only a GPU has them. A loss does not need to cut them off, which would take two copies of all logits' gradients.
        """
        if self.prepacked_head is not None:
            return linear(hidden, self.prepacked_head)
        weight = self.wte.weight
        if hidden.device.type == "cuda" and hidden.numel() >= ALIGNED * hidden.shape[-1]:
            return linear(hidden, pad_rows(weight), pad_bias(len(weight), weight))
        return linear(hidden, weight)


class Block(nn.Module):
    """Attention and MLP, each added to its input (B, T, C); layer norms before them, or after the addition (post)."""

    def __init__(self, config: GPT2Config, layer: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, config.layer_norm_epsilon)
        self.attn = Attention(config, layer)
        self.ln_2 = nn.LayerNorm(config.n_embd, config.layer_norm_epsilon)
        self.mlp = MLP(config)
        self.post_norm = config.norm_position == "post"

    def forward(
        self,
        x: Tensor,
        mask: Tensor | Sequences | None,
        cache: "tuple[KVCache, int] | None",
        keep: Tensor | None = None,
    ) -> Tensor:
        attended = self.attn(x if self.post_norm else self.ln_1(x), mask, cache, keep)
        x = _keep(x, keep) + attended
        if self.post_norm:
            x = self.ln_1(x)
            return self.ln_2(x + self.mlp(x))
        return x + self.mlp(self.ln_2(x))


class Attention(nn.Module):
    """Causal self-attention with one fused matrix for q, k and v, as in GPT-2's checkpoints."""

    def __init__(self, config: GPT2Config, layer: int) -> None:
        super().__init__()
        self.n_head = config.n_head
        self.scale = 1 / sqrt(config.head_width) if config.scale_attn_weights else 1.0
        if config.scale_attn_by_inverse_layer_idx:
            self.scale /= layer + 1
        self.c_attn = Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = Linear(config.n_embd, config.n_embd)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | Sequences | None,
        cache: "tuple[KVCache, int] | None",
        keep: Tensor | None = None,
    ) -> Tensor:
        qkv = self.c_attn(x).unflatten(-1, (3, self.n_head, -1))  # (B, T, 3, H, D)
        if isinstance(mask, Sequences):
            return self.c_proj(_keep(mask.attend(qkv, self.scale), keep))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # three of (B, H, T, D)
        if cache is not None:
            store, layer = cache
            k, v = store.append(layer, k, v)  # two of (B, H, S + T, D)
        is_causal = mask is None and q.shape[2] > 1  # a single new token attends to everything before it
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal, scale=self.scale)
        return self.c_proj(_keep(y.transpose(1, 2).flatten(2), keep))  # (B, T, C)


class MLP(nn.Module):
    """Two linear layers with the activation in between, computed for each token alone."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.activate = activation(config.activation_function)
        self.c_fc = Linear(config.n_embd, config.mlp_width)
        self.c_proj = Linear(config.mlp_width, config.n_embd)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(self.activate(self.c_fc(x)))


def activation(name: str) -> Callable[[Tensor], Tensor]:
    """Return the activation function for its name in config.json; gelu_new and gelu_pytorch_tanh are the same."""
    return F.relu if name == "relu" else partial(F.gelu, approximate="none" if name == "gelu" else "tanh")


def drop_padding_rows_(model: GPT2) -> GPT2:
    """Remove the rows of the embedding that belong to no token, in place.

    transformers and llama.cpp sample these rows, since they do not compare the embedding with the tokenizer.
    """
    n_tokens = model.config.token_count
    if n_tokens < model.config.vocab_size:
        model.wte = nn.Embedding.from_pretrained(model.wte.weight.data[:n_tokens].clone())
        model.config = replace(model.config, vocab_size=n_tokens, n_tokens=None)
    return model


class KVCache:
    """Keys and values of earlier tokens: two tensors (n_layer, B, H, capacity, D), filled up to `length`."""

    def __init__(self, model: GPT2, batch_size: int, capacity: int) -> None:
        config, weight = model.config, model.wte.weight
        shape = (config.n_layer, batch_size, config.n_head, capacity, config.head_width)
        self.k = torch.empty(shape, dtype=weight.dtype, device=weight.device)
        self.v = torch.empty_like(self.k)
        self.capacity = capacity
        self.length = 0

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store the T tokens of one layer after the S cached tokens; return all as views (B, H, S + T, D)."""
        end = self.length + k.shape[2]
        self.k[layer, :, :, self.length : end] = k
        self.v[layer, :, :, self.length : end] = v
        return self.k[layer, :, :, :end], self.v[layer, :, :, :end]

    def keep(self, rows: Tensor) -> None:
        """Keep only the given rows of the batch, in the given order."""
        self.k, self.v = self.k[:, rows], self.v[:, rows]


def _keep(x: Tensor, keep: Tensor | None) -> Tensor:
    """Return the tokens (n, C) of x (B, T, C) with these indices; None: return x."""
    return x if keep is None else x.flatten(0, 1).index_select(0, keep)


def _attention_mask(attention_mask: Tensor | None, T: int, S: int, device: torch.device) -> Tensor | None:
    """Return the mask (B, 1, T, S + T) or (T, S + T), True where a query may attend; None: plain causal attention."""
    if attention_mask is None and (S == 0 or T == 1):
        return None
    causal = torch.ones(T, S + T, dtype=torch.bool, device=device).tril(S)
    if attention_mask is None:
        return causal
    # Every query attends to itself: otherwise, a padding query would have no key, and its softmax would be NaN.
    itself = torch.eye(T, S + T, dtype=torch.bool, device=device).roll(S, dims=-1)
    return (causal & attention_mask.bool()[:, None, None, :]) | itself


def _init_weights(model: GPT2, generator: torch.Generator | None) -> None:
    std = model.config.initializer_range
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(parameter)
        elif parameter.dim() == 1:
            nn.init.ones_(parameter)
        else:  # projections into the residual stream are scaled down by the number of additions to it
            residual = name.endswith("c_proj.weight")
            nn.init.normal_(
                parameter, 0.0, std / sqrt(2 * model.config.n_layer) if residual else std, generator=generator
            )
    if model.config.layer_init == "clone":
        for block in model.h[1:]:
            block.load_state_dict(model.h[0].state_dict())
