"""Adapter directories: exact round trips, and every damage named while the model stays as it was."""

import hashlib
import json
import logging

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

from gpt2core.checkpoint import export_peft, load_adapter, load_pretrained, save_adapter
from gpt2core.config import LORA_TARGETS, GPT2Config, LoraConfig
from gpt2core.engine import Engine
from gpt2core.files import directory_sha256
from gpt2core.lora import add_lora, lora_layers, merge_lora
from gpt2core.model import GPT2
from gpt2core.prompt import PROMPT_TEMPLATE
from tests.helpers import randomize_lora, same_state, snapshot

IDS = torch.randint(97, (2, 12), generator=torch.Generator().manual_seed(0))
LORA = LoraConfig(rank=3, alpha=5.0, targets=LORA_TARGETS)
SPLIT = LoraConfig(rank=3, alpha=5.0, targets=("q", "proj"))
KEY = "h.1.mlp.c_fc.lora_A"


@pytest.fixture
def adapter(tiny_gpt2_dir, tmp_path):
    """The directory of a random adapter."""
    return save_adapter(randomize_lora(add_lora(load_pretrained(tiny_gpt2_dir), LORA)), tmp_path / "adapter")


@settings(max_examples=12)
@given(
    st.lists(st.sampled_from(LORA_TARGETS), min_size=1, unique=True),
    st.integers(1, 4),
    st.sampled_from([0.0, 0.1]),
    st.booleans(),
)
def test_an_adapter_round_trips_exactly(tiny_gpt2_dir, tmp_path_factory, targets, rank, dropout, into_adapted):
    config = LoraConfig(rank=rank, targets=targets, dropout=dropout)
    model = randomize_lora(add_lora(load_pretrained(tiny_gpt2_dir), config)).eval()
    target = load_pretrained(tiny_gpt2_dir)
    if into_adapted:
        add_lora(target, config)
    loaded = load_adapter(target, save_adapter(model, tmp_path_factory.mktemp("adapter")))
    assert loaded is target
    assert same_state(snapshot(loaded), snapshot(model))
    assert next(lora_layers(loaded))[1].config == config
    assert all(parameter.requires_grad == ("lora_" in name) for name, parameter in loaded.named_parameters())
    assert torch.equal(loaded.eval()(IDS), model(IDS))


def test_the_adapter_of_a_bf16_base_is_exact_in_fp32(tiny_gpt2_dir, tmp_path):
    model = randomize_lora(add_lora(load_pretrained(tiny_gpt2_dir, torch.bfloat16), LORA))
    loaded = load_adapter(load_pretrained(tiny_gpt2_dir, torch.bfloat16), save_adapter(model, tmp_path))
    assert same_state(snapshot(loaded), snapshot(model))
    assert {tensor.dtype for tensor in load_file(tmp_path / "adapter.safetensors").values()} == {torch.float32}


def test_the_adapter_of_a_merged_model_is_that_of_the_unmerged_one(bare, tmp_path):
    model = randomize_lora(add_lora(bare, LORA))
    save_adapter(model, tmp_path / "before")
    save_adapter(merge_lora(model), tmp_path / "after")
    assert directory_sha256(tmp_path / "before") == directory_sha256(tmp_path / "after")


def test_the_files_have_lora_weights_only_and_name_base_config_and_prompt_template(bare, tmp_path):
    save_adapter(add_lora(bare, SPLIT), tmp_path, base={"sha256": "abc"})
    description = json.loads((tmp_path / "adapter.json").read_text())
    assert description["base"] == {"sha256": "abc"}
    variant = {"rslora": False, "dora": False, "b_lr_ratio": 1.0}
    assert description["lora"] == {"rank": 3, "alpha": 5.0, "targets": ["q", "proj"], "dropout": 0.0, **variant}
    assert description["prompt"] == {"name": "alpaca", "sha256": PROMPT_TEMPLATE.sha256}
    assert all("lora_" in key for key in load_file(tmp_path / "adapter.safetensors"))


