"""`make bench-gpu`, on a machine with CUDA: finetuning, compared with transformers and PEFT, and decoding."""

import json
import os
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter

import click
import torch

from benchmarks.groups import matrix_weights, random_model
from benchmarks.measure import Row, interleave, make_row, versions
from benchmarks.peer import Trainer
from benchmarks.run import ROOT, render_table
from benchmarks.sides import Ours
from gpt2core.checkpoint import load_pretrained, save_pretrained
from gpt2core.config import PRESETS, GPT2Config, LoraConfig, TrainConfig
from gpt2core.data import Example, encode_records, read_records, split_records
from gpt2core.demo.records import write_records
from gpt2core.demo.world import make_world
from gpt2core.lora import add_lora
from gpt2core.tokenizer import load_tokenizer
from gpt2core.train import finetune

# Dense bf16 throughput by NVIDIA's data sheets, FLOP/s
PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L4": 121e12, "A10": 125e12, "T4": 65e12}


@click.command()
@click.option("--model", "preset", default="gpt2-medium", show_default=True, type=click.Choice(list(PRESETS)))
@click.option("--epochs", default=48, show_default=True, type=click.IntRange(1))
@click.option("--batch-size", default=128, show_default=True, type=click.IntRange(1))
@click.option("--runs", default=3, show_default=True, type=click.IntRange(1))
@click.option("--peak", type=float, help="Peak bf16 FLOP/s of this GPU, if its name is not in the table.")
@click.option("--out", default=ROOT, type=click.Path(path_type=Path))
def main(preset: str, epochs: int, batch_size: int, runs: int, peak: float | None, out: Path) -> None:
    """Measure, print the table, write benchmarks/results/gpu.json."""
    if not torch.cuda.is_available():
        click.echo(f"torch {torch.__version__} finds no CUDA device; this benchmark needs one", err=True)
        sys.exit(2)
    name = torch.cuda.get_device_name()
    peak = peak or next((value for part, value in PEAKS.items() if re.search(rf"\b{part}\b", name)), None)
    command = f"python -m benchmarks.gpu --model {preset} --epochs {epochs} --batch-size {batch_size} --runs {runs}"
    with TemporaryDirectory() as scratch:
        base = Path(scratch) / "base"
        save_pretrained(random_model(GPT2Config.preset(preset)), base)
        examples = _examples(GPT2Config.preset(preset).n_positions)
        rows = _training(base, examples, epochs, batch_size, runs, peak, command)
        engine = Ours(base, "bf16", 64)
        for n in (1, 16, 64):
            prompts = [[*examples[i].input_ids[: examples[i].prompt_length]] for i in range(n)]
            engine.rate(prompts, 64)
            rates_ = [engine.rate(prompts, 64) for _ in range(runs)]
            rows.append(make_row(f"decoding, {n} requests", "tokens/s", rates_, None, command))
    result = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "gpu": name,
        "versions": versions() | {"cuda": torch.version.cuda},
        "rows": [row.as_json() for row in rows],
    }
    click.echo(f"{render_table(result['rows'])}\n{name}; share of limit is the model FLOP utilisation (MFU)")
    file = out / "benchmarks" / "results" / "gpu.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(result, indent=2) + "\n")


def _training(
    base: Path, examples: list[Example], epochs: int, batch_size: int, runs: int, peak: float | None, command: str
) -> list[Row]:
    model = add_lora(load_pretrained(base, device="cuda"), LoraConfig(), seed=0)
    trainer = Trainer(base, torch.bfloat16, device="cuda")
    config = TrainConfig(epochs=1, batch_size=batch_size, precision="bf16-mixed")
    sides: dict[str, Callable[[int], float]] = {
        "ours": lambda run: finetune(model, examples, [], config).tokens_per_second,
        "peer": lambda run: trainer.train(examples, batch_size),
    }
    rates = interleave(sides, runs)
    # one product forward and one backward per matrix: a frozen matrix needs no gradient
    limit = None if peak is None else peak / (4 * matrix_weights(model))
    torch.cuda.reset_peak_memory_stats()
    start = perf_counter()
    finetune(model, examples, [], replace(config, epochs=epochs))
    seconds, memory = perf_counter() - start, torch.cuda.max_memory_allocated() / 2**20
    return [
        make_row("finetuning, bf16", "tokens/s", rates["ours"], rates["peer"], command, limit),
        make_row(f"{epochs} epochs of {len(examples)} records", "s", [seconds], None, command),
        make_row("peak memory of these epochs", "MiB", [memory], None, command),
    ]


def _examples(n_positions: int) -> list[Example]:
    """The training records of the file INSTRUCTION_DATA, or the demo's, encoded with GPT-2's tokenizer."""
    file = os.environ.get("INSTRUCTION_DATA")
    records = read_records(file) if file else write_records(make_world(0), 0)
    return encode_records(split_records(records, seed=0).train, load_tokenizer("gpt2"), n_positions)


if __name__ == "__main__":
    main()
