"""PEFT's adapter directories: what PEFT saves is loaded with the same logits, and export is undone by import."""

import json
import os
from copy import deepcopy

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from gpt2core.adapter_files import read_adapter
from gpt2core.checkpoint import export_peft, load_adapter, load_pretrained
from gpt2core.config import LORA_TARGETS, LoraConfig
from gpt2core.lora import add_lora, lora_config, lora_layers, merge_lora
from tests.helpers import randomize_lora, same_state, snapshot

TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}  # as in test_model
IDS = torch.randint(97, (2, 12), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def save(hf, tmp_path):
    """A function (values of peft.LoraConfig) -> the model with random adapter, and its directory as PEFT saves it."""

    def make(base=hf, **values):
        torch.manual_seed(0)
        model = peft.get_peft_model(
            deepcopy(base), peft.LoraConfig(**{"r": 3, "fan_in_fan_out": True, "task_type": "CAUSAL_LM"} | values)
        )
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, 1.0 if "magnitude" in name else 0.0, 0.3)
        model.save_pretrained(tmp_path / "peft")
        return model.eval(), tmp_path / "peft"

    return make


@pytest.mark.parametrize(
    ("values", "targets"),
    [
        ({"target_modules": ["c_attn"]}, ("q", "k", "v")),
        ({"target_modules": ["attn.c_proj"], "lora_alpha": 16, "lora_dropout": 0.1}, ("o",)),
        ({"target_modules": ["c_attn", "c_proj", "c_fc"], "r": 5, "lora_alpha": 2}, LORA_TARGETS),
        ({"target_modules": "all-linear", "use_rslora": True, "lora_alpha": 7}, LORA_TARGETS),
        ({"target_modules": ["c_attn", "c_proj"], "use_dora": True}, ("q", "k", "v", "o", "proj")),
        (
            {"target_modules": ["c_attn", "c_fc"], "rank_pattern": {"c_fc": 2}, "alpha_pattern": {r"1\.mlp\.c_fc": 9}},
            ("q", "k", "v", "fc"),
        ),
        ({"target_modules": ["c_attn", "mlp.c_proj"], "layers_to_transform": [1]}, ("q", "k", "v", "proj")),
        ({"target_modules": r".*h\.0\.attn\.c_proj|.*\.c_fc", "use_rslora": True}, ("o", "fc")),
        ({"target_modules": ["c_attn"], "exclude_modules": r".*h\.1\..*"}, ("q", "k", "v")),
        ({"target_modules": ["transformer.h.1.attn.c_attn"]}, ("q", "k", "v")),
        ({"target_modules": ["0.attn.c_attn"]}, ("q", "k", "v")),
        ({"target_modules": ["h.1.mlp.c_fc", "c_attn"]}, ("q", "k", "v", "fc")),
        (
            {"target_modules": ["transformer.h.0.attn.c_attn", "c_fc"], "layers_to_transform": 1},
            ("q", "k", "v", "fc"),
        ),
        (
            {"target_modules": ["c_attn"], "layers_to_transform": [1], "layers_pattern": "transformer.h"},
            ("q", "k", "v"),
        ),
    ],
    ids=str,
)
def test_an_adapter_saved_by_peft_computes_the_logits_of_peft(bare, save, values, targets):
    theirs, directory = save(**values)
    load_adapter(bare, directory)
    assert lora_config(bare).targets == targets
    assert lora_config(bare).dropout == values.get("lora_dropout", 0.0)
    with torch.no_grad():
        logits = bare(IDS)
        torch.testing.assert_close(logits, theirs(IDS).logits, **TOLERANCE)
        torch.testing.assert_close(merge_lora(bare)(IDS), logits, **TOLERANCE)


@pytest.mark.parametrize(
    "values",
    [
        {"rank_pattern": {"^h.0.attn.c_attn": 5}, "alpha_pattern": {"^h.1.attn.c_attn": 3}},
        {"target_modules": r"h\.1\.attn\.c_attn|.*c_fc"},
        {"layers_to_transform": [1], "layers_pattern": "h"},
    ],
    ids=str,
)
def test_an_adapter_of_a_gpt2_without_its_head_computes_the_hidden_states_of_peft(hf, bare, save, values):
    theirs, directory = save(
        hf.transformer, **{"target_modules": ["c_attn"], "task_type": "FEATURE_EXTRACTION"} | values
    )
    load_adapter(bare, directory)
    with torch.no_grad():
        logits = hf.lm_head(theirs(IDS).last_hidden_state)
        torch.testing.assert_close(bare(IDS), logits, **TOLERANCE)


@settings(max_examples=15)
@given(
    st.lists(st.sampled_from(LORA_TARGETS), min_size=1, unique=True),
    st.integers(1, 4),
    st.sampled_from([16.0, 1.0, 7.0, -2.0]),
)
def test_importing_an_export_gives_the_same_adapter(tiny_gpt2_dir, tmp_path_factory, targets, rank, alpha):
    directory = tmp_path_factory.mktemp("peft")
    ordered = tuple(target for target in LORA_TARGETS if target in targets)
    model = add_lora(load_pretrained(tiny_gpt2_dir), LoraConfig(rank=rank, alpha=alpha, targets=ordered, dropout=0.1))
    export_peft(randomize_lora(model), directory)
    again = load_adapter(load_pretrained(tiny_gpt2_dir), directory)
    assert lora_config(again) == lora_config(model)
    assert same_state(snapshot(again), snapshot(model))


