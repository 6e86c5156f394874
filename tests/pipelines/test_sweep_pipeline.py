"""Sweeps: every experiment is valid at both sizes; a tiny sweep of each kind runs to its table."""

import json
from pathlib import Path
from shutil import copytree
from typing import get_type_hints

import pytest
import torch
import yaml
from click.testing import CliRunner
from pydantic import TypeAdapter
from zenml.client import Client
from zenml.enums import ExecutionStatus

from gpt2core.checkpoint import load_pretrained, save_pretrained
from gpt2core.config import GPT2Config
from gpt2core.evaluate import text_loss
from gpt2core.files import checkpoint_files, directory_sha256
from gpt2core.model import GPT2
from gpt2core.trials import ATTENTION
from pipelines.config import read_config
from pipelines.sweep_pipeline import sweep_pipeline
from pipelines.variants import PARAMETERS_OF_KIND, variants_of
from run import main
from steps.config import SweepConfig
from tests.runs import newest_run

EXPERIMENTS = sorted(Path("configs/experiments").glob("*.yaml"))
FINETUNE = {
    "data": {"n_facts": 18, "val_fraction": 0.2},
    "base": {"source": "random"},
    "train": {"max_steps": 1, "batch_size": 4, "limit_val_batches": 1},
    "generation": {"max_new_tokens": 1},
}
PRETRAIN = {
    "text": {"n_facts": 24, "prompts": ["The"]},
    "model": {"n_layer": 1},
    "pretrain": {"max_steps": 3, "batch_size": 1},
}


def run_sweep(directory: Path, parameters: dict):
    file = directory / "tiny.yaml"
    file.write_text(yaml.safe_dump({"parameters": parameters}, sort_keys=False))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GPT2_INSTRUCT_OUTPUTS", str(directory))
        return CliRunner().invoke(main, ["sweep", "--config", str(file)], catch_exceptions=False)


@pytest.mark.parametrize("file", EXPERIMENTS, ids=lambda file: file.stem)
@pytest.mark.parametrize("scale", ["small", "full"])
def test_every_experiment_is_valid_at_both_sizes_with_three_seeds(file, scale):
    parameters = read_config(file, sweep_pipeline)["parameters"]
    sweep = SweepConfig(**parameters["sweep"] | {"scale": scale})
    types = get_type_hints(sweep_pipeline.entrypoint)
    names = [name for kind in PARAMETERS_OF_KIND.values() for name in kind]
    given = {name: TypeAdapter(types[name]).validate_python(parameters.get(name, {})) for name in names}
    variants = variants_of(sweep, given)
    assert list(variants) == list(parameters["sweep"]["variants"])
    assert len({repr(variant) for variant in variants.values()}) == len(variants)
    assert len(sweep.seeds) >= 3


@pytest.mark.slow
def test_a_finetuning_sweep_runs_each_variant_with_each_seed_and_then_comes_from_the_cache(tmp_path):
    sweep = {
        "metrics": ["val_loss", "exact_match", "same_bytes", "utilization", "peak_mib"],
        "variants": {"plain": {}, "DoRA": {"lora": {"dora": True}}, "sampled": {"generation": {"temperature": 1.0}}},
        "seeds": [0, 1],
    }
    result = run_sweep(tmp_path, FINETUNE | {"sweep": sweep})
    assert result.exit_code == 0, result.output
    directory = tmp_path / "experiments" / "tiny"
    results = json.loads((directory / "results.json").read_text())["results"]
    assert list(results) == ["plain", "DoRA", "sampled"]
    assert all([trial["seed"] for trial in found] == [0, 1] for found in results.values())
    lines = (directory / "table.md").read_text().splitlines()
    assert [line.split(" | ")[0] for line in lines] == [
        "| variant",
        "|---|---|---|---|---|---|",
        *(f"| {label}" for label in results),
    ]
    first = [trial["metrics"]["val_loss"] for trial in results["plain"]]
    assert lines[2].split(" | ")[1].startswith(f"{sum(first) / 2:.4g} ± ")
    assert "\n".join(lines) in result.output
    page = (directory / "report.html").read_text()
    assert "<svg" in page
    assert all(f'<th scope="row">{label}</th>' in page for label in results)
    assert results["plain"][0]["curve"]
    trained = [name for name in newest_run().steps if name.startswith("finetune_")]
    assert len(trained) == 4  # the third variant decodes with the first one's adapters

    sweep["variants"]["rank 2"] = {"lora": {"rank": 2}}
    assert run_sweep(tmp_path, FINETUNE | {"sweep": sweep}).exit_code == 0
    steps = newest_run().steps
    new = {name for name, step in steps.items() if step.status != ExecutionStatus.CACHED}
    assert new == {
        "finetune_seed_0_3",
        "finetune_seed_1_3",
        "trial_rank_2_seed_0",
        "trial_rank_2_seed_1",
        "compare_trials",
    }
    assert json.loads((directory / "results.json").read_text())["results"]["plain"] == results["plain"]


