"""Hugging Face checkpoints: read and written like transformers does, and every damage named by file and key."""

import json
import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tokenizers import ByteLevelBPETokenizer
from transformers import GPT2Config as HFConfig
from transformers import GPT2LMHeadModel

from gpt2core.adapter_files import read_adapter
from gpt2core.checkpoint import load_pretrained, save_adapter, save_pretrained
from gpt2core.config import GPT2Config, LoraConfig
from gpt2core.demo.base import train_tokenizer
from gpt2core.lora import add_lora, merge_lora
from gpt2core.model import GPT2
from gpt2core.tokenizer import load_tokenizer
from tests.helpers import randomize_lora, same_state, snapshot

TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}  # as in test_model
IDS = torch.randint(97, (2, 12), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def directory(tiny_gpt2_dir, tmp_path):
    """A copy of the tiny checkpoint that a test may damage."""
    return shutil.copytree(tiny_gpt2_dir, tmp_path / "checkpoint")


@pytest.fixture(scope="module")
def undamaged(tiny_gpt2_dir):
    """The state of the tiny checkpoint."""
    return snapshot(load_pretrained(tiny_gpt2_dir))


@pytest.fixture
def change(directory):
    """A function (edit of the dictionary of tensors, or a function to a new one) -> the changed file."""

    def apply(edit):
        file = directory / "model.safetensors"
        tensors = load_file(file)
        result = edit(tensors)
        save_file(result if isinstance(result, dict) else tensors, file, {"format": "pt"})
        return file

    return apply


@pytest.fixture
def configure(directory):
    """A function (values) -> config.json with these values."""

    def apply(**values):
        file = directory / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | values))
        return file

    return apply


def refused(directory, *parts, kind=ValueError):
    """Assert that loading fails with a message that has all the parts."""
    with pytest.raises(kind) as error:
        load_pretrained(directory)
    for part in parts:
        assert str(part) in str(error.value)


# ------------------------------------------------------------------------------------------------- reading checkpoints


def test_the_loaded_model_is_in_eval_mode_and_trainable(directory):
    model = load_pretrained(str(directory))
    assert not model.training
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_loaded_tensors_do_not_change_with_their_file(directory, tmp_path):
    model = load_pretrained(directory)
    adapter = save_adapter(randomize_lora(add_lora(load_pretrained(directory), LoraConfig())), tmp_path / "adapter")
    _, state = read_adapter(adapter, model.config)
    tensors = [*model.parameters(), *state.values()]
    before = [tensor.detach().clone() for tensor in tensors]
    for file in (directory / "model.safetensors", adapter / "adapter.safetensors"):
        with file.open("r+b") as opened:  # in place: a replaced file would not be the one that was read
            opened.write(bytes(file.stat().st_size))
    assert all(map(torch.equal, tensors, before))


def test_a_mapped_model_is_the_file_and_predicts_the_same(directory):
    mapped = load_pretrained(directory, mapped=True)
    torch.testing.assert_close(mapped(IDS), load_pretrained(directory)(IDS), **TOLERANCE)
    file = directory / "model.safetensors"
    with file.open("r+b") as opened:
        opened.write(bytes(file.stat().st_size))
    assert not any(parameter.any() for parameter in mapped.parameters())


def test_keys_may_lack_the_transformer_prefix(directory, change, undamaged):
    change(lambda tensors: {key.removeprefix("transformer."): tensor for key, tensor in tensors.items()})
    assert same_state(snapshot(load_pretrained(directory)), undamaged)


def test_an_lm_head_is_accepted_if_it_equals_the_embedding(directory, change, undamaged):
    change(lambda tensors: tensors.update({"lm_head.weight": tensors["transformer.wte.weight"].clone()}))
    assert same_state(snapshot(load_pretrained(directory)), undamaged)
    change(lambda tensors: tensors.update({"lm_head.weight": tensors["transformer.wte.weight"] + 1e-3}))
    refused(directory, "checkpoint: lm_head.weight differs from wte.weight")


