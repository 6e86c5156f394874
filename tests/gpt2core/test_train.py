"""Finetuning against PEFT and a loop written by hand; precision, logging, validation."""

import math
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig as PeftConfig
from peft import get_peft_model
from peft.optimizers import create_loraplus_optimizer
from transformers import GPT2LMHeadModel

from gpt2core.batching import pack
from gpt2core.checkpoint import load_pretrained
from gpt2core.config import LoraConfig, TrainConfig
from gpt2core.data import Example
from gpt2core.kernels import has_bf16_instructions
from gpt2core.lora import add_lora, lora_layers, merge_lora
from gpt2core.losses import token_losses
from gpt2core.train import finetune
from gpt2core.training_plan import training_steps
from tests.copies import ROOT
from tests.helpers import randomize_lora, same_state, snapshot

MAGNITUDE = "lora_magnitude_vector.default.weight"


def examples(n: int = 10, seed: int = 0) -> list[Example]:
    """A shared prefix of three tokens, as prompts have, and 4 to 12 random ones."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(4, 13, (n,), generator=generator).tolist()
    rests = [torch.randint(97, (length,), generator=generator).tolist() for length in lengths]
    return [Example([7, 8, 9, *rest], 3 + len(rest) // 2) for rest in rests]


def config(**values) -> TrainConfig:
    return TrainConfig(**{"epochs": 2, "batch_size": 4, "learning_rate": 1e-2, "warmup_steps": 1} | values)


@pytest.fixture
def model(tiny_gpt2_dir):
    return add_lora(load_pretrained(tiny_gpt2_dir), LoraConfig(rank=3, alpha=6.0), seed=0)


def test_full_finetuning_decays_matrices_but_not_biases_and_gains(tiny_gpt2_dir):
    weights = []
    for decay in (0.0, 1.0):  # the gradients of the first step are the same
        model = load_pretrained(tiny_gpt2_dir)
        finetune(model, examples(), [], config(max_steps=1, weight_decay=decay, warmup_steps=0))
        weights.append(dict(model.named_parameters()))
    for name, weight in weights[0].items():
        assert torch.equal(weight, weights[1][name]) == (weight.dim() == 1), name


def test_a_batch_beyond_the_memory_is_named_with_what_to_change():
    code = """
import psutil, resource, torch
from gpt2core.config import GPT2Config, LoraConfig, TrainConfig
from gpt2core.data import Example
from gpt2core.lora import add_lora
from gpt2core.model import GPT2
from gpt2core.train import finetune
examples = [Example(tokens, 4) for tokens in torch.randint(2048, (3000, 12)).tolist()]
model = add_lora(GPT2(GPT2Config.preset("gpt2-nano")), LoraConfig())
finetune(model, examples[:2], [], TrainConfig(epochs=1, warmup_steps=0))  # imports what optimizers import late
size = psutil.Process().memory_info().vms + 300_000_000
resource.setrlimit(resource.RLIMIT_AS, (size, size))
try:
    finetune(model, examples, [], TrainConfig(batch_size=3000))
except MemoryError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100, cwd=ROOT)
    assert re.match(r"not enough memory for step 1 \(.*\); lower batch_size=3000, and raise grad", done.stdout), done


def adapter(weights: dict) -> dict:
    return {name: tensor for name, tensor in weights.items() if "lora_" in name}


@pytest.mark.parametrize("loss_on", ["response", "all"])
def test_the_losses_of_examples_are_those_of_transformers(model, tiny_gpt2_dir, loss_on):
    reference = GPT2LMHeadModel.from_pretrained(tiny_gpt2_dir).eval()
    for example, (loss, count) in zip(examples(), token_losses(model, examples(), 3, loss_on), strict=True):
        ids = torch.tensor([example.input_ids])
        labels = ids.clone()
        if loss_on == "response":
            labels[0, : example.prompt_length] = -100
        with torch.no_grad():
            mean = reference(ids, labels=labels).loss
        assert count == len(example.input_ids) - (example.prompt_length if loss_on == "response" else 1)
        assert loss / count == pytest.approx(float(mean), abs=1e-4)


