"""GGUF files for llama.cpp, by the gguf library: a model, and a LoRA adapter for one.

Tensor names and metadata are those of llama.cpp's convert_hf_to_gguf.py and convert_lora_to_gguf.py for GPT-2.
"""

from pathlib import Path

import gguf
import torch
from torch import Tensor

from gpt2core.lora import lora_config, lora_layers, widen_b
from gpt2core.model import GPT2
from gpt2core.prompt import chat_template
from gpt2core.tokenizer import load_tokenizer, read_padding_token, read_vocabulary

TYPES = {
    "f32": (gguf.GGMLQuantizationType.F32, gguf.LlamaFileType.ALL_F32),
    "f16": (gguf.GGMLQuantizationType.F16, gguf.LlamaFileType.MOSTLY_F16),
    "q8_0": (gguf.GGMLQuantizationType.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
}
_NAMES = {
    **{"wte": "token_embd", "wpe": "position_embd", "ln_f": "output_norm", "ln_1": "attn_norm", "ln_2": "ffn_norm"},
    **{"attn.c_attn": "attn_qkv", "attn.c_proj": "attn_output", "mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down"},
}


def write_gguf(model: GPT2, tokenizer_dir: Path, file: Path, quantize: str, history: bool = False) -> None:
    """Write the model with its adapter merged, the tokenizer of the directory, and the chat template.

    Args:
        quantize: format of the matrices, a key of TYPES. Vectors and positions stay f32. With q8_0, so do matrices
            whose rows are not a multiple of 32 long.
        history: see `chat_template`.

    Raises:
        ValueError: llama.cpp's GPT-2 cannot express the model.
    """
    config, way_out = model.config, "export it for transformers (hf) instead"
    if config.activation_function not in ("gelu_new", "gelu_pytorch_tanh"):
        raise ValueError(f"llama.cpp's GPT-2 has no activation_function {config.activation_function!r}; {way_out}")
    if not config.scale_attn_weights or config.scale_attn_by_inverse_layer_idx:
        raise ValueError(f"llama.cpp's GPT-2 has only the usual scaling of attention weights; {way_out}")
    kind, file_type = TYPES[quantize]
    writer = gguf.GGUFWriter(file, "gpt2")
    writer.add_type("model")
    writer.add_name("gpt2-instruct")
    writer.add_file_type(file_type)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_context_length(config.n_positions)
    writer.add_embedding_length(config.n_embd)
    writer.add_block_count(config.n_layer)
    writer.add_feed_forward_length(config.mlp_width)
    writer.add_head_count(config.n_head)
    writer.add_layer_norm_eps(config.layer_norm_epsilon)
    _add_tokenizer(writer, tokenizer_dir, config.vocab_size)
    writer.add_chat_template(chat_template(history))
    for name, tensor in model.state_dict().items():
        if "lora_" not in name:
            _add_tensor(writer, name.replace(".linear.", "."), tensor, kind)
    _close(writer)


def write_gguf_adapter(model: GPT2, file: Path) -> None:
    """Write the model's adapter for `llama.cpp --lora`. It must not be merged. lora_b includes the scaling.

    Raises:
        ValueError: the adapter is a DoRA.
    """
    if lora_config(model).dora:
        raise ValueError(
            "the adapter has DoRA's magnitudes (lora.dora is true), which llama.cpp's adapters do not have; write the "
            "merged model instead"
        )
    scaling = lora_config(model).scaling
    writer = gguf.GGUFWriter(file, "gpt2")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 0.0)  # with 0, llama.cpp does not scale by alpha / rank
    for name, layer in lora_layers(model):
        n, rank, width = layer.lora_A.shape
        b = widen_b(layer.lora_B.data * scaling, layer.targets)
        weight = _rename(f"{name}.weight")
        writer.add_tensor(f"{weight}.lora_a", layer.lora_A.detach().reshape(n * rank, width).cpu().numpy())
        writer.add_tensor(f"{weight}.lora_b", b.cpu().numpy())
    _close(writer)


def _add_tokenizer(writer: gguf.GGUFWriter, directory: Path, n_rows: int) -> None:
    """
    Raises:
        ValueError: an added word has a flag that llama.cpp does not have.
    """
    vocabulary, end = read_vocabulary(directory), load_tokenizer(directory).eot_token
    for text, word in vocabulary.added.items():
        for flag in ("lstrip", "rstrip", "single_word"):
            if getattr(word, flag):
                raise ValueError(
                    f"{vocabulary.source}: the added token {text!r} has {flag}, which llama.cpp does not have; set it "
                    "to false in the base, or export for transformers"
                )
    words = {text: word.id for text, word in vocabulary.added.items()}
    tokens = [f"[PAD{i}]" for i in range(n_rows)]  # rows of the embedding without a token
    types = [gguf.TokenType.UNUSED] * n_rows
    for ids, kind in (
        (vocabulary.ids, gguf.TokenType.NORMAL),
        (vocabulary.special, gguf.TokenType.CONTROL),
        (words, gguf.TokenType.USER_DEFINED),  # found in any text, and printed
    ):
        for token, id in ids.items():
            tokens[id], types[id] = token, kind
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([" ".join(pair) for pair in vocabulary.merges])
    writer.add_bos_token_id(end)
    writer.add_eos_token_id(end)
    padding = read_padding_token(directory)
    if padding is not None:
        writer.add_pad_token_id(padding[1])
    writer.add_add_bos_token(False)


def _add_tensor(writer: gguf.GGUFWriter, name: str, tensor: Tensor, kind: gguf.GGMLQuantizationType) -> None:
    data = tensor.detach().to("cpu", torch.float32).contiguous().numpy()
    short = kind == gguf.GGMLQuantizationType.Q8_0 and data.shape[-1] % 32
    kept = data.ndim == 1 or name.startswith("wpe.") or short
    used = gguf.GGMLQuantizationType.F32 if kept else kind
    writer.add_tensor(_rename(name), gguf.quants.quantize(data, used), raw_dtype=used)


def _rename(name: str) -> str:
    path, _, part = name.rpartition(".")
    if not path.startswith("h."):
        return f"{_NAMES[path]}.{part}"
    _, layer, module = path.split(".", 2)
    return f"blk.{layer}.{_NAMES[module]}.{part}"


def _close(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
