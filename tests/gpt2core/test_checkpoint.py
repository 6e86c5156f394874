"""Checkpoints and adapters: both ways with transformers, every damage named, nothing half written."""

import hashlib
import json
import os
import shutil
import stat
import subprocess

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import GPT2LMHeadModel

from gpt2core.checkpoint import (
    atomic_write,
    directory_sha256,
    file_sha256,
    load_adapter,
    load_pretrained,
    read_adapter,
    save_adapter,
    save_pretrained,
)
from gpt2core.config import LORA_TARGETS, GPT2Config, LoraConfig
from gpt2core.lora import add_lora, lora_layers, merge_lora
from gpt2core.model import GPT2

TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}  # as in test_model
IDS = torch.randint(97, (2, 12), generator=torch.Generator().manual_seed(0))
LORA = LoraConfig(rank=3, alpha=5.0, targets=LORA_TARGETS)
SPLIT = LoraConfig(rank=3, alpha=5.0, targets=("q", "proj"))


def snapshot(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(
        torch.equal(one[name], other[name]) and one[name].dtype == other[name].dtype for name in one
    )


def randomise(model):
    generator = torch.Generator().manual_seed(7)
    for _, layer in lora_layers(model):
        layer.lora_A.data.normal_(generator=generator)
        layer.lora_B.data.normal_(generator=generator)
    return model


@pytest.fixture
def directory(tiny_gpt2_dir, tmp_path):
    """A copy of the tiny checkpoint that a test may damage."""
    return shutil.copytree(tiny_gpt2_dir, tmp_path / "checkpoint")


@pytest.fixture(scope="module")
def whole(tiny_gpt2_dir):
    """The tiny checkpoint's state, as it is loaded undamaged."""
    return snapshot(load_pretrained(tiny_gpt2_dir))


@pytest.fixture
def change(directory):
    """A function: (change of the dictionary of tensors) -> the damaged file."""

    def apply(edit):
        file = directory / "model.safetensors"
        tensors = load_file(file)
        result = edit(tensors)
        save_file(result if isinstance(result, dict) else tensors, file, {"format": "pt"})
        return file

    return apply


@pytest.fixture
def configure(directory):
    def apply(**values):
        file = directory / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | values))
        return file

    return apply


# ------------------------------------------------------------------------------------------------- reading checkpoints


def test_the_loaded_model_is_in_eval_mode_and_trainable(directory):
    model = load_pretrained(str(directory))
    assert not model.training
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_what_is_loaded_does_not_change_with_its_file(directory, tmp_path):
    model = load_pretrained(directory)
    adapter = save_adapter(randomise(add_lora(load_pretrained(directory), LoraConfig())), tmp_path / "adapter")
    _, state = read_adapter(adapter, model.config)
    tensors = [*model.parameters(), *state.values()]
    before = [tensor.detach().clone() for tensor in tensors]
    for file in (directory / "model.safetensors", adapter / "adapter.safetensors"):
        with file.open("r+b") as opened:  # in place: a file put instead of it would not be the one that was read
            opened.write(bytes(file.stat().st_size))
    assert all(map(torch.equal, tensors, before))


def test_keys_may_lack_the_transformer_prefix(directory, change, whole):
    change(lambda tensors: {key.removeprefix("transformer."): tensor for key, tensor in tensors.items()})
    assert same(snapshot(load_pretrained(directory)), whole)


def test_an_lm_head_equal_to_the_embedding_is_accepted(directory, change, whole):
    change(lambda tensors: tensors.update({"lm_head.weight": tensors["transformer.wte.weight"].clone()}))
    assert same(snapshot(load_pretrained(directory)), whole)


def test_an_lm_head_other_than_the_embedding_is_refused(directory, change):
    change(lambda tensors: tensors.update({"lm_head.weight": tensors["transformer.wte.weight"] + 1e-3}))
    with pytest.raises(ValueError, match=r"checkpoint: lm_head.weight differs from wte.weight"):
        load_pretrained(directory)