@pytest.mark.parametrize(
    ("accumulate", "variant"),
    [(1, {}), (2, {}), (1, {"rslora": True}), (1, {"dora": True}), (1, {"dora": True, "b_lr_ratio": 4.0})],
    ids=str,
)
def test_training_equals_peft_with_a_loop_written_by_hand(tiny_gpt2_dir, accumulate, variant):
    """Targets o and proj, whose PEFT layers equal ours; the same initial weights and order of the data."""
    lora = LoraConfig(rank=3, alpha=6.0, targets=("o", "proj"), **variant)
    ours = add_lora(load_pretrained(tiny_gpt2_dir), lora, seed=0)
    settings = config(
        epochs=3,
        batch_size=4 // accumulate,
        gradient_accumulation_steps=accumulate,
        weight_decay=0.1,
        warmup_steps=2,
        max_grad_norm=0.1,
    )
    reference = get_peft_model(
        GPT2LMHeadModel.from_pretrained(tiny_gpt2_dir),
        PeftConfig(
            r=3,
            lora_alpha=6,
            target_modules=["c_proj"],
            fan_in_fan_out=True,
            task_type="CAUSAL_LM",
            use_rslora=lora.rslora,
            use_dora=lora.dora,
        ),
    )
    theirs = dict(reference.named_parameters())
    pairs = []
    for name, layer in lora_layers(ours):
        for part in ("lora_A", "lora_B"):
            parameter = theirs[f"base_model.model.transformer.{name}.{part}.default.weight"]
            parameter.data.copy_(getattr(layer, part).data[0])
            pairs.append((getattr(layer, part), parameter))
        if lora.dora:
            pairs.append((layer.lora_magnitude, theirs[f"base_model.model.transformer.{name}.{MAGNITUDE}"]))
    order: list[list[list[int]]] = []  # of each step, as finetune sees it
    seen = torch.nn.Module.register_forward_pre_hook(ours.wte, lambda _, ids: order.append(ids[0].tolist()))
    data = examples()
    finetune(ours, data, [], settings)
    seen.remove()

    optimizer = create_loraplus_optimizer(
        reference,
        torch.optim.AdamW,
        lr=1e-2,
        loraplus_lr_ratio=lora.b_lr_ratio,
        weight_decay=0.1,
        loraplus_weight_decay=0.1,
        betas=settings.betas,
    )
    for group in optimizer.param_groups:
        group["full_lr"], group["weight_decay"] = group["lr"], 0.1
    total = training_steps(len(data), settings)[2]
    batches = [examples_of(row, data) for [row] in order]
    size = len(batches) // settings.epochs
    epochs = [batches[i : i + size] for i in range(0, len(batches), size)]
    per_step = [epoch[i : i + accumulate] for epoch in epochs for i in range(0, size, accumulate)]
    assert len(per_step) == total
    for step, parts in enumerate(per_step):
        rate = (step + 1) / 3 if step < 2 else (total - step) / (total - 2)
        chosen = [example for part in parts for example in part]
        ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(e.input_ids) for e in chosen], batch_first=True)
        labels = torch.full_like(ids, -100)
        for row, example in enumerate(chosen):
            labels[row, example.prompt_length : len(example.input_ids)] = torch.tensor(
                example.input_ids[example.prompt_length :]
            )
        logits = reference(ids).logits[:, :-1]
        F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100).backward()
        torch.nn.utils.clip_grad_norm_([p for _, p in pairs], 0.1)
        for group in optimizer.param_groups:
            group["lr"] = group["full_lr"] * rate
        optimizer.step()
        optimizer.zero_grad()
    for mine, other in pairs:
        # AdamW divides by the root of tiny second moments, which amplifies rounding of 1e-7 in a gradient
        torch.testing.assert_close(mine[0], other, rtol=1e-3, atol=1e-5)


def examples_of(row: list[int], data: list[Example]) -> list[Example]:
    """The examples packed in a row, after the three tokens that they share."""
    found, rest = [], row[3:]
    while rest:
        fits = [example for example in data if example.input_ids[3:-1] == rest[: len(example.input_ids) - 4]]
        found.append(max(fits, key=lambda example: len(example.input_ids)))
        rest = rest[len(found[-1].input_ids) - 4 :]
    return found


