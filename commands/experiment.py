"""Experiments: each variant of a file in configs/experiments with each seed, measured and written as table and plot."""

import hashlib
import json
import os
import platform
import statistics
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import date
from math import nan, sqrt
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any, Literal

import psutil
import torch
import torch.nn.functional as F
import yaml
from torch import Tensor, nn

from gpt2core.checkpoint import load_pretrained, read_config, save_adapter
from gpt2core.config import GenerationConfig, GPT2Config, LoraConfig, PretrainConfig, TrainConfig, check_field
from gpt2core.data import encode_records, split_records
from gpt2core.demo.base import encode_documents, make_base, train_tokenizer
from gpt2core.demo.prose import write_prose
from gpt2core.demo.world import make_world
from gpt2core.evaluate import answer_text
from gpt2core.files import atomic_write, file_sha256, to_json
from gpt2core.generate import generate
from gpt2core.lora import add_lora, merge_lora
from gpt2core.metrics import exact_match
from gpt2core.model import GPT2, best_device
from gpt2core.records import Record
from gpt2core.tokenizer import load_tokenizer
from gpt2core.train import finetune, pretrain, token_losses
from gpt2core.types import BaseRef
from steps.adapters.hub import fetch_base
from steps.config import BaseConfig, DataConfig
from steps.fetch_data import read_source
from steps.outputs import outputs_dir

CONFIGS = Path("configs/experiments")
SAMPLE_EVERY = 0.2  # seconds between two values of the utilisation
Scale = Literal["small", "full"]


class ExperimentError(ValueError):
    """An experiment that is not known or has a wrong value; the message names it in one line."""


@dataclass(frozen=True)
class Experiment:
    """A file of configs/experiments."""

    question: str
    kind: Literal["finetune", "pretrain", "attention"]
    variable: str  # what the variants differ in
    variants: Mapping[str, Mapping[str, Any]]  # name -> parameters, over those of the scale
    metrics: tuple[str, ...]  # columns of the table; the first one is plotted
    small: Mapping[str, Any]  # parameters of a size that ends in minutes on two cores
    full: Mapping[str, Any]
    seeds: tuple[int, ...] = (0, 1, 2)


@dataclass(frozen=True)
class FinetuneParameters:
    data: DataConfig = DataConfig()
    base: BaseConfig = BaseConfig()
    lora: LoraConfig = LoraConfig()
    train: TrainConfig = TrainConfig()
    generation: GenerationConfig = GenerationConfig()
    samples: int = 1  # answers to each test record
    repeats: int = 1  # trainings, whose adapters are compared
    deterministic: bool = False  # torch.use_deterministic_algorithms


@dataclass(frozen=True)
class PretrainParameters:
    model: GPT2Config = GPT2Config()
    pretrain: PretrainConfig = PretrainConfig()
    file: str = ""  # the text; empty: the prose of the demo world
    n_facts: int | None = None  # of that world
    prompt: str = ""  # its greedy continuation is kept with the results
    val_fraction: float = 0.1  # at the end of the text


@dataclass(frozen=True)
class AttentionParameters:
    attention: Literal["loop", "fused", "sdpa"] = "sdpa"
    length: int = 1024
    batch_size: int = 4
    n_head: int = 12
    n_embd: int = 768


@dataclass
class Trial:
    """What one variant gave with one seed."""

    metrics: dict[str, float]
    curve: list[tuple[float, float]] = field(default_factory=list)  # (step, loss), or (seconds, share of the CPUs)
    sample: str = ""


def run_experiment(name: str, scale: Scale = "small", log: Callable[[str], None] = print) -> Path:
    """Run every variant with every seed; return the directory of results.json, table.md and plot.svg.

    Raises:
        ExperimentError: there is no such experiment, or its file has a wrong key or value.
    """
    experiment = read_experiment(name)
    common = experiment.small if scale == "small" else experiment.full
    trials: dict[str, list[Trial]] = {}
    # all variants are checked before the first one runs
    parameters = {label: parse(experiment, _merge(common, own), label) for label, own in experiment.variants.items()}
    for label, values in parameters.items():
        for seed in experiment.seeds:
            trial = RUN[experiment.kind](values, seed)
            trials.setdefault(label, []).append(trial)
            log(f"{label}, seed {seed}: " + ", ".join(f"{key} {trial.metrics[key]:.4g}" for key in experiment.metrics))
    directory = outputs_dir() / "experiments" / (name if scale == "small" else f"{name}-full")
    about = {"name": name, "scale": scale, "date": date.today().isoformat(), "machine": machine(), **asdict(experiment)}
    results = {label: [asdict(trial) for trial in found] for label, found in trials.items()}
    atomic_write(directory / "results.json", to_json({**about, "results": results}))
    atomic_write(directory / "table.md", table(experiment, trials).encode())
    _plot(experiment, trials, directory / "plot.svg")
    return directory