@pytest.mark.parametrize("prefix", ["transformer.", ""])
def test_mask_buffers_of_old_checkpoints_are_ignored(directory, change, undamaged, prefix):
    buffers = {f"{prefix}h.{layer}.attn.bias": torch.ones(1, 1, 64, 64) for layer in range(2)}
    buffers |= {f"{prefix}h.{layer}.attn.masked_bias": torch.tensor(-1e4) for layer in range(2)}
    change(lambda tensors: tensors.update(buffers))
    assert same_state(snapshot(load_pretrained(directory)), undamaged)


@pytest.fixture
def sharded(tiny_gpt2_dir, tmp_path):
    target = tmp_path / "sharded"
    GPT2LMHeadModel.from_pretrained(tiny_gpt2_dir).save_pretrained(target, max_shard_size="20KB")
    assert len(list(target.glob("model-*.safetensors"))) > 2
    assert not (target / "model.safetensors").exists()
    return target


def test_a_sharded_checkpoint_is_read_completely(sharded, undamaged):
    assert same_state(snapshot(load_pretrained(sharded)), undamaged)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_are_read_in_the_requested_dtype_whatever_dtype_is_stored(directory, change, undamaged, stored):
    change(lambda tensors: {key: tensor.to(stored) for key, tensor in tensors.items()})
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        expected = {name: tensor.to(stored).to(dtype) for name, tensor in undamaged.items()}
        assert same_state(snapshot(load_pretrained(directory, dtype)), expected)


def test_a_tied_checkpoint_may_have_the_head_alone(directory, change, undamaged):
    change(lambda tensors: tensors.update({"lm_head.weight": tensors.pop("transformer.wte.weight")}))
    assert same_state(snapshot(load_pretrained(directory)), undamaged)


@pytest.mark.parametrize(("alias", "name"), HFConfig.attribute_map.items())
def test_a_size_may_have_the_name_that_transformers_gives_it(directory, configure, alias, name):
    file = directory / "config.json"
    values = json.loads(file.read_text())
    if name == "n_head":
        values[name] = 8  # not that of the tiny checkpoint
    values[alias] = values.pop(name)
    file.write_text(json.dumps(values))
    model, reference = load_pretrained(directory), GPT2LMHeadModel.from_pretrained(directory).eval()
    assert getattr(model.config, name) == getattr(reference.config, name) == values[alias]
    torch.testing.assert_close(model(IDS), reference(IDS).logits, **TOLERANCE)
    configure(**{name: values[alias]})
    assert load_pretrained(directory).config == model.config
    configure(**{name: values[alias] * 2})
    refused(directory, f"{file}: {alias} is {values[alias]}, but {name} is {values[alias] * 2}; remove one of them")


# ------------------------------------------------------------------------------------------ special tokens, vocabulary


def test_special_tokens_and_generation_config_survive_load_merge_and_save(directory, configure, tmp_path):
    configure(bos_token_id=3, eos_token_id=[5, 7])
    generation_config = '{"eos_token_id": 5,  "max_length": 20}'
    (directory / "generation_config.json").write_text(generation_config)
    save_pretrained(merge_lora(add_lora(load_pretrained(directory), LoraConfig())), tmp_path / "merged")
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"]) == (3, [5, 7])
    assert (tmp_path / "merged" / "generation_config.json").read_text() == generation_config
    assert load_pretrained(tmp_path / "merged").config == load_pretrained(directory).config


@pytest.fixture
def end(directory, configure, change):
    """The id of the tokenizer's end of text, which the checkpoint generates after every text."""
    end = train_tokenizer(["a b c"], 300, directory).eot_token
    shape = (end + 1, 32)
    configure(vocab_size=shape[0])

    def always_end(tensors):
        wte = torch.randn(shape, generator=torch.Generator().manual_seed(0)) / 100
        wte[end] = 1
        ones = {"transformer.ln_f.weight": torch.zeros(32), "transformer.ln_f.bias": torch.ones(32)}
        tensors.update({"transformer.wte.weight": wte, **ones})

    change(always_end)
    return end