@pytest.mark.parametrize("kind", [torch.tensor, np.array, tuple])
def test_ids_of_examples_may_be_tensors_arrays_or_tuples(tiny_gpt2_dir, kind):
    given = [Example(kind(example.input_ids), np.int64(example.prompt_length)) for example in examples()]
    assert given == examples()
    results = []
    for data in (given, examples()):
        model = add_lora(load_pretrained(tiny_gpt2_dir), LoraConfig(), seed=0)
        results.append((finetune(model, data, data, config()).best_val_loss, snapshot(model)))
    assert results[0][0] == results[1][0]
    assert same_state(results[0][1], results[1][1])


def test_accumulated_batches_equal_one_large_batch(tiny_gpt2_dir):
    results = []
    for values in ({"batch_size": 8}, {"batch_size": 2, "gradient_accumulation_steps": 4}):
        model = add_lora(load_pretrained(tiny_gpt2_dir), LoraConfig(rank=3), seed=0)
        finetune(model, examples(16), [], config(**values))
        results.append(adapter(snapshot(model)))
    for name in results[0]:
        torch.testing.assert_close(results[0][name], results[1][name], rtol=1e-3, atol=1e-5)


def test_a_small_set_is_memorized(tiny_gpt2_dir):
    model = add_lora(load_pretrained(tiny_gpt2_dir), LoraConfig(rank=8, targets=("q", "k", "v", "o", "fc", "proj")))
    result = finetune(model, examples(4), [], config(epochs=100))
    # frozen embeddings this small limit how well tokens can be told apart
    assert result.history[-1]["train/loss"] < result.history[0]["train/loss"] / 2


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [
        ("fp32", torch.float32),
        ("bf16-true", torch.float32),
        ("bf16-mixed", torch.float32),
        ("bf16-mixed", torch.bfloat16),
    ],
)
def test_only_the_adapter_changes_and_dtypes_and_modes_are_restored(model, precision, dtype):
    model.to(dtype)
    before, modes = snapshot(model), [module.training for module in model.modules()]
    finetune(model, examples(), examples(3), config(precision=precision))
    after = snapshot(model)
    assert {name for name in after if not torch.equal(after[name], before[name])} <= set(adapter(after))
    assert not torch.equal(after["h.0.attn.c_attn.lora_B"], before["h.0.attn.c_attn.lora_B"])
    assert {tensor.dtype for tensor in after.values()} == {dtype}
    assert [module.training for module in model.modules()] == modes
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("precision", "base", "lora"),
    [
        ("fp32", torch.float32, torch.float32),
        ("bf16-true", torch.bfloat16, torch.bfloat16),
        ("bf16-mixed", torch.bfloat16, torch.float32),
    ],
)
def test_the_precision_sets_the_dtypes_during_training(model, precision, base, lora):
    seen = set()
    layer = model.h[0].attn.c_attn
    layer.register_forward_hook(
        lambda module, _, y: seen.add(
            (module.linear.weight.dtype, module.lora_A.dtype, y.dtype, module.linear.prepacked is not None)
        )
    )
    finetune(model, examples(), [], config(precision=precision))
    assert seen == {(base, lora, base, base == torch.bfloat16 and has_bf16_instructions())}


def test_bf16_mixed_ends_near_fp32(tiny_gpt2_dir):
    losses = []
    for precision in ("fp32", "bf16-mixed"):
        model = add_lora(load_pretrained(tiny_gpt2_dir), LoraConfig(rank=3), seed=0)
        losses.append(finetune(model, examples(), [], config(epochs=10, precision=precision)).history[-1]["train/loss"])
    assert losses[1] == pytest.approx(losses[0], rel=0.05)