@pytest.mark.parametrize("prefix", ["transformer.", ""])
def test_mask_buffers_of_old_checkpoints_are_ignored(directory, change, whole, prefix):
    buffers = {f"{prefix}h.{layer}.attn.bias": torch.ones(1, 1, 64, 64) for layer in range(2)}
    buffers |= {f"{prefix}h.{layer}.attn.masked_bias": torch.tensor(-1e4) for layer in range(2)}
    change(lambda tensors: tensors.update(buffers))
    assert same(snapshot(load_pretrained(directory)), whole)


@pytest.fixture
def sharded(tiny_gpt2_dir, tmp_path):
    target = tmp_path / "sharded"
    GPT2LMHeadModel.from_pretrained(tiny_gpt2_dir).save_pretrained(target, max_shard_size="20KB")
    assert len(list(target.glob("model-*.safetensors"))) > 2
    assert not (target / "model.safetensors").exists()
    return target


def test_a_sharded_checkpoint_is_read_whole(sharded, whole):
    assert same(snapshot(load_pretrained(sharded)), whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_are_read_in_the_type_asked_for(directory, whole, dtype):
    assert same(snapshot(load_pretrained(directory, dtype)), {name: tensor.to(dtype) for name, tensor in whole.items()})


def test_a_bf16_file_is_read_as_fp32_unless_asked_otherwise(directory, change, whole):
    change(lambda tensors: {key: tensor.bfloat16() for key, tensor in tensors.items()})
    assert same(snapshot(load_pretrained(directory)), {name: t.bfloat16().float() for name, t in whole.items()})


# ------------------------------------------------------------------------------------------------- writing checkpoints


@pytest.mark.parametrize(
    "words", [{}, {"n_inner": 20, "activation_function": "relu"}, {"scale_attn_by_inverse_layer_idx": True}], ids=str
)
def test_transformers_reads_what_is_saved_and_gives_the_same_logits(tmp_path, words):
    config = GPT2Config(n_layer=2, n_head=4, n_embd=32, n_positions=16, vocab_size=97, initializer_range=0.3, **words)
    model = GPT2(config, torch.Generator().manual_seed(0))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_(generator=torch.Generator().manual_seed(len(name)))
    theirs, report = GPT2LMHeadModel.from_pretrained(save_pretrained(model, tmp_path / "new"), output_loading_info=True)
    assert not report["unexpected_keys"]
    assert set(report["missing_keys"]) <= {"lm_head.weight"}
    torch.testing.assert_close(theirs.eval()(IDS).logits, model(IDS), **TOLERANCE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saving_and_loading_gives_the_very_model(directory, tmp_path, dtype):
    model = load_pretrained(directory, dtype)
    again = load_pretrained(save_pretrained(model, tmp_path / "again"), dtype)
    assert again.config == model.config
    assert same(snapshot(again), snapshot(model))
    assert json.loads((tmp_path / "again" / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")


def test_the_file_is_the_one_transformers_writes(directory, tmp_path):
    ours = load_file(save_pretrained(load_pretrained(directory), tmp_path / "ours") / "model.safetensors")
    assert same(ours, load_file(directory / "model.safetensors"))


# ------------------------------------------------------------------------------------------------- damaged checkpoints


@pytest.mark.parametrize(
    ("key", "stored", "wanted"),
    [
        ("transformer.wte.weight", (97, 31), (97, 32)),
        ("transformer.wpe.weight", (63, 32), (64, 32)),
        ("transformer.h.1.ln_1.weight", (33,), (32,)),
        ("transformer.h.0.attn.c_proj.bias", (32, 1), (32,)),
        ("lm_head.weight", (98, 32), (97, 32)),
    ],
)
def test_a_wrong_shape_is_named_with_file_key_and_both_shapes(directory, change, key, stored, wanted):
    file = change(lambda tensors: tensors.update({key: torch.zeros(stored)}))
    with pytest.raises(ValueError, match="shape") as error:
        load_pretrained(directory)
    for part in (str(file), repr(key), f"{stored} in the file", f"{wanted} by the config"):
        assert part in str(error.value)


@pytest.mark.parametrize("stored", [(96, 32), (32, 90)])  # the first is a Linear's, where GPT-2 keeps a Conv1D's
def test_a_wrong_shape_of_a_matrix_is_named_as_it_is_in_the_file(directory, change, stored):
    key = "transformer.h.1.attn.c_attn.weight"
    file = change(lambda tensors: tensors.update({key: torch.zeros(stored)}))
    with pytest.raises(ValueError, match="shape") as error:
        load_pretrained(directory)
    for part in (str(file), repr(key), f"{stored} in the file", "(32, 96) by the config"):
        assert part in str(error.value)


@pytest.mark.parametrize("key", ["wte.weight", "ln_f.bias", "h.1.mlp.c_fc.weight", "h.0.attn.c_attn.bias"])
def test_a_missing_key_is_named_with_its_file(directory, change, key):
    file = change(lambda tensors: {name: t for name, t in tensors.items() if name != f"transformer.{key}"})
    with pytest.raises(ValueError, match="is missing") as error:
        load_pretrained(directory)
    assert str(file) in str(error.value)
    assert repr(key) in str(error.value)


@pytest.mark.parametrize("key", ["transformer.h.2.ln_1.weight", "score.weight", "transformer.h.0.attn.c_attn.lora_A"])
def test_an_unknown_key_is_named_with_its_file(directory, change, key):
    file = change(lambda tensors: tensors.update({key: torch.zeros(32)}))
    with pytest.raises(ValueError, match="is not one of GPT-2's") as error:
        load_pretrained(directory)
    assert str(file) in str(error.value)
    assert repr(key) in str(error.value)


@pytest.mark.parametrize("left", [0, 1, 7, 8, 9, 200, 0.3, 0.9, -1], ids=str)
def test_a_truncated_file_is_named(directory, left):
    file = directory / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[: int(left * len(content)) if isinstance(left, float) else left])
    with pytest.raises(ValueError, match="damaged or cut short") as error:
        load_pretrained(directory)
    assert str(file) in str(error.value)


def test_a_missing_directory_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config.json is not there; is .*nowhere the right directory"):
        load_pretrained(tmp_path / "nowhere")


def test_a_missing_config_is_named(directory):
    (directory / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"checkpoint/config.json is not there"):
        load_pretrained(directory)


@pytest.mark.parametrize("content", [b"", b"{", b'{"n_layer": 2,}', b"\xff\xfe", b"[]", b"null", b'"gpt2"'])
def test_a_config_that_is_no_json_object_is_named(directory, content):
    (directory / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"checkpoint/config.json (is not valid JSON|holds a JSON)"):
        load_pretrained(directory)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"tie_word_embeddings": False}, "tie_word_embeddings is False"),
        ({"model_type": "llama"}, "model_type is 'llama'"),
        ({"add_cross_attention": True}, "add_cross_attention is True"),
        ({"activation_function": "silu"}, "activation_function is 'silu'; known: gelu_new"),
        ({"n_layer": 0}, "GPT2Config.n_layer is 0"),
        ({"n_head": 5}, "n_embd=32 cannot be divided into n_head=5"),
        ({"n_embd": "32"}, ""),
        ({"n_positions": None}, ""),
    ],
    ids=str,
)
def test_a_config_this_gpt2_cannot_follow_is_refused(directory, configure, words, message):
    file = configure(**words)
    with pytest.raises(ValueError, match=f"{file}: {message}"):
        load_pretrained(directory)