def test_a_model_without_an_adapter_is_not_saved_as_one(bare, tmp_path):
    with pytest.raises(ValueError, match="no LoRA layers"):
        save_adapter(bare, tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("change", [{"rank": 2}, {"alpha": 6.0}, {"targets": ("q",)}, {"dropout": 0.1}], ids=str)
def test_an_adapter_of_another_config_is_refused(bare, adapter, change):
    values = {"rank": 3, "alpha": 5.0, "targets": LORA_TARGETS} | change
    before = snapshot(add_lora(bare, LoraConfig(**values)))
    with pytest.raises(ValueError, match="remove_lora"):
        load_adapter(bare, adapter)
    assert same_state(snapshot(bare), before)


def test_a_merged_model_accepts_no_other_adapter(bare, adapter):
    before = snapshot(merge_lora(add_lora(bare, LORA)))
    with pytest.raises(ValueError, match="merged"):
        load_adapter(bare, adapter)
    assert same_state(snapshot(bare), before)


def describe(adapter, **values):
    file = adapter / "adapter.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def test_an_adapter_of_another_prompt_template_is_refused_with_both_names(bare, adapter):
    describe(adapter, prompt={"name": "chatml", "sha256": "f" * 64})
    with pytest.raises(ValueError, match=r"adapter.json: .* template 'chatml' \(sha256 ffff.* uses 'alpaca'"):
        load_adapter(bare, adapter)
    assert not list(lora_layers(bare))


def test_an_adapter_from_before_the_template_was_stored_is_accepted(bare, adapter):
    file = adapter / "adapter.json"
    description = json.loads(file.read_text())
    del description["prompt"]
    file.write_text(json.dumps(description))
    load_adapter(bare, adapter)


def test_an_adapter_of_another_base_is_refused_unless_it_is_accepted(bare, tiny_gpt2_dir, tmp_path, caplog):
    model = randomize_lora(add_lora(load_pretrained(tiny_gpt2_dir), LORA))
    adapter = save_adapter(model, tmp_path, base={"name": "nano", "sha256": "a" * 64})
    with pytest.raises(ValueError, match=r"adapter.json: .* base 'nano' with sha256 'aaa.* has sha256 bbb"):
        load_adapter(bare, adapter, base_sha256="b" * 64)
    assert not list(lora_layers(bare))
    caplog.set_level(logging.WARNING, "gpt2core.adapter_files")
    load_adapter(bare, adapter, base_sha256="b" * 64, accept_other_base=True)
    assert "this base has sha256 bbb" in caplog.text
    for known in ("a" * 64, None):
        load_adapter(load_pretrained(tiny_gpt2_dir), adapter, base_sha256=known)
    engine = Engine(load_pretrained(tiny_gpt2_dir), weights="fp32", base_sha256="b" * 64)
    with pytest.raises(ValueError, match=r"with sha256 'aaa.* has sha256 bbb"):
        engine.load_adapter("mine", adapter)
    Engine(load_pretrained(tiny_gpt2_dir), weights="fp32", base_sha256="a" * 64).load_adapter("mine", adapter)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_non_finite_adapter_is_neither_saved_nor_loaded_nor_exported(bare, adapter, tmp_path, value):
    before = snapshot(bare)
    rewrite(adapter, lambda tensors: tensors[KEY].view(-1)[5].fill_(value))
    with pytest.raises(ValueError, match=f"adapter.safetensors: tensor '{KEY}' has NaN or infinite values"):
        load_adapter(bare, adapter)
    assert same_state(snapshot(bare), before)
    add_lora(bare, LORA).h[0].attn.c_attn.lora_B.data[0, 0, 0] = value
    for save in (save_adapter, export_peft):
        with pytest.raises(ValueError, match=r"the adapter: tensor '.*h.0.attn.c_attn.lora_B"):
            save(bare, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_an_integer_tensor_is_refused(bare, adapter):
    rewrite(adapter, lambda tensors: tensors.update({KEY: tensors[KEY].long()}))
    with pytest.raises(ValueError, match=f"tensor '{KEY}' has the type torch.int64"):
        load_adapter(bare, adapter)


def rewrite(adapter, edit):
    """Change the tensors and update the digest, as another writer of the format would."""
    tensors = load_file(adapter / "adapter.safetensors")
    edit(tensors)
    save_file(tensors, adapter / "adapter.safetensors")
    describe(adapter, sha256=hashlib.sha256((adapter / "adapter.safetensors").read_bytes()).hexdigest())


def patch(adapter, edit):
    file = adapter / "adapter.safetensors"
    file.write_bytes(edit(file.read_bytes()))


DAMAGES = {
    "truncated by a byte": (lambda a: patch(a, lambda c: c[:-1]), ["adapter.safetensors", "damaged"]),
    "truncated in the header": (lambda a: patch(a, lambda c: c[:20]), ["adapter.safetensors", "damaged"]),
    "empty": (lambda a: patch(a, lambda c: b""), ["adapter.safetensors", "damaged"]),
    "one bit": (lambda a: patch(a, lambda c: c[:-1] + bytes([c[-1] ^ 1])), ["adapter.safetensors", "sha256"]),
    "missing key": (lambda a: rewrite(a, lambda t: t.pop(KEY)), ["adapter.safetensors", KEY, "missing"]),
    "extra key": (
        lambda a: rewrite(a, lambda t: t.update({"wte.weight": torch.zeros(97, 32)})),
        ["adapter.safetensors", "wte.weight"],
    ),
    "wrong shape": (
        lambda a: rewrite(a, lambda t: t.update({KEY: torch.zeros(1, 3, 31)})),
        ["adapter.safetensors", KEY, "(1, 3, 31)", "(1, 3, 32)"],
    ),
    "no weights": (lambda a: (a / "adapter.safetensors").unlink(), ["adapter.safetensors"]),
    "no description": (lambda a: (a / "adapter.json").unlink(), ["adapter.json"]),
    "bad JSON": (lambda a: (a / "adapter.json").write_text("{"), ["adapter.json"]),
    "no digest": (lambda a: describe(a, sha256=None), ["adapter.safetensors", "sha256"]),
    "no LoRA config": (lambda a: describe(a, lora=None), ["adapter.json", "lora"]),
    "an unknown LoRA field": (lambda a: describe(a, lora={"r": 8}), ["adapter.json", "'r'"]),
    "a wrong rank": (lambda a: describe(a, lora={"rank": 0}), ["adapter.json", "LoraConfig.rank is 0"]),
    "a float rank": (lambda a: describe(a, lora={"rank": 8.0}), ["adapter.json", "LoraConfig.rank is 8.0"]),
    "a huge rank": (lambda a: describe(a, lora={"rank": 2**70}), ["adapter.json", "LoraConfig.rank is 1180"]),
    "a large rank": (lambda a: describe(a, lora={"rank": 2**40}), ["adapter.json", "rank is 1099511627776, but"]),
    "nested JSON": (lambda a: (a / "adapter.json").write_text("[" * 10**5), ["adapter.json", "not valid JSON"]),
    "another rank": (lambda a: describe(a, lora={"rank": 4}), ["adapter"]),
}


@pytest.mark.parametrize("into_adapted", [False, True])
@pytest.mark.parametrize(("damage", "parts"), DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_adapter_is_named_and_the_model_is_unchanged(bare, adapter, damage, parts, into_adapted):
    if into_adapted:
        randomize_lora(add_lora(bare, LORA))
    before, trainable = snapshot(bare), [p.requires_grad for p in bare.parameters()]
    damage(adapter)
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        load_adapter(bare, adapter)
    for part in (str(adapter), *parts):
        assert part in str(error.value)
    assert same_state(snapshot(bare), before)
    assert [p.requires_grad for p in bare.parameters()] == trainable


def test_an_adapter_of_a_larger_model_is_refused(adapter):
    model = GPT2(GPT2Config(n_layer=1, n_head=2, n_embd=32, n_positions=64, vocab_size=97))
    with pytest.raises(ValueError, match=r"adapter.safetensors: key 'h.1"):
        load_adapter(model, adapter)
    assert not list(lora_layers(model))


def test_an_adapter_of_gpt2_medium_has_a_few_megabytes(tmp_path):
    with torch.device("meta"):
        model = add_lora(GPT2(GPT2Config(n_layer=24, n_head=16, n_embd=1024)), LoraConfig(rank=8, targets=("q", "v")))
    for _, layer in lora_layers(model):  # the frozen base needs no memory
        layer.lora_A = nn.Parameter(torch.zeros(layer.lora_A.shape))
        layer.lora_B = nn.Parameter(torch.zeros(layer.lora_B.shape))
    size = (save_adapter(model, tmp_path) / "adapter.safetensors").stat().st_size
    assert 4 * 24 * 2 * 8 * (1024 + 1024) < size <= 3.3e6