def test_the_weights_of_the_best_validation_are_kept(model):
    val = examples(6, seed=9)
    result = finetune(model, examples(), val, config(epochs=30, learning_rate=3e-2, decay_fraction=0.0))
    losses = [entry["val/loss"] for entry in result.history if "val/loss" in entry]
    assert len(losses) == 30
    assert losses[-1] > min(losses) == result.best_val_loss  # random tokens: memorizing does not help
    sums = token_losses(model, val, 4, "response")
    assert sum(loss for loss, _ in sums) / sum(n for _, n in sums) == pytest.approx(result.best_val_loss, rel=1e-6)


def test_training_stops_after_validations_without_a_new_best(model):
    # the validation loss rises from the second epoch on: the answers are other tokens than in training
    val = [Example([*e.input_ids[:-1], (e.input_ids[-1] + 1) % 97], e.prompt_length) for e in examples(4)]
    values = {"epochs": 60, "learning_rate": 3e-2, "log_every_steps": 50}
    result = finetune(model, examples(), val, config(**values, patience=3))
    losses = [entry["val/loss"] for entry in result.history]
    assert len(losses) == losses.index(min(losses)) + 4 < 60
    assert result.best_val_loss == min(losses)
    assert "train/loss" in result.history[-1]


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gradient_checkpointing_computes_each_block_again_and_changes_no_weight(tiny_gpt2_dir, dropout):
    calls, weights = [], []
    for on in (False, True):
        model = add_lora(load_pretrained(tiny_gpt2_dir), LoraConfig(rank=3, dropout=dropout), seed=0)
        seen = []
        model.h[0].mlp.register_forward_pre_hook(lambda *_, seen=seen: seen.append(1))
        finetune(model, examples(), [], config(gradient_checkpointing=on))
        calls.append(len(seen))
        weights.append(snapshot(model))
        assert not model.gradient_checkpointing
    assert calls[1] == 2 * calls[0]
    assert same_state(*weights)


def test_the_history_has_the_metrics_of_each_logged_step(model):
    logged: list[tuple[int, dict]] = []
    data = examples(10)  # 3 batches of 4, 4 and 2
    result = finetune(
        model,
        data,
        examples(3),
        config(log_every_steps=2),
        log=lambda step, values: logged.append((step, dict(values))),
    )
    assert [entry["step"] for entry in result.history] == [2, 3, 4, 6]
    assert {step: set(entry) - {"step"} for step, entry in zip([2, 3, 4, 6], result.history, strict=True)} == {
        2: TRAIN,
        3: {"val/loss"},
        4: TRAIN,
        6: TRAIN | {"val/loss"},
    }
    n_tokens = pack(data, "all").n_tokens
    assert result.history[-1]["train/tokens_seen"] == 2 * n_tokens  # no record is lost
    assert result.history[-1]["train/learning_rate"] == pytest.approx(1e-2 * 1 / 5)  # of 6 steps, one of warm-up
    assert result.tokens_per_second > 0
    merged: dict[int, dict] = {}
    for step, values in logged:
        merged.setdefault(step, {"step": step}).update(values)
    assert list(merged.values()) == result.history


TRAIN = {
    *(f"train/{name}" for name in ("loss", "learning_rate", "grad_norm", "tokens_seen", "tokens_per_second")),
    *("system/cpu_utilization", "system/memory_mib"),
}


def test_the_logged_loss_is_the_mean_over_tokens_since_the_last_one(model):
    data = examples(10)
    before = token_losses(model, data, 4, "response")
    result = finetune(model, data, [], config(epochs=1, log_every_steps=3, learning_rate=1e-12))
    mean = sum(loss for loss, _ in before) / sum(count for _, count in before)
    assert result.history[0]["train/loss"] == pytest.approx(mean, rel=1e-5)


@pytest.mark.parametrize(
    ("values", "steps"),
    [
        ({}, (3, 3, 6)),
        ({"max_steps": 4}, (3, 3, 4)),
        ({"max_steps": 40}, (3, 3, 6)),
        ({"gradient_accumulation_steps": 2}, (3, 2, 4)),
        ({"limit_train_batches": 2}, (2, 2, 4)),
        ({"batch_size": 100}, (1, 1, 2)),
    ],
)
def test_the_number_of_steps_is_known_in_advance(model, values, steps):
    assert training_steps(10, config(**values)) == steps
    assert finetune(model, examples(10), [], config(**values)).history[-1]["step"] == steps[2]