def test_a_shard_that_the_index_names_and_nobody_has_is_named(sharded):
    shard = sorted(sharded.glob("model-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=f"{shard} is not there, but model.safetensors.index.json names it"):
        load_pretrained(sharded)


def test_a_truncated_shard_is_named(sharded):
    shard = sorted(sharded.glob("model-*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(ValueError, match=f"{shard} is damaged"):
        load_pretrained(sharded)


@pytest.mark.parametrize("name", ["../x.safetensors", "/x.safetensors", "a/b.safetensors"])
def test_an_index_reaches_no_file_outside_of_its_directory(sharded, name):
    file = sharded / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    index["weight_map"]["transformer.wte.weight"] = name
    file.write_text(json.dumps(index))
    save_file({"transformer.wte.weight": torch.zeros(97, 32)}, sharded.parent / "x.safetensors")
    with pytest.raises(ValueError, match=f"{file}: shard '{name}' is not a plain file name"):
        load_pretrained(sharded)


@pytest.mark.parametrize("weight_map", [[], None, "model.safetensors", {"wte.weight": 5}], ids=repr)
def test_an_index_without_a_map_of_names_is_a_value_error(sharded, weight_map):
    file = sharded / "model.safetensors.index.json"
    file.write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ValueError, match=str(file)):
        load_pretrained(sharded)


def test_a_key_missing_from_all_shards_is_named_with_the_index(sharded):
    for shard in sharded.glob("model-*.safetensors"):
        tensors = load_file(shard)
        tensors.pop("transformer.ln_f.bias", None)
        save_file(tensors, shard)
    with pytest.raises(ValueError, match=r"model.safetensors.index.json: key 'ln_f.bias' is missing"):
        load_pretrained(sharded)


def test_pickled_weights_alone_are_not_read(directory):
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match=r"neither model.safetensors nor .*pytorch_model.bin"):
        load_pretrained(directory)


# ------------------------------------------------------------------------------------------------------------ adapters


@pytest.fixture
def bare(tiny_gpt2_dir):
    return load_pretrained(tiny_gpt2_dir)


@pytest.fixture
def adapter(tiny_gpt2_dir, tmp_path):
    """The directory of a random adapter."""
    return save_adapter(randomise(add_lora(load_pretrained(tiny_gpt2_dir), LORA)), tmp_path / "adapter")


@pytest.mark.parametrize("config", [LORA, SPLIT, LoraConfig(dropout=0.1), LoraConfig(targets=("v", "q"))], ids=str)
@pytest.mark.parametrize("into", ["bare", "adapted"])
def test_an_adapter_comes_back_exactly(bare, tiny_gpt2_dir, tmp_path, config, into):
    model = randomise(add_lora(load_pretrained(tiny_gpt2_dir), config)).eval()
    if into == "adapted":
        add_lora(bare, config)
    loaded = load_adapter(bare, save_adapter(model, tmp_path / "adapter"))
    assert loaded is bare
    assert same(snapshot(loaded), snapshot(model))
    assert next(lora_layers(loaded))[1].config == config
    assert {name for name, p in loaded.named_parameters() if p.requires_grad} == {
        name for name, _ in loaded.named_parameters() if "lora_" in name
    }
    assert torch.equal(loaded.eval()(IDS), model(IDS))


def test_an_adapter_for_a_bf16_base_is_fp32_and_exact(tiny_gpt2_dir, tmp_path):
    model = randomise(add_lora(load_pretrained(tiny_gpt2_dir, torch.bfloat16), LORA))
    loaded = load_adapter(load_pretrained(tiny_gpt2_dir, torch.bfloat16), save_adapter(model, tmp_path))
    assert same(snapshot(loaded), snapshot(model))
    assert {tensor.dtype for tensor in load_file(tmp_path / "adapter.safetensors").values()} == {torch.float32}


def test_a_merged_models_adapter_is_that_of_the_unmerged(bare, tmp_path):
    model = randomise(add_lora(bare, LORA))
    save_adapter(model, tmp_path / "before")
    save_adapter(merge_lora(model), tmp_path / "after")
    assert directory_sha256(tmp_path / "before") == directory_sha256(tmp_path / "after")


def test_the_adapters_file_holds_lora_alone_and_names_its_base(bare, tmp_path):
    save_adapter(add_lora(bare, SPLIT), tmp_path, base={"sha256": "abc"})
    description = json.loads((tmp_path / "adapter.json").read_text())
    assert description["base"] == {"sha256": "abc"}
    assert description["lora"] == {"rank": 3, "alpha": 5.0, "targets": ["q", "proj"], "dropout": 0.0}
    assert all("lora_" in key for key in load_file(tmp_path / "adapter.safetensors"))


def test_a_bare_model_has_no_adapter_to_save(bare, tmp_path):
    with pytest.raises(ValueError, match="no LoRA layers"):
        save_adapter(bare, tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(rank=2, alpha=5.0, targets=LORA_TARGETS),
        LoraConfig(rank=3, alpha=6.0, targets=LORA_TARGETS),
        SPLIT,
        LoraConfig(rank=3, alpha=5.0, targets=LORA_TARGETS, dropout=0.1),
    ],
    ids=str,
)
def test_an_adapter_of_another_config_is_refused(bare, adapter, config):
    before = snapshot(add_lora(bare, config))
    with pytest.raises(ValueError, match="remove_lora first"):
        load_adapter(bare, adapter)
    assert same(snapshot(bare), before)


def test_a_merged_model_takes_no_other_adapter(bare, adapter):
    before = snapshot(merge_lora(add_lora(bare, LORA)))
    with pytest.raises(ValueError, match="merged"):
        load_adapter(bare, adapter)
    assert same(snapshot(bare), before)


def rewrite(adapter, edit):
    """Change the tensors and keep the digest right, as a writer with another idea of the format would."""
    tensors = load_file(adapter / "adapter.safetensors")
    edit(tensors)
    save_file(tensors, adapter / "adapter.safetensors")
    description = json.loads((adapter / "adapter.json").read_text())
    description["sha256"] = hashlib.sha256((adapter / "adapter.safetensors").read_bytes()).hexdigest()
    (adapter / "adapter.json").write_text(json.dumps(description))


def cut(adapter, length):
    content = (adapter / "adapter.safetensors").read_bytes()
    (adapter / "adapter.safetensors").write_bytes(content[:length])


def flip_last_byte(adapter):
    content = bytearray((adapter / "adapter.safetensors").read_bytes())
    content[-1] ^= 1
    (adapter / "adapter.safetensors").write_bytes(content)


def describe(adapter, **words):
    file = adapter / "adapter.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | words))


KEY = "h.1.mlp.c_fc.lora_A"
DAMAGES = {
    "cut by a byte": (lambda a: cut(a, -1), ValueError, ["adapter.safetensors", "damaged"]),
    "cut in the header": (lambda a: cut(a, 20), ValueError, ["adapter.safetensors", "damaged"]),
    "empty": (lambda a: cut(a, 0), ValueError, ["adapter.safetensors", "damaged"]),
    "one bit": (flip_last_byte, ValueError, ["adapter.safetensors", "sha256"]),
    "missing key": (lambda a: rewrite(a, lambda t: t.pop(KEY)), ValueError, ["adapter.safetensors", KEY, "missing"]),
    "extra key": (
        lambda a: rewrite(a, lambda t: t.update({"h.7.lora_A": torch.zeros(1)})),
        ValueError,
        ["adapter.safetensors", "h.7.lora_A"],
    ),
    "a base's key": (
        lambda a: rewrite(a, lambda t: t.update({"wte.weight": torch.zeros(97, 32)})),
        ValueError,
        ["adapter.safetensors", "wte.weight"],
    ),
    "wrong shape": (
        lambda a: rewrite(a, lambda t: t.update({KEY: torch.zeros(1, 3, 31)})),
        ValueError,
        ["adapter.safetensors", KEY, "(1, 3, 31)", "(1, 3, 32)"],
    ),
    "no weights": (lambda a: (a / "adapter.safetensors").unlink(), FileNotFoundError, ["adapter.safetensors"]),
    "no description": (lambda a: (a / "adapter.json").unlink(), FileNotFoundError, ["adapter.json"]),
    "bad JSON": (lambda a: (a / "adapter.json").write_text("{"), ValueError, ["adapter.json"]),
    "no digest": (lambda a: describe(a, sha256=None), ValueError, ["adapter.safetensors", "sha256"]),
    "no LoRA config": (lambda a: describe(a, lora=None), ValueError, ["adapter.json", "lora"]),
    "LoRA config of a stranger": (lambda a: describe(a, lora={"r": 8}), ValueError, ["adapter.json", "'r'"]),
    "bad rank": (lambda a: describe(a, lora={"rank": 0}), ValueError, ["adapter.json", "LoraConfig.rank is 0"]),
    "other description": (lambda a: describe(a, lora={"rank": 4}), ValueError, ["adapter"]),
}


@pytest.mark.parametrize("into", ["bare", "adapted"])
@pytest.mark.parametrize(("damage", "kind", "parts"), DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_adapter_is_named_and_leaves_the_model_as_it_was(bare, adapter, damage, kind, parts, into):
    if into == "adapted":
        randomise(add_lora(bare, LORA))
    before, trainable = snapshot(bare), [p.requires_grad for p in bare.parameters()]
    damage(adapter)
    with pytest.raises(kind) as error:
        load_adapter(bare, adapter)
    for part in (str(adapter), *parts):
        assert part in str(error.value)
    assert same(snapshot(bare), before)
    assert [p.requires_grad for p in bare.parameters()] == trainable


def test_an_adapter_of_a_larger_model_is_refused(adapter):
    model = GPT2(GPT2Config(n_layer=1, n_head=2, n_embd=32, n_positions=64, vocab_size=97))
    with pytest.raises(ValueError, match=r"adapter.safetensors: key 'h.1"):
        load_adapter(model, adapter)
    assert not list(lora_layers(model))


def test_an_adapter_of_gpt2_medium_is_a_few_megabytes(tmp_path):
    with torch.device("meta"):
        model = add_lora(GPT2(GPT2Config(n_layer=24, n_head=16, n_embd=1024)), LoraConfig(rank=8, targets=("q", "v")))
    for _, layer in lora_layers(model):  # the frozen base needs no memory
        layer.lora_A = nn.Parameter(torch.zeros(layer.lora_A.shape))
        layer.lora_B = nn.Parameter(torch.zeros(layer.lora_B.shape))
    size = (save_adapter(model, tmp_path) / "adapter.safetensors").stat().st_size
    assert 4 * 24 * 2 * 8 * (1024 + 1024) < size <= 3.3e6


# --------------------------------------------------------------------------------------------------- files and digests


def test_a_failing_rename_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    file = tmp_path / "file"
    file.write_bytes(b"old")

    def fail(*_):
        raise OSError("no space")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="no space"):
        atomic_write(file, b"new")
    assert file.read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_an_interrupt_while_writing_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    file = tmp_path / "file"
    file.write_bytes(b"old")

    def interrupt(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        atomic_write(file, b"new")
    assert file.read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_failing_save_leaves_the_checkpoint_there_was(bare, directory, monkeypatch):
    before = directory_sha256(directory)

    def fail(*_):
        raise OSError("no space")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="no space"):
        save_pretrained(bare, directory)
    assert directory_sha256(directory) == before


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o000], ids=oct)
def test_written_files_are_readable_by_all_and_writable_by_the_owner(tmp_path, umask):
    old = os.umask(umask)
    try:
        atomic_write(tmp_path / "new" / "file", b"content")
    finally:
        os.umask(old)
    assert (tmp_path / "new" / "file").read_bytes() == b"content"
    assert stat.S_IMODE((tmp_path / "new" / "file").stat().st_mode) == 0o644


