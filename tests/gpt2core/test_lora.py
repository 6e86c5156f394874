"""LoRA against PEFT and against the explicit formula; merging, unmerging and removing; what does not change."""

import math
from copy import deepcopy

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GPT2LMHeadModel

from gpt2core.checkpoint import export_peft, load_adapter, load_pretrained, save_adapter, save_pretrained
from gpt2core.config import LORA_TARGETS, LoraConfig
from gpt2core.engine import Engine
from gpt2core.lora import add_lora, lora_config, lora_layers, merge_lora, remove_lora
from tests.helpers import randomize_lora, same_state, snapshot

# The same fp32 sums in another order, as in test_model.
TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}
TARGETS = st.lists(st.sampled_from(LORA_TARGETS), min_size=1, unique=True).map(tuple)
FEW = settings(max_examples=15)
ALL = LoraConfig(rank=3, alpha=5.0, targets=LORA_TARGETS)
SIZES = {"attn.c_attn": (32, 96, 3), "attn.c_proj": (32, 32, 1), "mlp.c_fc": (32, 128, 1), "mlp.c_proj": (128, 32, 1)}


def tokens(*shape):
    return torch.randint(97, shape, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def adapted(bare):
    """Every layer adapted, alpha other than the rank, both matrices random."""
    return randomize_lora(add_lora(bare, ALL, seed=0))


@FEW
@given(TARGETS, st.integers(1, 8), st.sampled_from([None, 16.0, 7.0, 1.0, 0.5, -2.0]), st.booleans(), st.booleans())
def test_peft_loads_the_export_and_computes_the_same_logits(
    tiny_gpt2_dir, hf, tmp_path_factory, targets, rank, alpha, rslora, dora
):
    ids, directory = tokens(2, 12), tmp_path_factory.mktemp("peft")
    model = load_pretrained(tiny_gpt2_dir)
    plain = model(ids)
    lora = LoraConfig(rank=rank, alpha=alpha, targets=targets, rslora=rslora, dora=dora)
    randomize_lora(add_lora(model, lora))
    export_peft(model, directory)
    theirs = peft.PeftModel.from_pretrained(deepcopy(hf), str(directory)).eval()
    with torch.no_grad():
        logits = model(ids)
        torch.testing.assert_close(logits, theirs(ids).logits, **TOLERANCE)
    assert (logits - plain).abs().max() > 1e-3  # the adapter does something


@FEW
@given(TARGETS, st.booleans())
def test_merging_leaves_the_outputs_and_adding_too(tiny_gpt2_dir, targets, dora):
    model, ids = load_pretrained(tiny_gpt2_dir), tokens(2, 12)
    before = model(ids)
    added = add_lora(model, LoraConfig(rank=3, alpha=7.0, targets=targets, dora=dora))(ids)
    # DoRA divides a length by itself, computed twice
    torch.testing.assert_close(added, before, **(TOLERANCE if dora else {"rtol": 0, "atol": 0}))
    unmerged = randomize_lora(model)(ids)
    torch.testing.assert_close(merge_lora(model)(ids), unmerged, **TOLERANCE)


def test_saving_and_loading_keep_the_variant_and_the_engine_refuses_dora_by_name(bare, tiny_gpt2_dir, tmp_path):
    lora = LoraConfig(rank=3, alpha=None, targets=("q", "o"), rslora=True, dora=True, b_lr_ratio=4.0)
    ids = tokens(2, 12)
    save_adapter(randomize_lora(add_lora(bare, lora)), tmp_path)
    loaded = load_adapter(load_pretrained(tiny_gpt2_dir), tmp_path)
    assert lora_config(loaded) == lora
    assert lora.scaling == pytest.approx(6 / math.sqrt(3))
    assert torch.equal(loaded(ids), bare(ids))
    with Engine(load_pretrained(tiny_gpt2_dir)) as engine, pytest.raises(ValueError, match="uses DoRA"):
        engine.load_adapter("dora", tmp_path)


def test_adding_twice_is_refused_without_a_change(adapted):
    before = snapshot(adapted)
    with pytest.raises(ValueError, match="has LoRA layers already"):
        add_lora(adapted, LoraConfig(targets=("q",)))
    assert same_state(snapshot(adapted), before)


def test_the_seed_alone_decides_the_initial_adapter(tiny_gpt2_dir):
    one, same_seed, other = (snapshot(add_lora(load_pretrained(tiny_gpt2_dir), ALL, seed=seed)) for seed in (1, 1, 2))
    assert same_state(one, same_seed)
    assert all(torch.equal(one[name], other[name]) != name.endswith("lora_A") for name in one)


def test_lora_a_is_initialized_as_in_peft(bare, hf):
    torch.manual_seed(0)
    reference = peft.get_peft_model(deepcopy(hf), peft.LoraConfig(r=3, target_modules=["c_fc"], fan_in_fan_out=True))
    reference_a = torch.cat([p.flatten() for name, p in reference.named_parameters() if "lora_A" in name])
    for _, layer in lora_layers(add_lora(bare, ALL, seed=0)):
        bound = 1 / math.sqrt(layer.linear.in_features)
        assert layer.lora_A.abs().max() <= bound
        # uniform on +-bound has the standard deviation bound / sqrt(3); of 96 draws or more, 20 % is three errors wide
        assert layer.lora_A.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.2)
        assert not layer.lora_B.any()
    assert reference_a.abs().max() <= 1 / math.sqrt(32)  # c_fc reads n_embd = 32 numbers


