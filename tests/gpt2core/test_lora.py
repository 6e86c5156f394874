"""LoRA against PEFT and against the formula, merging and unmerging, and what stays untouched."""

import math
from copy import deepcopy
from itertools import combinations

import peft
import pytest
import torch
from transformers import GPT2LMHeadModel

from gpt2core.checkpoint import export_peft, load_pretrained, save_pretrained
from gpt2core.config import LORA_TARGETS, LoraConfig
from gpt2core.lora import add_lora, lora_layers, merge_lora, remove_lora, unmerge_lora

# The same fp32 sums in another order, as in test_model.
TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}
SUBSETS = [subset for n in range(1, 7) for subset in combinations(LORA_TARGETS, n)]
SOME = [("q", "v"), ("k",), ("q", "k", "v"), ("o",), ("fc",), ("proj",), LORA_TARGETS]
ALL = LoraConfig(rank=3, alpha=5.0, targets=LORA_TARGETS)
SIZES = {"attn.c_attn": (32, 96, 3), "attn.c_proj": (32, 32, 1), "mlp.c_fc": (32, 128, 1), "mlp.c_proj": (128, 32, 1)}


def tokens(*shape):
    return torch.randint(97, shape, generator=torch.Generator().manual_seed(0))


def randomise(model, std=0.3):
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for _, layer in lora_layers(model):
            layer.lora_A.normal_(0, std, generator=generator)
            layer.lora_B.normal_(0, std, generator=generator)
    return model


@pytest.fixture
def bare(tiny_gpt2_dir):
    return load_pretrained(tiny_gpt2_dir)


@pytest.fixture
def adapted(bare):
    """Every layer adapted, alpha other than the rank, both matrices random."""
    return randomise(add_lora(bare, ALL, seed=0))


@pytest.fixture(scope="module")
def hf(tiny_gpt2_dir):
    return GPT2LMHeadModel.from_pretrained(tiny_gpt2_dir).eval()