def test_an_export_names_a_base_only_if_it_is_told(hf, bare, tmp_path):
    adapted = randomize_lora(add_lora(bare, LoraConfig()))
    configs = [
        json.loads((export_peft(adapted, tmp_path / str(base), *base) / "adapter_config.json").read_text())
        for base in ((), ("my/gpt2",))
    ]
    assert [each["base_model_name_or_path"] for each in configs] == [None, "my/gpt2"]
    theirs = peft.PeftModel.from_pretrained(deepcopy(hf), tmp_path / "()")
    torch.testing.assert_close(theirs(IDS).logits, adapted(IDS), **TOLERANCE)


def test_an_export_pins_a_base_of_the_hub_to_its_commit(bare, tmp_path):
    adapted = randomize_lora(add_lora(bare, LoraConfig()))
    for name, revision in (("pinned", "f" * 40), ("free", None)):  # PEFT loads the base with this revision
        export_peft(adapted, tmp_path / name, "my/gpt2", revision)
        assert peft.PeftConfig.from_pretrained(tmp_path / name).revision == revision


def test_an_untrained_adapter_of_peft_changes_nothing(bare, hf, tmp_path):
    model = peft.get_peft_model(deepcopy(hf), peft.LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True))
    model.save_pretrained(tmp_path)
    before = bare(IDS)
    assert torch.equal(load_adapter(bare, tmp_path)(IDS), before)


def describe(directory, **values):
    file = directory / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
        ({"bias": "all"}, "bias is 'all'.*merge_and_unload"),
        ({"use_qalora": True}, "use_qalora is True; this feature of PEFT is not supported"),
        ({"modules_to_save": ["ln_f"]}, "modules_to_save is .*merge it into its base by PEFT's merge_and_unload"),
        ({"lora_alpha": 0}, "LoraConfig.alpha is 0.0; it must be non-zero"),
        ({"a_feature_of_tomorrow": 1}, "a_feature_of_tomorrow is 1"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa', which changes the base"),
        ({"r": 4}, "the rank of transformer.h.0.attn.c_attn is 4, but its weights have rank 3"),
        ({"r": 2**70}, "the rank of"),
        ({"lora_alpha": "16"}, "lora_alpha of transformer.h.0.attn.c_attn is '16'"),
        ({"lora_dropout": 2}, "LoraConfig.dropout is 2"),
        ({"target_modules": 3}, "target_modules is 3; it must be a pattern, a list of names, or null"),
        ({"exclude_modules": [None]}, r"exclude_modules is \[None\]; it must be"),
        ({"layers_to_transform": [0], "layers_pattern": ["([a-z]+)+!"]}, "layers_pattern has the pattern"),
        ({"lora_alpha": 10**400}, "lora_alpha of transformer.h.0.attn.c_attn is 1000"),
        ({"alpha_pattern": {"c_attn": 10**400}}, "lora_alpha of transformer.h.0.attn.c_attn is 1000"),
        ({"exclude_modules": True}, "exclude_modules is True; it must be a pattern, a list of names, or null"),
        ({"target_modules": [1]}, r"target_modules is \[1\]; it must be a pattern, a list of names, or null"),
        ({"target_modules": "(([a-z_0-9.])+)+!"}, "target_modules has the pattern"),
        ({"exclude_modules": "(a|a)*!"}, "exclude_modules has the pattern"),
        ({"target_modules": ".*" * 9}, "target_modules has the pattern"),
        ({"target_modules": "(.|.)" * 28 + "!"}, "target_modules has the pattern"),
        ({"target_modules": ".?" * 28 + "!"}, "target_modules has the pattern"),
        ({"target_modules": "(?x)(.+) *!"}, "target_modules has the pattern"),
        ({"rank_pattern": {"([a-z]+)+!": 3}}, r"rank_pattern has the pattern '\(\[a-z"),
        ({"rank_pattern": {"?x:(.+) *!": 3}}, "rank_pattern has the pattern"),
        ({"alpha_pattern": {"a" * 1_001: 3}}, "alpha_pattern has the pattern"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_an_unsupported_feature_or_a_wrong_value_is_refused_by_name(bare, save, values, message):
    _, directory = save(target_modules=["c_attn"])
    describe(directory, **values)
    with pytest.raises(ValueError, match=f"adapter_config.json: {message}"):
        load_adapter(bare, directory)
    assert not list(lora_layers(bare))


@pytest.mark.parametrize(
    "pattern",
    [
        r".*\.(attn|mlp)\.c_(attn|proj|fc)",
        r".*h\.[0-5]\.attn\.c_attn",
        r"(?!.*lm_head).*\.attn\.c_attn",
        r"(transformer\.)?h\.\d+\.attn\.c_attn",
        r".*h.*(attn|mlp).*(c_attn|c_proj)",
        r"transformer\.h\.(?:0|1|2|3|4|5|6|7|8|9|10|11)\.(attn|mlp)\.c_[a-z]{2,4}",
    ],
)
def test_patterns_that_people_write_are_supported(bare, save, pattern):
    _, directory = save(target_modules=pattern)
    lora, _ = read_adapter(directory, bare.config)
    assert "q" in lora.targets


@pytest.mark.parametrize("prefix", ["transformer.", ""])
@pytest.mark.parametrize(
    ("targets", "saved", "message"),
    [
        (["c_attn"], True, r"has weights of (lm_head|wte).*save_pretrained\(directory, save_embedding_layers=False\)"),
        (["c_attn", "wte"], "auto", "has LoRA of wte.*train it without wte and lm_head in target_modules"),
        (["c_attn", "lm_head"], "auto", "has LoRA of lm_head.*train it without"),
    ],
)
def test_weights_of_the_embedding_are_refused_with_the_way_out(bare, save, prefix, targets, saved, message):
    model, directory = save(target_modules=targets)
    model.save_pretrained(directory, save_embedding_layers=saved)
    file = directory / "adapter_model.safetensors"
    save_file({key.replace("transformer.", prefix): tensor for key, tensor in load_file(file).items()}, file)
    with pytest.raises(ValueError, match=f"adapter_model.safetensors {message}"):
        read_adapter(directory, bare.config)


PREFIX = "base_model.model.transformer.h."


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.pop(f"{PREFIX}1.attn.c_attn.lora_B.weight"), "lora_B of h.1.attn.c_attn is missing"),
        (lambda t: t.update({f"{PREFIX}2.attn.c_attn.lora_A.weight": torch.ones(3, 32)}), "is not an adapted layer"),
        (
            lambda t: t.update({"base_model.model.lm_head.lora_A.weight": torch.ones(3, 32)}),
            "has LoRA of lm_head",
        ),
        (lambda t: t.update({f"{PREFIX}0.attn.c_attn.lora_A.weight": torch.ones(3, 31)}), r"the shape \(3, 31\)"),
        (lambda t: t.update({f"{PREFIX}0.attn.c_attn.lora_A.weight": torch.ones(2, 32)}), "different ranks, 2 and 3"),
        (lambda t: t[f"{PREFIX}0.attn.c_attn.lora_A.weight"].fill_(torch.nan), "lora_A.weight' has NaN or infinite"),
        (lambda t: t.clear(), "has no tensors"),
        (
            lambda t: t.update({"base_model.model.h.0.attn.c_attn.lora_A.weight": torch.ones(3, 32)}),
            "keys both with and without 'transformer.'",
        ),
        (lambda t: [t.pop(key) for key in list(t) if ".h.1." in key], "lora_A of h.1.attn.c_attn is missing"),
    ],
)
def test_damaged_weights_are_refused_by_name(bare, save, edit, message):
    _, directory = save(target_modules=["c_attn"])
    file = directory / "adapter_model.safetensors"
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file)
    with pytest.raises(ValueError, match=f"adapter_model.safetensors.*{message}"):
        read_adapter(directory, bare.config)