def read_experiment(name: str) -> Experiment:
    file = CONFIGS / f"{name}.yaml"
    if not file.is_file():
        known = ", ".join(sorted(path.stem for path in CONFIGS.glob("*.yaml")))
        raise ExperimentError(f"there is no experiment {name!r}; there are {known}")
    values = yaml.safe_load(file.read_text())
    try:
        arguments: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in values.items()}
        experiment = Experiment(**arguments)
        check_field(experiment, "kind", experiment.kind in RUN, f"one of {', '.join(RUN)}")
    except (TypeError, ValueError) as error:
        raise ExperimentError(f"{file}: {error}") from None
    return experiment


def parse(experiment: Experiment, values: Mapping[str, Any], label: str) -> Any:
    """The parameters of a variant, with every value checked."""
    classes: dict[str, Callable[..., Any]] = {
        "data": DataConfig,
        "base": lambda **v: BaseConfig(**v | {"pretrain": PretrainConfig(**v.get("pretrain", {}))}),
        "lora": LoraConfig,
        "train": TrainConfig,
        "generation": GenerationConfig,
        "model": lambda preset="gpt2-nano", **v: replace(GPT2Config.preset(preset), **v),
        "pretrain": PretrainConfig,
    }
    kinds: dict[str, Callable[..., Any]] = {
        "finetune": FinetuneParameters,
        "pretrain": PretrainParameters,
        "attention": AttentionParameters,
    }
    try:
        return kinds[experiment.kind](**{k: classes[k](**v) if k in classes else v for k, v in values.items()})
    except (TypeError, ValueError) as error:
        raise ExperimentError(f"variant {label!r}: {error}") from None