@pytest.fixture
def tree(tmp_path):
    for name, content in {"b": b"1", "a.txt": b"", "sub/c d": b"2", "a/é": b"3", "Z": b"4"}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    return tmp_path


def test_the_digest_of_a_directory_is_sha256sums(tree):
    if not shutil.which("sha256sum"):
        pytest.skip("sha256sum is not installed")
    command = "find . -type f -printf '%P\\0' | LC_ALL=C sort -z | xargs -0 sha256sum | sha256sum"
    output = subprocess.run(["bash", "-c", command], cwd=tree, check=True, capture_output=True, text=True).stdout
    assert directory_sha256(tree) == output.split()[0]


def test_the_digest_may_be_of_some_files_in_any_order(tree):
    lines = "".join(f"{hashlib.sha256(c).hexdigest()}  {name}\n" for name, c in (("Z", b"4"), ("b", b"1")))
    assert directory_sha256(tree, ["b", "Z"]) == hashlib.sha256(lines.encode()).hexdigest()
    assert directory_sha256(tree, ["Z", "b"]) == directory_sha256(str(tree), iter(["b", "Z"]))


@pytest.mark.parametrize("edit", [lambda t: (t / "b").write_bytes(b"2"), lambda t: (t / "b").rename(t / "B")])
def test_the_digest_sees_contents_and_names(tree, edit):
    before = directory_sha256(tree)
    edit(tree)
    assert directory_sha256(tree) != before


def test_the_digest_of_a_file_is_its_sha256(tree):
    assert file_sha256(tree / "b") == hashlib.sha256(b"1").hexdigest()
