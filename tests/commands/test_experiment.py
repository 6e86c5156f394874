"""Experiments: every file of configs/experiments is valid at both sizes; a tiny one of each kind runs to its table."""

import json
from pathlib import Path

import pytest
import torch
import yaml

from commands import experiment as module
from commands.experiment import ExperimentError, parse, read_experiment, run_experiment, text_loss
from gpt2core.config import GPT2Config
from gpt2core.model import GPT2

NAMES = sorted(file.stem for file in Path("configs/experiments").glob("*.yaml"))
TINY_PRETRAIN = {"max_steps": 3, "batch_size": 1}
TINY = {
    "finetune": (
        {
            "data": {"n_facts": 18, "val_fraction": 0.2},
            "base": {"source": "random"},
            "train": {"max_steps": 1, "batch_size": 4, "limit_val_batches": 1},
            "generation": {"max_new_tokens": 1},
        },
        {"plain": {"repeats": 2}, "DoRA": {"lora": {"dora": True}}},
        ("val_loss", "exact_match", "same_bytes", "peak_mib"),
    ),
    "pretrain": (
        {"n_facts": 24, "prompt": "The", "pretrain": TINY_PRETRAIN, "model": {"preset": "gpt2-nano", "n_layer": 1}},
        {"pre": {}, "post": {"model": {"norm_position": "post"}}},
        ("val_loss", "train_loss"),
    ),
    "attention": (
        {"length": 16, "n_embd": 8, "n_head": 2, "batch_size": 1},
        {name: {"attention": name} for name in module.ATTENTION},
        ("kept_mib",),
    ),
}


@pytest.mark.parametrize("name", NAMES)
def test_every_experiment_is_valid_at_both_sizes_with_three_seeds(name):
    experiment = read_experiment(name)
    assert len(experiment.seeds) >= 3
    for common in (experiment.small, experiment.full):
        for label, own in experiment.variants.items():
            parse(experiment, module._merge(common, own), label)


@pytest.mark.parametrize("kind", TINY)
def test_a_tiny_experiment_writes_results_table_and_plot(kind, tmp_path, monkeypatch):
    small, variants, metrics = TINY[kind]
    monkeypatch.setattr(module, "CONFIGS", tmp_path)
    monkeypatch.setattr(module, "outputs_dir", lambda: tmp_path)
    values = {"question": "?", "kind": kind, "variable": "variant", "metrics": list(metrics), "seeds": [0, 1]}
    text = yaml.safe_dump({**values, "small": small, "full": small, "variants": variants}, sort_keys=False)
    (tmp_path / "tiny.yaml").write_text(text)
    directory = run_experiment("tiny", log=lambda line: None)
    results = json.loads((directory / "results.json").read_text())["results"]
    assert {label: len(trials) for label, trials in results.items()} == dict.fromkeys(variants, 2)
    lines = (directory / "table.md").read_text().splitlines()
    assert [line.split(" | ")[0] for line in lines[2:]] == [f"| {label}" for label in variants]
    first = [trial["metrics"][metrics[0]] for trial in next(iter(results.values()))]
    assert lines[2].split(" | ")[1].startswith(f"{sum(first) / 2:.4g} ± ")
    assert "<svg" in (directory / "plot.svg").read_text()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"variants": {"x": {"lora": {"rnak": 1}}}}, "variant 'x': .*rnak"),
        ({"variants": {"x": {"train": {"epochs": 0}}}}, "variant 'x': TrainConfig.epochs is 0"),
        ({"kind": "dance"}, r"x\.yaml: Experiment.kind is 'dance'; it must be one of finetune"),
        ({"seed": 1}, r"x\.yaml: .*'seed'"),
        ({"name": None}, "there is no experiment 'y'; there are x"),
    ],
)
def test_a_mistake_is_named_before_anything_runs(change, message, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "CONFIGS", tmp_path)
    values = {"question": "?", "kind": "finetune", "variable": "v", "metrics": ["val_loss"], "small": {}, "full": {}}
    unknown = "name" in change
    (tmp_path / "x.yaml").write_text(yaml.safe_dump(values | {"variants": {}} | ({} if unknown else change)))
    with pytest.raises(ExperimentError, match=message):
        run_experiment("y" if unknown else "x")


def test_the_loss_of_a_text_is_the_mean_over_its_windows():
    model = GPT2(GPT2Config(vocab_size=11, n_positions=4, n_embd=8, n_layer=1, n_head=2)).eval()
    tokens = torch.arange(10) % 7
    logits = model(tokens[:8].view(2, 4)).log_softmax(-1)
    expected = -logits.gather(-1, tokens[1:9].view(2, 4, 1)).mean()
    assert text_loss(model, tokens) == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("length", [1, 9])
def test_all_attentions_compute_the_same(length):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, length, 4, generator=generator) for _ in range(3))
    results = [attend(q, k, v) for attend in module.ATTENTION.values()]
    for other in results[1:]:
        torch.testing.assert_close(other, results[0])