def table(experiment: Experiment, trials: Mapping[str, Sequence[Trial]]) -> str:
    """Markdown: mean ± standard deviation over the seeds."""
    lines = [
        f"| {experiment.variable} | {' | '.join(experiment.metrics)} |",
        "|---" * (len(experiment.metrics) + 1) + "|",
    ]
    for label, found in trials.items():
        cells = []
        for metric in experiment.metrics:
            values = [trial.metrics[metric] for trial in found]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            cells.append(f"{statistics.mean(values):.4g} ± {spread:.2g}")
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def machine() -> str:
    """The model of the GPU or CPU, and the number of cores."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    return f"{model}, {os.cpu_count()} cores"


def _finetune(parameters: FinetuneParameters, seed: int) -> Trial:
    base_dir = _base(parameters.base, parameters.data.n_facts)
    tokenizer, n_positions = load_tokenizer(base_dir), read_config(base_dir / "config.json").n_positions
    data = parameters.data
    parts = split_records(_records(data), 0, data.val_fraction, data.test_fraction)
    train, val, test = (encode_records(part, tokenizer, n_positions) for part in parts)
    if not val:
        raise ExperimentError(f"there is no validation record among {len(train)}; raise data.val_fraction or n_facts")
    config = replace(parameters.train, seed=seed)
    key = json.dumps([asdict(replace(parameters, generation=GenerationConfig(), samples=1)), seed])
    if _last.get("key") != key:  # variants that differ in decoding alone share the model
        digests, seconds = [], []
        for _ in range(parameters.repeats):
            model = add_lora(load_pretrained(base_dir, device=best_device()), parameters.lora, seed)
            start = perf_counter()
            torch.use_deterministic_algorithms(parameters.deterministic)
            try:
                with _utilisation() as use:
                    result = finetune(model, train, val, config)
            finally:
                torch.use_deterministic_algorithms(False)
            seconds.append(perf_counter() - start)
            with TemporaryDirectory() as directory:
                digests.append(file_sha256(save_adapter(model, directory) / "adapter.safetensors"))
        losses = token_losses(model, val, config.batch_size, "response")
        last = {name: value for entry in result.history for name, value in entry.items()}
        metrics = {
            "val_loss": sum(loss for loss, _ in losses) / sum(n for _, n in losses),
            "train_loss": last["train/loss"],
            "parameters": float(sum(p.numel() for p in model.parameters() if p.requires_grad)),
            "seconds": statistics.mean(seconds),
            "tokens_per_second": result.tokens_per_second,
            "same_bytes": float(len(set(digests)) == 1),
            "utilisation": statistics.mean(share for _, share, _ in use),
            "peak_mib": max(mib for _, _, mib in use),
        }
        curve = [(entry["step"], entry["val/loss"]) for entry in result.history if "val/loss" in entry]
        _last.update(key=key, model=merge_lora(model), metrics=metrics, curve=curve, use=use)
    prompts = [example.input_ids[: example.prompt_length] for example in test]
    correct = 0.0
    answers: list[set[str]] = [set() for _ in test]
    for sample in range(parameters.samples):
        generation = replace(parameters.generation, eos_id=tokenizer.eot_token, seed=1000 * seed + sample)
        for i, completion in enumerate(generate(_last["model"], prompts, generation)):
            answer = answer_text(completion, tokenizer)
            correct += exact_match(parts.test[i]["output"], answer)
            answers[i].add(answer)
    distinct = sum(map(len, answers)) / len(test)
    metrics = _last["metrics"] | {"exact_match": correct / len(test) / parameters.samples, "distinct": distinct}
    return Trial(metrics, _last["curve"])


_last: dict[str, Any] = {}  # the model that was finetuned last


def _records(data: DataConfig) -> list[Record]:
    return read_source(data, seed=0)[0]


def _base(base: BaseConfig, n_facts: int | None) -> Path:
    """The base, the same for all seeds; a pretrained one is kept beside the results for other experiments."""
    if base.source == "hub":
        return fetch_base(BaseRef(base.name, base.revision, sha256="")).path
    digest = hashlib.sha256(json.dumps([asdict(base), n_facts]).encode()).hexdigest()[:12]
    directory = outputs_dir() / "experiments" / f"base-{digest}"
    if not (directory / "model.safetensors").is_file():
        make_base(base.name, base.pretrain if base.source == "nano" else None, 0, n_facts, directory, None)
    return directory


@contextmanager
def _utilisation() -> Iterator[list[tuple[float, float, float]]]:
    """Yield a list that grows by (seconds, share of all CPUs, or of the GPU, in use, MiB) while the block runs."""
    values: list[tuple[float, float, float]] = []
    process, stop, start = psutil.Process(), threading.Event(), perf_counter()
    on_gpu = torch.cuda.is_available()
    process.cpu_percent()

    def sample() -> None:
        done = False
        while not done:
            done = stop.wait(SAMPLE_EVERY)
            if on_gpu:
                share, used = torch.cuda.utilization() / 100, torch.cuda.max_memory_allocated()
            else:
                share, used = process.cpu_percent() / 100 / (os.cpu_count() or 1), process.memory_info().rss
            values.append((perf_counter() - start, share, used / 2**20))

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield values
    finally:
        stop.set()
        thread.join()


def _pretrain(parameters: PretrainParameters, seed: int) -> Trial:
    if parameters.file:
        documents = [Path(parameters.file).read_text()]
    else:
        documents = write_prose(make_world(0, parameters.n_facts), 0)
    with TemporaryDirectory() as directory:
        tokenizer = train_tokenizer(documents, parameters.model.vocab_size, Path(directory))
    tokens = encode_documents(documents, tokenizer)
    n_train = int(len(tokens) * (1 - parameters.val_fraction))
    config = replace(parameters.model, vocab_size=tokenizer.n_vocab)
    model = GPT2(config, torch.Generator().manual_seed(seed)).to(best_device())
    start = perf_counter()
    try:
        result = pretrain(model, tokens[:n_train], replace(parameters.pretrain, seed=seed))
    except FloatingPointError:
        return Trial({"val_loss": nan, "train_loss": nan, "seconds": perf_counter() - start}, sample="(diverged)")
    seconds = perf_counter() - start
    curve = [(entry["step"], entry["train/loss"]) for entry in result.history]
    prompt = tokenizer.encode_ordinary(parameters.prompt)
    sample = tokenizer.decode(generate(model.eval(), [prompt], GenerationConfig())[0]) if prompt else ""
    metrics = {"val_loss": text_loss(model, tokens[n_train:]), "train_loss": curve[-1][1], "seconds": seconds}
    return Trial(metrics, curve, parameters.prompt + sample)


@torch.inference_mode()
def text_loss(model: GPT2, tokens: Tensor) -> float:
    """Mean loss, nats per token, of a text (N) cut into windows of the context; the rest at its end is left out."""
    T = min(model.config.n_positions, len(tokens) - 1)
    n = (len(tokens) - 1) // T
    rows = zip(tokens[: n * T].view(n, T).split(8), tokens[1 : n * T + 1].view(n, T).split(8), strict=True)
    device = model.wte.weight.device
    sums = [
        F.cross_entropy(model(ids.to(device)).flatten(0, 1).float(), labels.to(device).flatten(), reduction="sum")
        for ids, labels in rows
    ]
    return float(sum(map(float, sums))) / (n * T)


def _attention(parameters: AttentionParameters, seed: int) -> Trial:
    """Memory kept for the backward pass (on a GPU the peak), and time, of one attention layer."""
    device, generator = best_device(), torch.Generator().manual_seed(seed)
    B, T, H, C = parameters.batch_size, parameters.length, parameters.n_head, parameters.n_embd
    torch.manual_seed(seed)
    projection = nn.Linear(C, 3 * C).to(device)
    x = torch.randn(B, T, C, generator=generator).to(device)
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    times: dict[str, list[float]] = {"forward": [], "backward": []}
    for _ in range(4):  # the first one warms up
        kept.clear()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        start = _now(device)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            q, k, v = projection(x).unflatten(-1, (3, H, -1)).permute(2, 0, 3, 1, 4)  # three of (B, H, T, D)
            y = ATTENTION[parameters.attention](q, k, v)
        middle = _now(device)
        y.sum().backward()
        times["forward"].append(middle - start)
        times["backward"].append(_now(device) - middle)
    mib = (torch.cuda.max_memory_allocated() if device.type == "cuda" else sum(kept.values())) / 2**20
    return Trial({"kept_mib": mib} | {f"{name}_ms": 1000 * min(found[1:]) for name, found in times.items()})


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return perf_counter()


def _matrix_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention with the matrix of all weights: q, k, v (…, T, D)."""
    T = q.shape[-2]
    causal = torch.ones(T, T, dtype=torch.bool, device=q.device).tril()
    scores = (q @ k.transpose(-1, -2) / sqrt(q.shape[-1])).masked_fill(~causal, -torch.inf)
    return scores.softmax(-1) @ v