def snapshot(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(
        torch.equal(one[name], other[name]) and one[name].dtype == other[name].dtype for name in one
    )


def test_the_subsets_are_all_63():
    assert len(set(SUBSETS)) == 63


@pytest.mark.parametrize("targets", SUBSETS, ids="-".join)
def test_peft_reads_the_export_and_gives_our_logits(bare, hf, tmp_path, targets):
    ids = tokens(2, 12)
    plain = bare(ids)
    ours = randomise(add_lora(bare, LoraConfig(rank=3, alpha=7.0, targets=targets)))
    export_peft(ours, tmp_path)
    theirs = peft.PeftModel.from_pretrained(deepcopy(hf), str(tmp_path)).eval()
    with torch.no_grad():
        logits = ours(ids)
        torch.testing.assert_close(logits, theirs(ids).logits, **TOLERANCE)
    assert (logits - plain).abs().max() > 0.01  # the adapter does something


@pytest.mark.parametrize(("rank", "alpha"), [(1, 1.0), (1, 16.0), (4, 4.0), (8, 0.5), (4, -2.0), (2, 0.0)])
def test_peft_gives_our_logits_for_any_rank_and_alpha(bare, hf, tmp_path, rank, alpha):
    ours = randomise(add_lora(bare, LoraConfig(rank=rank, alpha=alpha, targets=("q", "v", "o", "proj"))))
    export_peft(ours, tmp_path)
    theirs = peft.PeftModel.from_pretrained(deepcopy(hf), str(tmp_path)).eval()
    torch.testing.assert_close(ours(tokens(2, 12)), theirs(tokens(2, 12)).logits, **TOLERANCE)


@pytest.mark.parametrize("targets", SUBSETS, ids="-".join)
def test_merged_outputs_are_the_unmerged_ones(bare, targets):
    model, ids = randomise(add_lora(bare, LoraConfig(rank=3, alpha=7.0, targets=targets))), tokens(2, 12)
    unmerged = model(ids)
    torch.testing.assert_close(merge_lora(model)(ids), unmerged, **TOLERANCE)


@pytest.mark.parametrize("targets", SOME, ids="-".join)
def test_outputs_are_unchanged_right_after_adding(bare, targets):
    ids = tokens(2, 12)
    before = bare(ids)
    assert torch.equal(add_lora(bare, LoraConfig(targets=targets))(ids), before)


def test_adding_twice_is_refused_and_changes_nothing(adapted):
    before = snapshot(adapted)
    with pytest.raises(ValueError, match="has LoRA layers already"):
        add_lora(adapted, LoraConfig(targets=("q",)))
    assert same(snapshot(adapted), before)


def test_a_seed_alone_decides_the_first_adapter(tiny_gpt2_dir):
    one, same_seed, other = (snapshot(add_lora(load_pretrained(tiny_gpt2_dir), ALL, seed=seed)) for seed in (1, 1, 2))
    assert same(one, same_seed)
    assert all(torch.equal(one[name], other[name]) != name.endswith("lora_A") for name in one)


def test_lora_a_starts_as_pefts_does(bare, hf):
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


@pytest.mark.parametrize("targets", SUBSETS, ids="-".join)
def test_only_the_targets_have_matrices_and_they_alone_are_trainable(bare, targets):
    model = add_lora(bare, LoraConfig(rank=5, targets=targets))
    wanted = {}
    for path, (width, out, blocks) in SIZES.items():
        names = {"attn.c_attn": "qkv", "attn.c_proj": "o", "mlp.c_fc": ("fc",), "mlp.c_proj": ("proj",)}[path]
        n = len(set(names) & set(targets))  # k is not computed where only q and v are named
        for layer in range(2) if n else ():
            wanted[f"h.{layer}.{path}.lora_A"] = (n, 5, width)
            wanted[f"h.{layer}.{path}.lora_B"] = (n, out // blocks, 5)
    trainable = {name: tuple(p.shape) for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == wanted


def test_the_order_of_the_targets_is_irrelevant(tiny_gpt2_dir):
    models = [
        add_lora(load_pretrained(tiny_gpt2_dir), LoraConfig(rank=2, targets=targets), seed=3)
        for targets in (("q", "v", "fc", "proj"), ("proj", "v", "fc", "q"))
    ]
    assert same(*map(snapshot, models))
    one, other = (randomise(model)(tokens(1, 8)) for model in models)
    assert torch.equal(one, other)


def explicit_delta(layer, blocks):
    """scaling * B A of each pair, set below each other; zeros where a block has no pair."""
    height = layer.linear.out_features // layer.n_blocks
    deltas = [torch.zeros(height, layer.linear.in_features) for _ in range(layer.n_blocks)]
    for pair, block in enumerate(blocks):
        deltas[block] = ALL.alpha / ALL.rank * layer.lora_B[pair] @ layer.lora_A[pair]
    return torch.cat(deltas)


@pytest.mark.parametrize("targets", SOME, ids="-".join)
def test_gradients_are_those_of_the_explicit_formula(bare, targets):
    model = randomise(add_lora(bare, LoraConfig(rank=3, alpha=5.0, targets=targets)))
    ids = tokens(2, 12)
    weight = torch.randn(2, 12, 97, generator=torch.Generator().manual_seed(1))
    parameters = [p for p in model.parameters() if p.requires_grad]
    found = torch.autograd.grad((model(ids) * weight).sum(), parameters)
    explicit = {}
    for name, layer in lora_layers(model):
        blocks = ["qkv".index(t) for t in "qkv" if t in targets] if "c_attn" in name else [0]
        explicit[f"{name}.weight"] = layer.linear.weight + explicit_delta(layer, blocks)
    plain = deepcopy(remove_lora(deepcopy(model)))
    expected = torch.autograd.grad(
        (torch.func.functional_call(plain, explicit, (ids,)) * weight).sum(), parameters, allow_unused=False
    )
    for one, other in zip(found, expected, strict=True):
        assert one.any()
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)  # gradients here are of size 1 to 100


def test_what_merging_adds_is_the_explicit_formula(adapted):
    before = {name: layer.linear.weight.clone() for name, layer in lora_layers(adapted)}
    for name, layer in lora_layers(merge_lora(adapted)):
        delta = explicit_delta(layer, range(layer.n_blocks))
        torch.testing.assert_close(layer.linear.weight - before[name], delta, rtol=1e-4, atol=1e-5)


def test_merging_twice_is_merging_once(adapted):
    once = snapshot(merge_lora(adapted))
    assert same(snapshot(merge_lora(adapted)), once)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unmerging_puts_back_the_very_weights(bare, dtype):
    model = randomise(add_lora(bare.to(dtype), ALL))
    before = snapshot(model)
    for _ in range(3):
        assert not same(snapshot(merge_lora(model)), before)
        unmerge_lora(model)
    assert same(snapshot(unmerge_lora(model)), before)


def test_unmerging_what_was_never_merged_changes_nothing(adapted):
    before = snapshot(adapted)
    assert same(snapshot(unmerge_lora(adapted)), before)


@pytest.mark.parametrize("merged", [False, True])
def test_removing_restores_keys_values_and_trainability(bare, merged):
    before, trainable = snapshot(bare), {name: p.requires_grad for name, p in bare.named_parameters()}
    randomise(add_lora(bare, ALL))
    if merged:
        merge_lora(bare)
    remove_lora(bare)
    assert same(snapshot(bare), before)
    assert list(bare.state_dict()) == list(before)
    assert {name: p.requires_grad for name, p in bare.named_parameters()} == trainable
    assert not list(lora_layers(bare))
    add_lora(bare, LoraConfig())  # and there may be another


def test_removing_from_a_bare_model_changes_nothing(bare):
    before = snapshot(bare)
    assert same(snapshot(remove_lora(bare)), before)


def test_training_changes_only_the_adapter(adapted):
    before = snapshot(adapted)
    optimiser = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.1)
    adapted(tokens(2, 8)).square().mean().backward()
    optimiser.step()
    changed = {name for name, tensor in adapted.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {name for name in before if "lora_" in name}


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_dropout_acts_in_training_alone(bare, dropout):
    ids = tokens(2, 8)
    model = randomise(add_lora(bare, LoraConfig(rank=3, targets=LORA_TARGETS, dropout=dropout)))
    model.eval()
    quiet = model(ids)
    assert torch.equal(model(ids), quiet)
    model.train()
    assert torch.equal(model(ids), quiet) == (dropout == 0)


@pytest.mark.parametrize("training", [False, True])
def test_adding_to_a_model_keeps_its_mode(bare, training):
    model = add_lora(bare.train(training), LoraConfig(targets=LORA_TARGETS, dropout=0.5))
    assert {module.training for module in model.modules()} == {training}


def test_dropout_acts_on_the_adapters_input_alone(bare):
    layer = add_lora(bare, LoraConfig(rank=3, targets=("q",), dropout=0.5), seed=0).h[0].attn.c_attn.train()
    torch.nn.init.ones_(layer.lora_B)
    x = torch.ones(4000, 32)
    added = layer(x) - layer.linear(x)
    assert not added[:, 32:].any()
    expected = (layer.config.scaling * layer.lora_A.sum()).item()  # dropout scales what it keeps by 1 / (1 - p)
    # each input is kept or lost, so one row's deviation is at most 1/2 * 2 * |scaling * A| summed in squares, below 5
    assert added[:, 0].mean().item() == pytest.approx(expected, abs=5 * 5 / math.sqrt(4000))
    assert added[:, 0].std() > 0.1


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("matrix", ["lora_A", "lora_B"])
def test_merging_nan_is_refused_and_leaves_the_layer(adapted, matrix, bad):
    layer = adapted.h[0].attn.c_attn
    getattr(layer, matrix).data[1, 0, 0] = bad
    before = layer.linear.weight.clone()
    with pytest.raises(ValueError, match="NaN or infinity"):
        merge_lora(adapted)
    assert torch.equal(layer.linear.weight, before)
    assert not layer.merged


@pytest.mark.parametrize("where", [0, 1])
def test_a_refused_merge_leaves_all_weights(adapted, where):
    before = snapshot(adapted)
    adapted.h[where].mlp.c_proj.lora_B.data.fill_(math.nan)
    with pytest.raises(ValueError, match="NaN"):
        merge_lora(adapted)
    after = snapshot(adapted)
    assert same(*({n: t for n, t in s.items() if "lora_" not in n} for s in (before, after)))


def test_the_adapter_stays_fp32_beside_a_bf16_base(bare):
    ids = tokens(2, 12)
    exact = randomise(add_lora(deepcopy(bare), ALL), 0.1)
    model = randomise(add_lora(bare.bfloat16(), ALL), 0.1)
    assert {p.dtype for name, p in model.named_parameters() if "lora_" in name} == {torch.float32}
    assert {p.dtype for name, p in model.named_parameters() if "lora_" not in name} == {torch.bfloat16}
    logits = model(ids)
    assert logits.dtype == torch.bfloat16
    reference = exact(ids)
    # bf16 keeps 8 bits: 2**-8 an operation, some ten operations deep
    assert (logits.float() - reference).norm() / reference.norm() < 0.05
    logits.float().square().mean().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.any() for p in model.parameters() if p.requires_grad)
    merged = merge_lora(model)(ids)
    assert merged.dtype == torch.bfloat16
    assert (merged.float() - reference).norm() / reference.norm() < 0.05


def test_a_merged_model_is_saved_as_one_transformers_reads(adapted, tmp_path):
    ids = tokens(2, 12)
    unmerged = adapted(ids)
    save_pretrained(merge_lora(adapted), tmp_path)
    theirs = GPT2LMHeadModel.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(theirs(ids).logits, unmerged, **TOLERANCE)


def test_a_model_whose_adapter_is_not_merged_is_not_saved(adapted, tmp_path):
    with pytest.raises(ValueError, match="not merged"):
        save_pretrained(adapted, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_merged_models_export_is_that_of_the_unmerged(adapted, tmp_path):
    export_peft(adapted, tmp_path / "before")
    export_peft(merge_lora(adapted), tmp_path / "after")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "before" / name).read_bytes() == (tmp_path / "after" / name).read_bytes()


def test_a_bare_model_has_nothing_to_export(bare, tmp_path):
    with pytest.raises(ValueError, match="no LoRA layers"):
        export_peft(bare, tmp_path)