@pytest.mark.parametrize("with_generation_config", [True, False])
@pytest.mark.parametrize("found", [7, [7, 8], None, 50256])
def test_transformers_ends_a_completion_of_a_saved_model_at_the_tokens_that_training_ends_answers_with(
    directory, configure, tmp_path, end, found, with_generation_config
):
    configure(bos_token_id=50256, eos_token_id=found)
    values = {"eos_token_id": found, "bos_token_id": 50256, "pad_token_id": 50256, "max_length": 90}
    (directory / "generation_config.json").unlink(missing_ok=True)
    if with_generation_config:
        (directory / "generation_config.json").write_text(json.dumps(values))
    saved = save_pretrained(load_pretrained(directory), tmp_path / "saved")
    kept = [id for id in (found if isinstance(found, list) else [found]) if id not in (None, 50256)]
    expected = [end, *kept] if kept else end
    config = json.loads((saved / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"]) == (end, expected)
    if with_generation_config:
        written = json.loads((saved / "generation_config.json").read_text())
        assert written == values | {"eos_token_id": expected, "bos_token_id": None, "pad_token_id": None}
    model = GPT2LMHeadModel.from_pretrained(saved)
    assert model.generate(torch.tensor([[5, 6]]), max_new_tokens=4, do_sample=False).tolist() == [[5, 6, end]]
    assert load_pretrained(saved).config == load_pretrained(directory).config


def test_ids_outside_of_the_vocabulary_are_not_written_and_unknown_ones_are_null(directory, configure, tmp_path):
    configure(bos_token_id=None, eos_token_id=[97, 3])
    (directory / "generation_config.json").write_text('{"eos_token_id": 50256}')
    saved = save_pretrained(load_pretrained(directory), tmp_path / "saved")
    config = json.loads((saved / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"]) == (None, 3)
    assert json.loads((saved / "generation_config.json").read_text())["eos_token_id"] is None


def test_a_damaged_generation_config_is_named(directory):
    (directory / "generation_config.json").write_text("{")
    refused(directory, "generation_config.json is not valid JSON")


@pytest.mark.parametrize("files", [("vocab.json", "merges.txt"), ("tokenizer.json",)])
def test_the_number_of_tokens_is_known_where_the_embedding_has_padding(directory, configure, change, tmp_path, files):
    train_tokenizer(["a b c"], 300, tmp_path / "tokenizer")
    n_tokens = load_tokenizer(tmp_path / "tokenizer").n_vocab
    ByteLevelBPETokenizer(str(tmp_path / "tokenizer" / "vocab.json"), str(tmp_path / "tokenizer" / "merges.txt")).save(
        str(tmp_path / "tokenizer" / "tokenizer.json")
    )
    for name in files:
        shutil.copy(tmp_path / "tokenizer" / name, directory)
    configure(vocab_size=n_tokens + 47)
    change(lambda tensors: tensors.update({"transformer.wte.weight": torch.ones(n_tokens + 47, 32)}))
    model = load_pretrained(directory)
    assert (model.config.n_tokens, model.config.token_count, model.config.vocab_size) == (
        n_tokens,
        n_tokens,
        n_tokens + 47,
    )
    save_pretrained(model, tmp_path / "saved")  # without a tokenizer beside it
    assert load_pretrained(tmp_path / "saved").config == model.config
    configure(vocab_size=n_tokens)
    change(lambda tensors: tensors.update({"transformer.wte.weight": torch.ones(n_tokens, 32)}))
    assert load_pretrained(directory).config.n_tokens is None
    file = configure(vocab_size=n_tokens - 1)
    refused(directory, f"{file}: vocab_size is {n_tokens - 1}, but the tokenizer in its directory has {n_tokens} ids")


# ------------------------------------------------------------------------------------------------- writing checkpoints


@pytest.mark.parametrize(
    "values", [{}, {"n_inner": 20, "activation_function": "relu"}, {"scale_attn_by_inverse_layer_idx": True}], ids=str
)
def test_transformers_reads_a_saved_model_and_computes_the_same_logits(tmp_path, values):
    config = GPT2Config(n_layer=2, n_head=4, n_embd=32, n_positions=16, vocab_size=97, initializer_range=0.3, **values)
    model = GPT2(config, torch.Generator().manual_seed(0))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_(generator=torch.Generator().manual_seed(len(name)))
    theirs, report = GPT2LMHeadModel.from_pretrained(save_pretrained(model, tmp_path / "new"), output_loading_info=True)
    assert not report["unexpected_keys"]
    assert set(report["missing_keys"]) <= {"lm_head.weight"}
    torch.testing.assert_close(theirs.eval()(IDS).logits, model(IDS), **TOLERANCE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saving_and_loading_gives_the_same_model(directory, tmp_path, dtype):
    model = load_pretrained(directory, dtype)
    again = load_pretrained(save_pretrained(model, tmp_path / "again"), dtype)
    assert again.config == model.config
    assert same_state(snapshot(again), snapshot(model))
    assert json.loads((tmp_path / "again" / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")


def test_the_saved_file_equals_the_one_of_transformers(directory, tmp_path):
    ours = load_file(save_pretrained(load_pretrained(directory), tmp_path / "ours") / "model.safetensors")
    assert same_state(ours, load_file(directory / "model.safetensors"))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_weights_are_neither_saved_nor_loaded(directory, change, tmp_path, value):
    model = load_pretrained(directory)
    model.h[1].mlp.c_fc.weight.data[3, 5] = value
    with pytest.raises(ValueError, match=r"the model: tensor 'h.1.mlp.c_fc.weight' has NaN or infinite values"):
        save_pretrained(model, tmp_path / "new")
    assert not (tmp_path / "new").exists()
    key = "transformer.h.0.ln_1.bias"
    file = change(lambda tensors: tensors[key].view(-1)[3].fill_(value))
    refused(directory, f"{file}: tensor {key!r} has NaN or infinite values")


# ------------------------------------------------------------------------------------------------- damaged checkpoints


@pytest.mark.parametrize(
    ("key", "stored", "expected"),
    [
        ("transformer.wte.weight", (97, 31), (97, 32)),
        ("transformer.h.1.ln_1.weight", (33,), (32,)),
        ("transformer.h.0.attn.c_proj.bias", (32, 1), (32,)),
        ("lm_head.weight", (98, 32), (97, 32)),
        ("transformer.h.1.attn.c_attn.weight", (96, 32), (32, 96)),  # as nn.Linear stores it, where GPT-2 has Conv1D
    ],
)
def test_a_wrong_shape_is_named_with_file_key_and_both_shapes(directory, change, key, stored, expected):
    file = change(lambda tensors: tensors.update({key: torch.zeros(stored)}))
    refused(directory, file, repr(key), f"{stored} in the file", f"{expected} by the config")


@pytest.mark.parametrize("key", ["wte.weight", "ln_f.bias", "h.1.mlp.c_fc.weight"])
def test_a_missing_key_is_named_with_its_file(directory, change, key):
    file = change(lambda tensors: {name: t for name, t in tensors.items() if name != f"transformer.{key}"})
    refused(directory, file, f"key {key!r} is missing")


@pytest.mark.parametrize("dtype", [torch.int64, torch.float8_e4m3fn])
def test_integer_and_8_bit_weights_are_refused(directory, change, dtype):
    key = "transformer.wpe.weight"
    file = change(lambda tensors: tensors.update({key: tensors[key].to(dtype)}))
    refused(directory, f"{file}: tensor {key!r} has the type {dtype}")


@pytest.mark.parametrize(
    ("prefix", "way_out"),
    [
        ("_orig_mod.", "as a model compiled by torch.compile has it: save the model in it"),
        ("module.", "as a model wrapped by DataParallel has it: save the model in it"),
        ("base_model.model.", "as a model of PEFT has it: save the result of merge_and_unload"),
        ("net.", "remove it from the keys"),
    ],
)
def test_the_prefix_of_a_wrapped_model_is_named_with_the_way_out(directory, change, prefix, way_out):
    file = change(lambda tensors: {f"{prefix}{key}": tensor for key, tensor in tensors.items()})
    refused(directory, f"{file}: no key begins with 'h.'", f"{prefix}transformer.h.0", repr(prefix), way_out)


@pytest.mark.parametrize("key", ["transformer.h.2.ln_1.weight", "score.weight", "transformer.h.0.attn.c_attn.lora_A"])
def test_an_unknown_key_is_named_with_its_file(directory, change, key):
    file = change(lambda tensors: tensors.update({key: torch.zeros(32)}))
    way_out = () if ".h." in key else ("AutoModelForCausalLM", "save_pretrained")
    refused(directory, file, f"key {key!r} is not a key of GPT-2", *way_out)


@settings(max_examples=40)
@given(st.data())
def test_a_truncated_file_or_a_mutated_header_is_a_value_error_with_its_name(tiny_gpt2_dir, tmp_path_factory, data):
    directory = shutil.copytree(tiny_gpt2_dir, tmp_path_factory.mktemp("damaged"), dirs_exist_ok=True)
    file = directory / "model.safetensors"
    content = file.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    if data.draw(st.booleans()):
        damaged = content[: data.draw(st.integers(0, len(content) - 1) | st.integers(0, 16))]
    else:
        place = data.draw(st.integers(0, header - 1))
        damaged = content[:place] + bytes([content[place] ^ data.draw(st.integers(1, 255))]) + content[place + 1 :]
    file.write_bytes(damaged)
    message = None
    try:
        load_pretrained(directory)
    except ValueError as error:
        message = str(error)
    if message is None:
        assert len(damaged) == len(content)  # a changed letter may be harmless, missing bytes never are
    else:
        assert str(file) in message


def test_a_missing_directory_or_config_is_named(directory, tmp_path):
    refused(tmp_path / "nowhere", "config.json does not exist", "nowhere the right", kind=FileNotFoundError)
    (directory / "config.json").unlink()
    refused(directory, "checkpoint/config.json does not exist", kind=FileNotFoundError)
    snapshot = tmp_path / "models--o--m/snapshots/0123"  # as the hub's cache has it
    shutil.move(directory, snapshot)
    (snapshot / "config.json").write_text("{}")
    refused(tmp_path / "models--o--m", f"{snapshot} has one: use that directory", kind=FileNotFoundError)
    (tmp_path / "models--o--m/adapter_config.json").write_text("{}")
    refused(tmp_path / "models--o--m", "it has an adapter, not a model", "merge_and_unload", kind=FileNotFoundError)


@pytest.mark.parametrize("content", [b"", b"{", b'{"n_layer": 2,}', b"\xff\xfe", b"[]", b"null", b'"gpt2"'])
def test_a_config_that_is_not_a_json_object_is_named(directory, content):
    (directory / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"checkpoint/config.json (is not valid JSON|is not UTF-8|contains a JSON)"):
        load_pretrained(directory)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"tie_word_embeddings": False},
            "tie_word_embeddings is False; only True is supported: the head is the embedding",
        ),
        ({"model_type": "llama"}, "model_type is 'llama'"),
        ({"add_cross_attention": True}, "add_cross_attention is True"),
        (
            {"quantization_config": {"a": "b"}},
            "quantization_config is {'a': 'b'}; only None is supported: save the model",
        ),
        ({"activation_function": "silu"}, "GPT2Config.activation_function is 'silu'; it must be gelu_new"),
        ({"n_layer": 0}, "GPT2Config.n_layer is 0"),
        ({"n_head": 5}, "n_embd=32 is not divisible by n_head=5"),
        ({"n_embd": "32"}, "GPT2Config.n_embd is '32'"),
        ({"n_positions": None}, "GPT2Config.n_positions is None"),
        ({"n_layer": 3.0}, "GPT2Config.n_layer is 3.0; it must be an integer"),
        ({"n_layer": 10**9}, "n_layer is 1000000000, but the weights have 2 layers"),
        ({"n_embd": 2**40}, "n_embd is 1099511627776, but no stored weight is larger than 128"),
        ({"n_inner": 2**62}, "mlp_width is 4611686018427387904, but"),
        ({"vocab_size": 2**70}, "GPT2Config.vocab_size is 1180591620717411303424"),
        ({"layer_norm_epsilon": float("nan")}, "GPT2Config.layer_norm_epsilon is nan; it must be a finite number"),
    ],
    ids=str,
)
def test_an_unsupported_config_is_refused(directory, configure, values, message):
    file = configure(**values)
    refused(directory, f"{file}: {message}")


def test_a_missing_or_truncated_shard_is_named(sharded):
    first, second, *_ = sorted(sharded.glob("model-*.safetensors"))
    first.write_bytes(first.read_bytes()[:-1])
    refused(sharded, f"{first} is damaged")
    second.unlink()
    index = "model.safetensors.index.json"
    refused(sharded, f"{second} does not exist, but {index} names it", kind=FileNotFoundError)


@pytest.mark.parametrize("name", ["../x.safetensors", "/x.safetensors", "a/b.safetensors"])
def test_an_index_cannot_reach_outside_its_directory(sharded, name):
    file = sharded / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    index["weight_map"]["transformer.wte.weight"] = name
    file.write_text(json.dumps(index))
    save_file({"transformer.wte.weight": torch.zeros(97, 32)}, sharded.parent / "x.safetensors")
    refused(sharded, f"{file}: shard '{name}' is not the plain name of a .safetensors file")


@pytest.mark.parametrize("weight_map", [[], None, {"wte.weight": 5}], ids=repr)
def test_an_index_without_a_map_of_names_is_refused(sharded, weight_map):
    file = sharded / "model.safetensors.index.json"
    file.write_text(json.dumps({"weight_map": weight_map}))
    refused(sharded, file)


def test_a_key_missing_from_all_shards_is_named_with_the_index(sharded):
    for shard in sharded.glob("model-*.safetensors"):
        tensors = load_file(shard)
        tensors.pop("transformer.ln_f.bias", None)
        save_file(tensors, shard)
    refused(sharded, "model.safetensors.index.json: key 'ln_f.bias' is missing")


def test_pickled_weights_are_not_read(directory):
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
    message = "pytorch_model.bin can run any code and is not read; convert it: load it with transformers"
    refused(directory, "neither model.safetensors nor", message, kind=FileNotFoundError)


def test_the_layout_of_openai_is_named_with_the_way_out(tmp_path):
    (tmp_path / "hparams.json").write_text("{}")
    refused(tmp_path, "OpenAI's TensorFlow format", "openai-community", kind=FileNotFoundError)


@pytest.mark.parametrize("dtype", ["bfloat16", torch.int8, None], ids=repr)
def test_a_dtype_that_is_not_one_of_weights_is_refused(directory, dtype):
    with pytest.raises(ValueError, match=r"^dtype is .*; it must be torch\.float64, torch\.float32, .*bfloat16$"):
        load_pretrained(directory, dtype)


def test_weights_beyond_the_range_of_the_dtype_are_refused(directory, change):
    file = change(lambda tensors: tensors["transformer.h.0.mlp.c_fc.weight"].__setitem__((0, 0), 1e5))
    assert load_pretrained(directory, torch.bfloat16).h[0].mlp.c_fc.weight.isfinite().all()
    with pytest.raises(ValueError, match=f"^{file}: tensor 'transformer.h.0.mlp.c_fc.weight' .* torch.float16; use an"):
        load_pretrained(directory, torch.float16)


@pytest.mark.parametrize("device", ["cpu", "cpu:0", torch.device("cpu", 0)], ids=repr)
def test_a_device_may_have_an_index(directory, device):
    assert load_pretrained(directory, device=device).wte.weight.device.type == "cpu"


def test_an_unknown_device_is_not_reported_as_a_damaged_file(directory):
    with pytest.raises(ValueError, match=r"^device 'gpu' is not known to torch .*cuda"):
        load_pretrained(directory, device="gpu")