def test_validation_may_be_limited_and_rare(model):
    val = examples(10, seed=5)
    result = finetune(
        model, examples(), val, config(epochs=4, validate_every_epochs=2, limit_val_batches=1, learning_rate=1e-12)
    )
    assert [entry["step"] for entry in result.history if "val/loss" in entry] == [6, 12]
    sums = token_losses(model, val[:4], 4, "response")
    assert result.best_val_loss == pytest.approx(sum(loss for loss, _ in sums) / sum(n for _, n in sums), rel=1e-5)


def test_the_seed_alone_decides_the_run_and_the_global_random_state_is_untouched(tiny_gpt2_dir):
    results = []
    for seed in (1, 1, 2):
        model = add_lora(load_pretrained(tiny_gpt2_dir), LoraConfig(rank=3, dropout=0.2), seed=0)
        state = torch.get_rng_state()
        finetune(model, examples(), [], config(seed=seed))
        assert torch.equal(torch.get_rng_state(), state)
        results.append(adapter(snapshot(model)))
        torch.rand(3)
    assert same_state(results[0], results[1])
    assert not same_state(results[0], results[2])


def test_dropout_is_active_in_training_and_not_in_validation(tiny_gpt2_dir):
    losses = []
    for dropout in (0.0, 0.5):
        model = add_lora(load_pretrained(tiny_gpt2_dir), LoraConfig(rank=3, dropout=dropout), seed=0)
        randomize_lora(model)
        result = finetune(model, examples(), examples(5), config(epochs=1, learning_rate=1e-12, log_every_steps=3))
        losses.append(result.history[-1])
    assert losses[0]["train/loss"] != losses[1]["train/loss"]
    assert losses[0]["val/loss"] == pytest.approx(losses[1]["val/loss"], rel=1e-6)


def test_training_works_with_deterministic_algorithms(model, monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")  # so that the test's end removes what training sets
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    during = []

    def on_log(step, values):
        during.append(torch.are_deterministic_algorithms_enabled())

    finetune(model, examples(), examples(3), config(deterministic=True), on_log)
    assert during
    assert all(during)
    assert not torch.are_deterministic_algorithms_enabled()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"  # without it, torch raises an error on a GPU


def test_a_loss_that_is_not_finite_stops_the_run_with_records_and_advice(model):
    model.wte.weight.data[5] = math.inf
    records = [Example([5, 5, 5], 1), Example([6, 6, 6], 1)]
    with pytest.raises(FloatingPointError, match=r"step 1 \(training records (1, 2|2, 1)\); lower learning_rate=0\.01"):
        finetune(model, records, [], config())


def test_a_validation_loss_that_is_not_finite_stops_the_run(model):
    model.wpe.weight.data[40] = math.nan  # a position that only the validation example has
    with pytest.raises(FloatingPointError, match=r"the validation loss is nan after step 3"):
        finetune(model, examples(), [Example([7, 8, 9, *range(50)], 3)], config())


def test_models_and_data_that_cannot_be_trained_are_refused(tiny_gpt2_dir, model):
    with pytest.raises(ValueError, match="no training examples"):
        finetune(model, [], [], config())
    with pytest.raises(ValueError, match="patience=3 needs validation examples"):
        finetune(model, examples(), [], config(patience=3))
    with pytest.raises(ValueError, match="merged"):
        finetune(merge_lora(model), examples(), [], config())
    with pytest.raises(ValueError, match="add_lora"):
        finetune(load_pretrained(tiny_gpt2_dir).requires_grad_(False), examples(), [], config())


def test_without_validation_examples_there_is_no_validation_loss(model):
    result = finetune(model, examples(), [], config())
    assert result.best_val_loss is None
    assert not any("val/loss" in entry for entry in result.history)


def test_several_devices_without_a_process_group_are_refused(model):
    with pytest.raises(ValueError, match=r"devices is 2, .*; use finetune_adapter of gpt2core\.distributed"):
        finetune(model, examples(), [], config(devices=2))
