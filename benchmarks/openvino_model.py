"""Converts a checkpoint to OpenVINO's stateful model, which keeps keys and values between calls.

Inputs, states and size are those of `optimum-cli export openvino`; optimum-intel itself needs an older transformers.
"""

import warnings
from collections.abc import Sequence
from contextlib import redirect_stdout
from io import StringIO
from logging import ERROR
from pathlib import Path
from unittest.mock import patch

import nncf
import openvino as ov
import torch
from openvino import opset13 as ops
from openvino.passes import MakeStateful, Manager
from torch import Tensor, nn

from gpt2core.checkpoint import load_pretrained
from gpt2core.config import GPT2Config
from gpt2core.files import json_bytes, read_json
from gpt2core.model import GPT2


def write_openvino(base: Path, directory: Path, kind: str) -> None:
    """Write openvino_model.xml, its weights and config.json; `kind` of the weights: int8 (nncf's default) or f32."""
    model = load_pretrained(base)
    # the converter does not know torch's private call to oneDNN
    with patch("gpt2core.linear.has_onednn", return_value=False), warnings.catch_warnings(action="ignore"):
        converted = ov.convert_model(_Cached(model), example_input=_example(model.config))
    _make_stateful(converted, model.config)
    if kind == "int8":
        nncf.set_log_level(ERROR)
        with redirect_stdout(StringIO()):  # hides a progress bar
            converted = nncf.compress_weights(converted)
    directory.mkdir()
    ov.save_model(converted, directory / "openvino_model.xml", compress_to_fp16=False)
    # OpenVINO rejects null as end of text, which the benchmark ignores anyway
    described = {**read_json(base / "config.json"), "eos_token_id": 0}
    (directory / "config.json").write_bytes(json_bytes(described))


class _Cached(nn.Module):
    """The model with its cache as arguments and results: keys and values (B, H, S, D) of each layer in turn."""

    def __init__(self, model: GPT2) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, beam_idx: Tensor, past: Sequence[Tensor]
    ) -> tuple[Tensor, ...]:
        """Logits (B, T, V) and the cache of S + T tokens.

        Args:
            input_ids, position_ids: (B, T).
            attention_mask: (B, S + T).
            beam_idx: (B) the rows of the cache to go on with.
        """
        cache = _Cache(past, beam_idx)
        keys = torch.arange(attention_mask.shape[1])
        mask = (keys <= keys[-input_ids.shape[1] :, None]) & attention_mask.bool()[:, None, None]
        x = self.model.wte(input_ids) + self.model.wpe(position_ids)
        for layer, block in enumerate(self.model.h):
            x = block(x, mask, (cache, layer))
        return self.model.head(self.model.ln_f(x)), *cache.present


class _Cache:
    """Replaces `gpt2core.model.KVCache`, whose in-place writes cannot be converted."""

    def __init__(self, past: Sequence[Tensor], beam_idx: Tensor) -> None:
        self.past, self.beam_idx, self.present = past, beam_idx, list[Tensor]()

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        old_k, old_v = (one.index_select(0, self.beam_idx) for one in self.past[2 * layer : 2 * layer + 2])
        k, v = torch.cat((old_k, k), 2), torch.cat((old_v, v), 2)
        self.present += [k, v]
        return k, v


def _example(config: GPT2Config) -> dict[str, object]:
    """Build arguments to trace the model with: 2 new tokens after 3 cached tokens."""
    past = torch.zeros(1, config.n_head, 3, config.head_width)
    return {
        "input_ids": torch.zeros(1, 2, dtype=torch.long),
        "attention_mask": torch.ones(1, 5, dtype=torch.long),
        "position_ids": torch.zeros(1, 2, dtype=torch.long),
        "beam_idx": torch.zeros(1, dtype=torch.int32),
        "past": [past] * (2 * config.n_layer),
    }


def _make_stateful(model: ov.Model, config: GPT2Config) -> None:
    """Convert keys and values to states, initially empty, with the batch size of input_ids."""
    shape = [config.n_head, -1, config.head_width]
    past, present = model.inputs[4:], model.outputs[1:]
    for one in past:
        one.get_node().set_partial_shape(ov.PartialShape([-1, *shape]))
    model.validate_nodes_and_infer_types()
    model.output(0).get_tensor().set_names({"logits"})
    manager = Manager()
    manager.register_pass(MakeStateful([(p.get_node(), r.get_node()) for p, r in zip(past, present, strict=True)]))
    manager.run_passes(model)
    batch_size = ops.gather(ops.shape_of(model.input("input_ids")), ops.constant([0]), ops.constant(0))
    sizes = [batch_size, *(ops.constant([max(size, 0)]) for size in shape)]
    empty = ops.broadcast(ops.constant(0.0, ov.Type.f32), ops.concat(sizes, 0))
    for node in model.get_ops():
        if node.get_type_name() == "ReadValue":
            node.set_arguments([empty])
    model.validate_nodes_and_infer_types()