@FEW
@given(TARGETS)
def test_only_the_targets_have_matrices_and_only_they_are_trainable(tiny_gpt2_dir, targets):
    model = add_lora(load_pretrained(tiny_gpt2_dir), LoraConfig(rank=5, targets=targets))
    expected = {}
    for path, (width, out, blocks) in SIZES.items():
        names = {"attn.c_attn": "qkv", "attn.c_proj": "o", "mlp.c_fc": ("fc",), "mlp.c_proj": ("proj",)}[path]
        n = len(set(names) & set(targets))  # k has no matrices if only q and v are named
        for layer in range(2) if n else ():
            expected[f"h.{layer}.{path}.lora_A"] = (n, 5, width)
            expected[f"h.{layer}.{path}.lora_B"] = (n, out // blocks, 5)
    trainable = {name: tuple(p.shape) for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == expected


def test_the_order_of_the_targets_does_not_matter(tiny_gpt2_dir):
    models = [
        add_lora(load_pretrained(tiny_gpt2_dir), LoraConfig(rank=2, targets=targets), seed=3)
        for targets in (("q", "v", "fc", "proj"), ("proj", "v", "fc", "q"))
    ]
    assert same_state(*map(snapshot, models))
    one, other = (randomize_lora(model)(tokens(1, 8)) for model in models)
    assert torch.equal(one, other)


def explicit_delta(layer, slices):
    """scaling * B A of each pair, stacked; zeros for an output slice without a pair."""
    height = layer.linear.out_features // layer.n_slices
    deltas = [torch.zeros(height, layer.linear.in_features) for _ in range(layer.n_slices)]
    for pair, index in enumerate(slices):
        deltas[index] = ALL.alpha / ALL.rank * layer.lora_B[pair] @ layer.lora_A[pair]
    return torch.cat(deltas)


@FEW
@given(TARGETS)
def test_gradients_are_those_of_the_explicit_formula(tiny_gpt2_dir, targets):
    model = randomize_lora(add_lora(load_pretrained(tiny_gpt2_dir), LoraConfig(rank=3, alpha=5.0, targets=targets)))
    ids = tokens(2, 12)
    weight = torch.randn(2, 12, 97, generator=torch.Generator().manual_seed(1))
    parameters = [p for p in model.parameters() if p.requires_grad]
    found = torch.autograd.grad((model(ids) * weight).sum(), parameters)
    explicit = {}
    for name, layer in lora_layers(model):
        slices = ["qkv".index(t) for t in "qkv" if t in targets] if "c_attn" in name else [0]
        explicit[f"{name}.weight"] = layer.linear.weight + explicit_delta(layer, slices)
    plain = deepcopy(remove_lora(deepcopy(model)))
    expected = torch.autograd.grad(
        (torch.func.functional_call(plain, explicit, (ids,)) * weight).sum(), parameters, allow_unused=False
    )
    for one, other in zip(found, expected, strict=True):
        assert one.any()
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)  # gradients here are of size 1 to 100


def test_merging_adds_the_explicit_formula(adapted):
    before = {name: layer.linear.weight.clone() for name, layer in lora_layers(adapted)}
    for name, layer in lora_layers(merge_lora(adapted)):
        delta = explicit_delta(layer, range(layer.n_slices))
        torch.testing.assert_close(layer.linear.weight - before[name], delta, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("merged", [False, True])
def test_removing_restores_keys_values_and_trainability(bare, merged):
    before, trainable = snapshot(bare), {name: p.requires_grad for name, p in bare.named_parameters()}
    randomize_lora(add_lora(bare, ALL))
    if merged:
        merge_lora(bare)
    remove_lora(bare)
    assert same_state(snapshot(bare), before)
    assert list(bare.state_dict()) == list(before)
    assert {name: p.requires_grad for name, p in bare.named_parameters()} == trainable
    assert not list(lora_layers(bare))
    add_lora(bare, LoraConfig())  # another one can be added


def test_removing_from_a_bare_model_changes_nothing(bare):
    before = snapshot(bare)
    assert same_state(snapshot(remove_lora(bare)), before)


def test_training_changes_only_the_adapter(adapted):
    before = snapshot(adapted)
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.1)
    adapted(tokens(2, 8)).square().mean().backward()
    optimizer.step()
    changed = {name for name, tensor in adapted.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {name for name in before if "lora_" in name}


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_dropout_acts_only_in_training(bare, dropout):
    ids = tokens(2, 8)
    model = randomize_lora(add_lora(bare, LoraConfig(rank=3, targets=LORA_TARGETS, dropout=dropout)))
    model.eval()
    deterministic = model(ids)
    assert torch.equal(model(ids), deterministic)
    model.train()
    assert torch.equal(model(ids), deterministic) == (dropout == 0)


@pytest.mark.parametrize("training", [False, True])
def test_adding_keeps_the_mode_of_the_model(bare, training):
    model = add_lora(bare.train(training), LoraConfig(targets=LORA_TARGETS, dropout=0.5))
    assert {module.training for module in model.modules()} == {training}


def test_dropout_acts_only_on_the_input_of_the_adapter(bare):
    layer = add_lora(bare, LoraConfig(rank=3, targets=("q",), dropout=0.5), seed=0).h[0].attn.c_attn.train()
    torch.nn.init.ones_(layer.lora_B)
    x = torch.ones(4000, 32)
    added = layer(x) - layer.linear(x)
    assert not added[:, 32:].any()
    expected = (layer.config.scaling * layer.lora_A.sum()).item()  # dropout scales the rest by 1 / (1 - p)
    # each input is kept or dropped, so the variance of one row is at most
    # the sum of (scaling * A)**2: a deviation below 5
    assert added[:, 0].mean().item() == pytest.approx(expected, abs=5 * 5 / math.sqrt(4000))
    assert added[:, 0].std() > 0.1


@pytest.mark.parametrize(("matrix", "bad"), [("lora_A", math.nan), ("lora_B", -math.inf)])
def test_merging_a_non_finite_adapter_is_refused_without_a_change(adapted, matrix, bad):
    layer = adapted.h[1].attn.c_attn  # the last layer: earlier ones must not be merged either
    getattr(layer, matrix).data[1, 0, 0] = bad
    before = snapshot(adapted)
    with pytest.raises(ValueError, match="NaN or infinite"):
        merge_lora(adapted)
    after = snapshot(adapted)
    assert same_state(*({n: t for n, t in s.items() if "lora_" not in n} for s in (before, after)))
    assert not any(layer.merged for _, layer in lora_layers(adapted))


def test_the_adapter_stays_fp32_beside_a_bf16_base(bare):
    ids = tokens(2, 12)
    exact = randomize_lora(add_lora(deepcopy(bare), ALL), 0.1)
    model = randomize_lora(add_lora(bare.bfloat16(), ALL), 0.1)
    assert {p.dtype for name, p in model.named_parameters() if "lora_" in name} == {torch.float32}
    assert {p.dtype for name, p in model.named_parameters() if "lora_" not in name} == {torch.bfloat16}
    logits = model(ids)
    assert logits.dtype == torch.bfloat16
    reference = exact(ids)
    # bf16 has 8 bits: an error of 2**-8 per operation, about ten operations deep
    assert (logits.float() - reference).norm() / reference.norm() < 0.05
    logits.float().square().mean().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.any() for p in model.parameters() if p.requires_grad)
    merged = merge_lora(model)(ids)
    assert merged.dtype == torch.bfloat16
    assert (merged.float() - reference).norm() / reference.norm() < 0.05


def test_transformers_reads_a_saved_merged_model(adapted, tmp_path):
    ids = tokens(2, 12)
    unmerged = adapted(ids)
    save_pretrained(merge_lora(adapted), tmp_path)
    theirs = GPT2LMHeadModel.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(theirs(ids).logits, unmerged, **TOLERANCE)


def test_a_model_with_an_unmerged_adapter_is_not_saved(adapted, tmp_path):
    with pytest.raises(ValueError, match="not merged"):
        save_pretrained(adapted, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_the_export_of_a_merged_model_is_that_of_the_unmerged_one(adapted, tmp_path):
    export_peft(adapted, tmp_path / "before")
    export_peft(merge_lora(adapted), tmp_path / "after")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "before" / name).read_bytes() == (tmp_path / "after" / name).read_bytes()


def test_a_model_without_an_adapter_has_nothing_to_export(bare, tmp_path):
    with pytest.raises(ValueError, match="no LoRA layers"):
        export_peft(bare, tmp_path)