def test_a_pretraining_sweep_keeps_a_diverged_training_as_a_result(tmp_path):
    variants = {"pre": {}, "huge": {"pretrain": {"learning_rate": 1e30, "warmup_steps": 0, "max_grad_norm": None}}}
    sweep = {"kind": "pretrain", "variants": variants, "seeds": [0]}
    result = run_sweep(tmp_path, PRETRAIN | {"sweep": sweep})
    assert result.exit_code == 0, result.output
    results = json.loads((tmp_path / "experiments" / "tiny" / "results.json").read_text())["results"]
    assert results["pre"][0]["sample"].startswith("The")
    assert (results["huge"][0]["metrics"]["val_loss"], results["huge"][0]["sample"]) == (None, "(diverged)")
    assert "| huge | none | none |" in result.output


def test_a_base_directory_that_changed_is_used_by_the_next_sweep(tmp_path, base_dir):
    base = copytree(base_dir, tmp_path / "base")
    values = FINETUNE | {"base": {"source": "hub", "name": str(base)}, "sweep": {"variants": {"x": {}}, "seeds": [0]}}
    assert run_sweep(tmp_path, values).exit_code == 0
    model = load_pretrained(base)
    model.wte.weight.data.mul_(1.01)
    save_pretrained(model, base)
    assert run_sweep(tmp_path, values).exit_code == 0
    [reference] = newest_run().steps["prepare_base"].outputs["base"]
    assert reference.run_metadata["sha256"] == directory_sha256(base, checkpoint_files(base))


def test_repeated_trainings_are_compared_and_attention_is_measured(tmp_path):
    values = FINETUNE | {"sweep": {"variants": {"plain": {}}, "seeds": [0], "repeats": 2, "metrics": ["same_bytes"]}}
    assert "| plain | 1 |" in run_sweep(tmp_path, values).output
    lineage = CliRunner().invoke(main, ["lineage", newest_run().name], catch_exceptions=False)
    assert (lineage.exit_code, lineage.output[:7]) == (1, "Error: ")  # lineage is of finetune_pipeline's runs
    attention = {"length": 16, "n_embd": 8, "n_head": 2, "batch_size": 1}
    sweep = {"kind": "attention", "grid": {"attention.attention": list(ATTENTION)}, "seeds": [0]}
    output = run_sweep(tmp_path, {"attention": attention, "sweep": sweep}).output
    assert all(f"| attention.attention {name} |" in output for name in ATTENTION)


@pytest.mark.parametrize(
    ("sweep", "message"),
    [
        ({"variants": {"x": {"lora": {"rnak": 1}}}}, "sweep.variants.x: unknown key 'lora.rnak'; did you mean 'rank'"),
        ({"variants": {"x": {"train": {"epochs": 0}}}}, "sweep.variants.x: TrainConfig.epochs is 0"),
        ({"variants": {"x": {"train": {"seed": 0}}}}, "train.seed is the seed of the trial; set sweep.seeds"),
        ({"variants": {"x": {"train": 3}}}, "train is 3; it must be a mapping"),
        ({"grid": {"lora.rank": 8}}, "grid"),
        ({"grid": {"lora.rnak": [8]}}, "sweep.variants.lora.rnak 8: unknown key 'lora.rnak'"),
        ({"variants": {}}, "at least one variant"),
        ({"variants": {"x": {}}, "metrics": ["kept_mib"]}, "metrics"),
        ({"variants": {"x": {}}, "seeds": [0, 0]}, "each once"),
        ({"variants": {"x": {}}, "scale": "full"}, "sweep.full has no parameters"),
        ({"variants": {"x": {}}, "kind": "attention"}, "parameters.data has no effect with sweep.kind: attention"),
        ({"variants": {"x": {}}, "kind": "dance"}, "dance"),
    ],
)
def test_a_mistake_is_named_in_one_line_before_anything_runs(sweep, message, tmp_path):
    before = newest_id()
    result = run_sweep(tmp_path, FINETUNE | {"sweep": sweep})
    assert result.exit_code == 1
    [line] = [line for line in result.output.splitlines() if line.startswith("Error: ")]
    assert message in line
    assert newest_id() == before


def newest_id():
    runs = Client().list_pipeline_runs(sort_by="desc:created", size=1).items
    return runs[0].id if runs else None


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
    results = [attend(q, k, v) for attend in ATTENTION.values()]
    for other in results[1:]:
        torch.testing.assert_close(other, results[0])