ATTENTION: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "loop": lambda q, k, v: torch.stack([_matrix_attention(q[:, h], k[:, h], v[:, h]) for h in range(q.shape[1])], 1),
    "fused": _matrix_attention,
    "sdpa": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
}
RUN: dict[str, Callable[[Any, int], Trial]] = {"finetune": _finetune, "pretrain": _pretrain, "attention": _attention}


def _merge(common: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(common)
    for key, value in own.items():
        before = merged.get(key)
        merged[key] = _merge(before, value) if isinstance(before, Mapping) and isinstance(value, Mapping) else value
    return merged


def _plot(experiment: Experiment, trials: Mapping[str, Sequence[Trial]], file: Path) -> None:
    """Losses by step, one line per seed, if there are any; and the first metric by variant, one point per seed."""
    from matplotlib.figure import Figure  # half a second to import

    figure = Figure(figsize=(9, 3.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    for i, (label, found) in enumerate(trials.items()):
        for j, trial in enumerate(found):
            if trial.curve:
                left.plot(*zip(*trial.curve, strict=True), color=f"C{i % 10}", label=None if j else label, linewidth=1)
            right.plot(trial.metrics[experiment.metrics[0]], i, "o", color=f"C{i % 10}", alpha=0.6)
    if left.lines:
        left.legend(fontsize="x-small")
        left.set(xlabel="step", ylabel="loss (nats per token)")
    else:
        figure.delaxes(left)
    right.set_yticks(range(len(trials)), list(trials), fontsize="x-small")
    right.set_xlabel(experiment.metrics[0])
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file)
