"""`make bench-growth`: throughput over length, batch size, model size, concurrent requests and adapters."""

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import click
import jinja2
import matplotlib

from benchmarks.measure import machine, request_count, versions, watch_machine
from benchmarks.models import random_adapter, random_model
from benchmarks.run import ROOT, idle
from benchmarks.sides import Ours, Side
from gpt2core.checkpoint import load_pretrained, save_pretrained
from gpt2core.config import PRESETS, GPT2Config, LoraConfig, TrainConfig
from gpt2core.data import Example
from gpt2core.lora import add_lora
from gpt2core.train import finetune

matplotlib.use("Agg")
import matplotlib.pyplot as plt

RUNS = 3  # number of measured runs, after a warm-up run
N_NEW = 32
SIZES = ("gpt2-nano", "gpt2", "gpt2-medium", "gpt2-large")
TEMPLATE = Path(__file__).parent / "growth.md.j2"


Point = tuple[Any, float]  # value of x, tokens/s


@dataclass(frozen=True)
class Curve:
    name: str
    x: str  # label of the horizontal axis
    points: list[Point]


class Trainer:
    """LoRA finetuning in bf16 on synthetic records of one length, half of it the response."""

    def __init__(self, base: Path) -> None:
        self.model = add_lora(load_pretrained(base), LoraConfig(), seed=0)

    def rate(self, length: int, batch_size: int) -> float:
        n = self.model.config.vocab_size
        examples = [
            Example([(7919 * i + 31 * t) % n for t in range(length + 1)], length // 2) for i in range(batch_size)
        ]
        config = TrainConfig(epochs=1, batch_size=batch_size, precision="bf16-mixed", learning_rate=1e-4)
        return finetune(self.model, examples, [], config).tokens_per_second


@click.command()
@click.option("--model", "preset", default="gpt2", show_default=True, type=click.Choice(list(PRESETS)))
@click.option("--sizes", default=",".join(SIZES), show_default=True)
@click.option("--largest", default=1024, show_default=True, help="Longest sequence, at most the model's context.")
@click.option(
    "--most", default=64, show_default=True, help="Largest batch and number of requests; half as many adapters."
)
@click.option("--out", default=ROOT, type=click.Path(path_type=Path))
def main(preset: str, sizes: str, largest: int, most: int, out: Path) -> None:
    """Measure. After each curve, write benchmarks/results/growth.json, docs/growth.md and its plot."""
    about: dict[str, Any] = machine()
    curves: list[Curve] = []
    with watch_machine(about) as record_share, TemporaryDirectory() as scratch:
        for curve in measure(Path(scratch), preset, sizes.split(","), largest, most):
            curves.append(curve)
            record_share()
            write(out, preset, about, curves)


def write(out: Path, preset: str, about: dict[str, Any], curves: Sequence[Curve]) -> None:
    """Write results, page and plot of the curves that were measured so far."""
    result = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "model": preset,
        "machine": about,
        "versions": versions(),
        "curves": [vars(curve) for curve in curves],
    }
    (out / "benchmarks" / "results").mkdir(parents=True, exist_ok=True)
    (out / "docs").mkdir(exist_ok=True)
    (out / "benchmarks" / "results" / "growth.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    draw(curves, out / "docs" / "growth.svg")
    template = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    page = template.from_string(TEMPLATE.read_text(encoding="utf-8")).render(result, idle=idle(about))
    (out / "docs" / "growth.md").write_text(page, encoding="utf-8")


def measure(scratch: Path, preset: str, sizes: Sequence[str], largest: int, most: int) -> Iterator[Curve]:
    config = GPT2Config.preset(preset)
    lengths = [length for length in (64, 128, 256, 512, 1024) if length <= min(largest, config.n_positions)]
    counts = [count for count in (1, 2, 4, 8, 16, 32, 64) if count <= most]
    bases = {}
    for size in dict.fromkeys([preset, *sizes]):
        bases[size] = scratch / size
        save_pretrained(random_model(GPT2Config.preset(size)), bases[size])

    with Side(Trainer, bases[preset]) as trainer:
        short = min(128, lengths[-1])
        by_length = ((length, _median(trainer.rate, length - 1, 8)) for length in lengths)
        yield _curve("finetuning, batch 8", "tokens per record", by_length)
        by_batch = ((n, _median(trainer.rate, short - 1, n)) for n in counts)
        yield _curve(f"finetuning, {short} tokens", "batch", by_batch)

    def finetuning_by_size() -> Iterator[Point]:
        for size in sizes:
            with Side(Trainer, bases[size]) as trainer:
                yield size, _median(trainer.rate, 127, 8)

    yield _curve("finetuning, batch 8, 128 tokens", "model", finetuning_by_size())

    for n in (1, min(16, most)):
        with _engine(bases[preset], n) as ours:
            by_length = ((length, _decoding(ours, n, length - N_NEW)) for length in lengths)
            yield _curve(f"decoding, {request_count(n)}", "tokens of prompt and completion", by_length)
    with _engine(bases[preset], most) as ours:
        by_count = ((n, _decoding(ours, n)) for n in counts)
        yield _curve("decoding, prompts of 64", "requests at once", by_count)

    def decoding_by_size(n: int) -> Iterator[Point]:
        for size in sizes:
            with _engine(bases[size], n) as ours:
                yield size, _decoding(ours, n)

    for n in (1, min(16, most)):
        yield _curve(f"decoding, {request_count(n)}, prompts of 64", "model", decoding_by_size(n))
    n, model = most // 2, load_pretrained(bases[preset])
    directories = [random_adapter(model, scratch / f"adapter-{i}", i) for i in range(n)]
    with _engine(bases[preset], n, directories) as ours:
        by_adapters = ((k, _decoding(ours, n, n_adapters=k)) for k in (0, *counts) if k <= n)
        yield _curve(f"decoding, {request_count(n)}, prompts of 64", "distinct adapters", by_adapters)


def _curve(name: str, x: str, points: Iterable[Point]) -> Curve:
    """Measure the points of a curve. Prints each point as soon as it is measured."""
    measured = []
    for value, rate in points:
        click.echo(f"{name}; {x} {value}: {rate:,.0f} tokens/s")
        measured.append((value, rate))
    return Curve(name, x, measured)


@contextmanager
def _engine(base: Path, max_batch: int, adapters: Sequence[Path] = ()) -> Iterator[Side]:
    with Side(Ours, base, "auto", max_batch, adapters) as ours:
        yield ours


def _decoding(ours: Side, n: int, prompt: int = 64, n_adapters: int = 0) -> float:
    """Measure the decoding throughput in tokens/s of n requests whose prompts share no prefix."""

    def rate(run: int) -> float:
        prompts = [[(run * n + i) % 1000 + 1, *[(31 * t + i) % 2000 for t in range(prompt - 1)]] for i in range(n)]
        after_prompt: float = ours.decoding_rate(prompts, N_NEW, n_adapters)
        return after_prompt

    rates = [rate(run) for run in range(RUNS + 1)]
    return median(rates[1:])


def _median(rate: Any, *arguments: Any) -> float:
    return median([rate(*arguments) for _ in range(RUNS + 1)][1:])


def draw(curves: Sequence[Curve], file: Path) -> None:
    """Plot one panel per varied quantity, for finetuning and for decoding."""
    panels: dict[tuple[str, str], list[Curve]] = {}
    for curve in curves:
        panels.setdefault((curve.name.partition(",")[0], curve.x), []).append(curve)
    figure, axes = plt.subplots((len(panels) + 1) // 2, 2, figsize=(10, 3.2 * ((len(panels) + 1) // 2)))
    for axis, ((kind, x), drawn) in zip(axes.flat, panels.items(), strict=False):
        for curve in drawn:
            labels = [str(point[0]) for point in curve.points]
            axis.plot(labels, [point[1] for point in curve.points], marker="o", label=curve.name)
        axis.set(xlabel=x, ylabel="tokens/s", title=kind, yscale="log" if x == "model" else "linear")
        if x != "model":
            axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    figure.tight_layout()
    figure.savefig(file, metadata={"Date": None})
    plt.close(figure)


if __name__ == "__main__":
    main()