def test_weights_of_layers_that_the_config_leaves_out_are_refused(bare, save):
    _, directory = save(target_modules=["c_attn"])
    describe(directory, layers_to_transform=[0])  # PEFT would not use those of the other layer
    with pytest.raises(ValueError, match=r"has weights of h.1.attn.c_attn, which adapter_config.json leaves out"):
        load_adapter(bare, directory)
    _, directory = save(target_modules=["c_attn"])
    describe(directory, target_modules=["0.attn.c_attn"])
    with pytest.raises(ValueError, match=r"has weights of h.1.attn.c_attn, which adapter_config.json leaves out"):
        load_adapter(bare, directory)


def test_dora_of_only_some_blocks_is_refused_with_the_way_out(bare, save):
    _, directory = save(target_modules=["c_attn"], layers_to_transform=[0], use_dora=True)
    with pytest.raises(ValueError, match=r"adapter_config.json leaves out h.1.attn.c_attn .*merge_and_unload"):
        load_adapter(bare, directory)


def test_a_directory_without_an_adapter_is_named(bare, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere has neither adapter.json nor PEFT's adapter_config.json"):
        load_adapter(bare, tmp_path / "nowhere")
    for name in ("checkpoint-5", "checkpoint-10"):  # as a trainer writes them
        (tmp_path / "trained" / name).mkdir(parents=True)
        (tmp_path / "trained" / name / "adapter_config.json").write_text("{}")
    os.utime(tmp_path / "trained/checkpoint-5/adapter_config.json", (0, 0))
    with pytest.raises(FileNotFoundError, match=r"checkpoint-10 has one: use that directory"):
        load_adapter(bare, tmp_path / "trained")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"it has a whole model, which is used as a base \(base.name\)"):
        load_adapter(bare, tmp_path / "model")
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    (tmp_path / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match=r"has only adapter_model.bin"):
        load_adapter(bare, tmp_path)
