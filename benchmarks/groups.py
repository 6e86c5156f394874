"""The benchmark groups. Each function measures both sides and returns its rows."""

import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from shutil import copytree
from statistics import quantiles
from types import MappingProxyType
from typing import Any
from unittest.mock import patch

import torch

from benchmarks.engines import CTranslate2, LlamaCpp, OpenVino, find_version, make_gguf
from benchmarks.measure import Row, interleave, make_row, matmul_rate, read_bandwidth, request_count
from benchmarks.models import matrix_weights, random_adapter, random_model, training_flop, with_random_adapter
from benchmarks.peer import Decoder, Trainer, best_trainer
from benchmarks.pipeline import WORK, Quality, run_cold
from benchmarks.serving import Clients, PlainServer, widen_tokenizer
from benchmarks.sides import Ours, Side
from deploy import bento, server
from gpt2core.checkpoint import load_pretrained, read_config, save_pretrained
from gpt2core.config import GPT2Config, LoraConfig, Precision, TrainConfig
from gpt2core.data import Example, encode_records
from gpt2core.demo.base import train_tokenizer
from gpt2core.demo.prose import write_prose
from gpt2core.demo.records import write_records
from gpt2core.demo.world import make_world
from gpt2core.engine import Weights
from gpt2core.files import checkpoint_files, directory_sha256
from gpt2core.inference.quantized import supported_formats
from gpt2core.kernels import has_onednn
from gpt2core.lora import add_lora, merge_lora
from gpt2core.metrics import Scores
from gpt2core.model import GPT2
from gpt2core.train import finetune
from gpt2core.types import BaseRef, Commit, Lineage, LineageMetrics, RunRef, TrainSummary

BATCH_SIZE = 8  # batch size of finetuning
NANO_VOCABULARY = GPT2Config.preset("gpt2-nano").vocab_size
BYTES = {"fp32": 4, "bf16": 2, "int8": 1}  # bytes per weight


@dataclass(frozen=True)
class Setting:
    """Settings shared by all groups: model, data and sizes."""

    directory: Path  # scratch space; base/ in it is the checkpoint that both sides load
    examples: list[Example]
    runs: int
    n_new: int  # tokens per completion
    train_steps: int
    medium: str  # preset of the gpt2-medium rows
    config: str  # file of the pipeline run
    command: str

    @property
    def base(self) -> Path:
        return self.directory / "base"

    @property
    def n_matrix_weights(self) -> int:
        return matrix_weights(load_pretrained(self.base))

    def peer(self) -> Side:
        return Side(Decoder, self.base, self.prompts(1, 0))

    def prompts(self, n: int, run: int) -> list[list[int]]:
        """Return `n` prompts that differ between runs, so that a cache can reuse only their shared prefix."""
        start = run * n
        picked = [self.examples[i % len(self.examples)] for i in range(start, start + n)]
        return [example.input_ids[: example.prompt_length] for example in picked]


def prepare(
    directory: Path, preset: str, medium: str, runs: int, n_new: int, train_steps: int, config: str, command: str
) -> Setting:
    """Write a random checkpoint of the preset's shape, and encode the demo's records.

    The tokenizer is the nano model's, trained on the demo's prose: its token ids fit every preset's vocabulary, and
    lengths and shared prefixes are those of real prompts.
    """
    world = make_world(0)
    tokenizer = train_tokenizer(write_prose(world, 0), NANO_VOCABULARY, directory / "tokenizer")
    shape = GPT2Config.preset(preset)
    examples = encode_records(write_records(world, 0), tokenizer, shape.n_positions - n_new)
    save_pretrained(random_model(shape), directory / "base")
    return Setting(directory, examples, runs, n_new, train_steps, medium, config, command)


def train(setting: Setting) -> list[Row]:
    """LoRA finetuning on the same records in batches of the same size."""
    rows = []
    n = setting.train_steps * BATCH_SIZE
    by_length = sorted(setting.examples[:n], key=lambda example: len(example.input_ids))  # the least padding
    precisions: list[tuple[Precision, torch.dtype]] = [("bf16-mixed", torch.bfloat16), ("fp32", torch.float32)]
    for precision, dtype in precisions:
        if not has_onednn(dtype):
            continue  # the peer needs many minutes then
        model = add_lora(load_pretrained(setting.base), LoraConfig(), seed=0)
        config = TrainConfig(epochs=1, batch_size=BATCH_SIZE, precision=precision, learning_rate=1e-3)
        trainer = best_trainer(setting.base, precision, setting.examples, BATCH_SIZE)

        def peer(run: int, trainer: Trainer = trainer) -> float:
            return trainer.train(by_length, BATCH_SIZE)

        def ours(run: int, model: GPT2 = model, config: TrainConfig = config) -> float:
            return finetune(model, setting.examples[:n], [], config).tokens_per_second

        values = interleave({"ours": ours, "peer": peer}, setting.runs)
        n_tokens = sum(len(example.input_ids) - 1 for example in setting.examples[:n])
        limit = matmul_rate(dtype) * n_tokens / training_flop(model, setting.examples[:n], BATCH_SIZE)
        name = "finetuning, " + ("bf16" if dtype is torch.bfloat16 else "fp32")
        rows.append(
            make_row(
                name, "tokens/s", values["ours"], values["peer"], setting.command, limit, note="padding not counted"
            )
        )
    return rows


def decode(setting: Setting) -> list[Row]:
    """A single request."""
    n_weights, bandwidth = setting.n_matrix_weights, read_bandwidth()
    config = read_config(setting.base / "config.json")
    formats: list[Weights] = ["auto", *supported_formats(config, torch.device("cpu"))]
    with ExitStack() as stack:
        peer = stack.enter_context(setting.peer())
        engines = {weights: stack.enter_context(Side(Ours, setting.base, weights)) for weights in formats}
        sides: dict[str, Callable[[int], float]] = {
            weights: partial(_rate, engine, setting, 1) for weights, engine in engines.items()
        }
        values = interleave(sides | {"peer": partial(_peer_rate, peer, setting, 1, 1)}, setting.runs)
        used = {weights: engine.weights() for weights, engine in engines.items()}
        dtype = peer.weights()
    return [
        make_row(
            f"1 request, {weights}",
            "tokens/s",
            values[weights],
            values["peer"],
            setting.command,
            bandwidth / (n_weights * BYTES[used[weights]]),
            note=f"weights {used[weights]}; peer {dtype}",
        )
        for weights in formats
    ]


def batch(setting: Setting) -> list[Row]:
    """Concurrent requests, compared with the peer one by one and in a padded batch; then time to first token."""
    rows = []
    for n, name, peers_batch in ((16, "peer one by one", 1), (32, "peer in one padded batch", 32)):
        with Side(Ours, setting.base, "auto", n) as ours, setting.peer() as peer:
            sides: dict[str, Callable[[int], float]] = {
                "ours": partial(_rate, ours, setting, n),
                "peer": partial(_peer_rate, peer, setting, n, peers_batch),
            }
            values = interleave(sides, setting.runs)
            note = f"weights {ours.weights()}; peer {peer.weights()}"
            rows.append(
                make_row(
                    f"{n} requests, {name}", "tokens/s", values["ours"], values["peer"], setting.command, note=note
                )
            )
            if n == 16:
                rows += [*_first_tokens(ours, setting, max(values["ours"])), *_sampled(ours, setting)]
    return rows


def engines(setting: Setting) -> list[Row]:
    """Concurrent requests, compared with other engines; the row of a missing engine says so."""
    rows = []
    base, n_threads = _with_tokenizer(setting.base, setting), torch.get_num_threads()
    peers: list[tuple[str, str, Callable[[int], Side]]] = [
        ("llama.cpp Q8_0", "llama-cpp-python", lambda n: Side(LlamaCpp, make_gguf(base, "q8_0"), n, n_threads)),
        ("llama.cpp F16", "llama-cpp-python", lambda n: Side(LlamaCpp, make_gguf(base, "f16"), n, n_threads)),
        ("CTranslate2 int8", "ctranslate2", lambda n: Side(CTranslate2, base, "int8", n_threads)),
        ("OpenVINO GenAI int8", "openvino-genai", lambda n: Side(OpenVino, base, "int8", n, n_threads)),
    ]
    for n in (1, 16, 32):
        with ExitStack() as stack:
            ours = stack.enter_context(Side(Ours, setting.base, "auto", max(n, 16)))
            sides: dict[str, Callable[[int], float]] = {"ours": partial(_rate, ours, setting, n)}
            for name, package, start in peers:
                if find_version(package) is not None:
                    sides[name] = partial(_engine_rate, stack.enter_context(start(n)), setting, n)
            values = interleave(sides, setting.runs)
            for name, package, _ in peers:
                found = find_version(package)
                note = f"weights {ours.weights()}; {package} {found or 'is not installed, so there is no peer'}"
                label = f"{request_count(n)} vs. {name}"
                rows.append(make_row(label, "tokens/s", values["ours"], values.get(name), setting.command, note=note))
    return rows


def adapters(setting: Setting) -> list[Row]:
    """Eight adapters in one batch compared with one merged adapter; time to load an adapter."""
    model = load_pretrained(setting.base)
    directories = [random_adapter(model, setting.directory / f"adapter-{i}", i) for i in range(8)]
    merged = setting.directory / "merged"
    save_pretrained(merge_lora(with_random_adapter(model, 0)), merged)
    with Side(Ours, setting.base, "auto", 16, directories) as ours, Side(Ours, merged) as one:
        sides: dict[str, Callable[[int], float]] = {
            "ours": partial(_rate, ours, setting, 16, n_adapters=8),
            "merged": partial(_rate, one, setting, 16),
        }
        values = interleave(sides, setting.runs)
        equal = [ours.invariance(setting.prompts(16, run), setting.n_new, 8) for run in range(setting.runs)]
        note = f"peer: this engine with one merged adapter; weights {ours.weights()} and {one.weights()}"
    invariant = "same tokens and log probabilities alone as in a batch, 16 requests, 8 adapters"
    rows = [
        make_row("16 requests, 8 adapters", "tokens/s", values["ours"], values["merged"], setting.command, note=note),
        make_row(invariant, "%", equal, None, setting.command, 100, note="bit-identical; the limit is our target"),
    ]
    medium = GPT2(GPT2Config.preset(setting.medium), torch.Generator().manual_seed(0)).eval()
    save_pretrained(medium, setting.directory / "medium")
    directory = random_adapter(medium, setting.directory / "adapter-medium", 0)
    with Side(Ours, setting.directory / "medium", "fp32") as ours:
        prompt = setting.prompts(1, 0)[0]
        times = [ours.load(directory, prompt) for _ in range(setting.runs + 1)][1:]
    for i, name in enumerate((f"load an adapter, {setting.medium}", "load it and generate a first token")):
        rows.append(make_row(name, "ms", [one[i] for one in times], None, setting.command, less_is_better=True))
    return rows


def memory(setting: Setting) -> list[Row]:
    """Memory of finetuning and of serving, with each side in its own process."""
    config = GPT2Config.preset(setting.medium)
    directory = setting.directory / "medium"
    save_pretrained(GPT2(config, torch.Generator().manual_seed(0)), directory)

    def measure(side: str, model: Path) -> float:
        command = [sys.executable, "-m", "benchmarks.memory", side, str(model), str(min(128, config.n_positions))]
        done = subprocess.run(command, capture_output=True, encoding="utf-8")
        if done.returncode:
            raise RuntimeError(f"the {side} side of the memory row failed:\n{done.stderr[-2000:]}")
        return int(done.stdout.split()[-1]) / 2**20

    rows = []
    if has_onednn(torch.bfloat16):  # without it, the peer needs many minutes
        sides = {
            "ours": lambda run: measure("finetune", directory),
            "peer": lambda run: measure("finetune-peer", directory),
        }
        values = interleave(sides, 1)
        name = f"peak memory of finetuning {setting.medium}, bf16"
        rows = [make_row(name, "MiB", values["ours"], values["peer"], setting.command, less_is_better=True)]
    ours, peer = measure("serve", directory), None
    if found := find_version("llama-cpp-python"):
        file = make_gguf(_with_tokenizer(directory, setting), "q8_0")
        peer = [measure("serve-peer", file)]
    name, note = f"memory of serving {setting.medium}, 16 requests", f"peer: llama.cpp Q8_0, {found or 'not installed'}"
    return [*rows, make_row(name, "MiB", [ours], peer, setting.command, less_is_better=True, note=note)]


def serve(setting: Setting) -> list[Row]:
    """The served Bento compared with its own engine, and with a plain FastAPI server."""
    directory = _with_tokenizer(setting.base, setting)
    adapter = random_adapter(load_pretrained(setting.base), setting.directory / "adapter", 0)
    with ExitStack() as stack:
        engine = stack.enter_context(Side(Ours, setting.base, "auto", 16, [adapter]))
        plain = stack.enter_context(Side(PlainServer, setting.base, setting.prompts(1, 0)[0]))
        clients = stack.enter_context(Side(Clients))
        environ = {"BENTOML_HOME": str(setting.directory / "bentoml")}
        stack.enter_context(patch.dict(os.environ, environ))
        Path(environ["BENTOML_HOME"]).mkdir()
        url = stack.enter_context(
            server.serve(bento.build(directory, adapter, _lineage(directory, adapter)), engine.weights())
        )
        note = f"peer: this service's engine without HTTP; both with one adapter and weights {engine.weights()}"
        rows = []
        for n, name in ((1, "1 client"), (16, "16 clients"), (64, "64 clients")):
            sides: dict[str, Callable[[int], float]] = {
                "ours": partial(_http_rate, clients, url, setting, n),
                "engine": partial(_rate, engine, setting, n, n_adapters=1),
            }
            values = interleave(sides, setting.runs)
            rows.append(
                make_row(f"HTTP, {name}", "tokens/s", values["ours"], values["engine"], setting.command, note=note)
            )
        sides = {
            "ours": lambda run: clients.first_token(url, setting.prompts(1, run)[0], setting.n_new),
            "engine": lambda run: engine.first_tokens(setting.prompts(1, run), setting.n_new, 0.0, 1)[0],
        }
        values = interleave(sides, 3 * setting.runs)
        name, times = "HTTP, time to first token, 1 client", (values["ours"], values["engine"])
        rows.append(make_row(name, "ms", *times, setting.command, less_is_better=True, note=note))
        sides = {
            "ours": partial(_http_rate, clients, url, setting, 16),
            "peer": partial(_http_rate, clients, plain.url(), setting, 16),
        }
        values = interleave(sides, setting.runs)
        name, note = "HTTP, 16 clients, vs. FastAPI", "peer: FastAPI with generate, one request at a time"
        rows.append(make_row(name, "tokens/s", values["ours"], values["peer"], setting.command, note=note))
        # any letters and spaces: a mask is computed for each token, and no completion ends before the limit
        masked = {"guided_regex": "[A-Za-z ]{1000}"}
        sides = {
            "ours": partial(_http_rate, clients, url, setting, 16, fields=masked),
            "free": partial(_http_rate, clients, url, setting, 16),
        }
        values = interleave(sides, setting.runs)
        name, note = "HTTP, 16 clients, structured output", "peer: the same service without a structure"
        return [*rows, make_row(name, "tokens/s", values["ours"], values["free"], setting.command, note=note)]


def pipeline(setting: Setting) -> list[Row]:
    """Overhead of a cold pipeline run, and the quality of its model in other weight formats."""
    seconds, work, run = run_cold(setting.config, setting.directory / "home")
    note = f"the run's {seconds:.0f} s without the steps {', '.join(WORK)}; the limit is our target"
    row = make_row("pipeline overhead", "s", [seconds - work], None, setting.command, 60, True, note)
    rows, quality = [row], Quality(run)
    reference, expected = quality.perplexity("fp32"), quality.completions("fp32")
    for weights in supported_formats(quality.model.config, torch.device("cpu"))[1:]:  # fp32 is the reference
        note = f"compared with fp32, on the references of {len(expected)} test records; the limit is our target"
        rise = [100 * (quality.perplexity(weights) / reference - 1)]
        rows.append(
            make_row(
                f"perplexity increase, {weights}", "%", rise, None, setting.command, 1, less_is_better=True, note=note
            )
        )
        equal = [one == other for one, other in zip(quality.completions(weights), expected, strict=True)]
        share = [100 * sum(equal) / len(equal)]
        rows.append(make_row(f"same answers as fp32, {weights}", "%", share, None, setting.command, 100))
    return rows


GROUPS: dict[str, Callable[[Setting], list[Row]]] = {
    "train": train,
    "decode": decode,
    "batch": batch,
    "engines": engines,
    "adapters": adapters,
    "memory": memory,
    "serve": serve,
    "pipeline": pipeline,
}


def _first_tokens(engine: Side, setting: Setting, rate: float) -> list[Row]:
    """Measure time to first token in ms: 64 requests at once, and 64 at random times at 70 % of `rate`, in tokens/s."""
    rows = []
    interval = setting.n_new / (0.7 * rate)
    arrivals = (("at once", 0.0), ("at random times, 70 % load", interval))
    for arrival, (name, mean) in enumerate(arrivals, start=1):  # from 1, because earlier batches used the first prompts
        cuts = [
            quantiles(engine.first_tokens(setting.prompts(64, arrival * setting.runs + run), setting.n_new, mean), n=20)
            for run in range(setting.runs)
        ]
        for part, i in (("p50", 9), ("p95", 18)):
            label = f"time to first token, 64 requests {name}, {part}"
            rows.append(make_row(label, "ms", [cut[i] for cut in cuts], None, setting.command, less_is_better=True))
    return rows


def _sampled(engine: Side, setting: Setting) -> list[Row]:
    """Requests that draw their tokens, compared with greedy ones."""
    rows = []
    controls: list[dict[str, Any]] = [{}, {"top_p": 0.9}, {"top_k": 40, "top_p": 0.9}]
    for sampling in ({"temperature": 1.0} | one for one in controls):
        sides = {
            "ours": partial(_rate, engine, setting, 16, sampling=sampling),
            "greedy": partial(_rate, engine, setting, 16),
        }
        values = interleave(sides, setting.runs)
        name = "16 requests, " + ", ".join(f"{key} {value}" for key, value in sampling.items())
        note = "peer: the same engine, greedy"
        rows.append(make_row(name, "tokens/s", values["ours"], values["greedy"], setting.command, note=note))
    return rows


def _rate(
    engine: Side,
    setting: Setting,
    n: int,
    run: int,
    n_adapters: int = 0,
    sampling: Mapping[str, Any] = MappingProxyType({}),
) -> float:
    rate: float = engine.rate(setting.prompts(n, run), setting.n_new, n_adapters, dict(sampling))
    return rate


def _http_rate(
    clients: Side, url: str, setting: Setting, n: int, run: int, fields: Mapping[str, Any] = MappingProxyType({})
) -> float:
    rate: float = clients.rate(url, setting.prompts(n, run), setting.n_new, dict(fields))
    return rate


def _engine_rate(engine: Side, setting: Setting, n: int, run: int) -> float:
    rate: float = engine.rate(setting.prompts(n, run), setting.n_new)
    return rate


def _with_tokenizer(base: Path, setting: Setting) -> Path:
    """Copy the checkpoint, and add a tokenizer that has every id of its vocabulary."""
    directory = base.with_name(f"{base.name}-with-tokenizer")
    copytree(base, directory)
    copytree(setting.directory / "tokenizer", directory, dirs_exist_ok=True)
    widen_tokenizer(directory, load_pretrained(directory, mapped=True).config.vocab_size)
    return directory


def _peer_rate(peer: Side, setting: Setting, n: int, batch_size: int, run: int) -> float:
    rate: float = peer.rate(setting.prompts(n, run), setting.n_new, batch_size)
    return rate


def _lineage(base: Path, adapter: Path) -> Lineage:
    """Return a lineage for a Bento that no pipeline run built."""
    scores = Scores(0.0, 0.0, 0.0, 1.0, 0.0)
    return Lineage(
        run=RunRef("benchmark", "benchmark"),
        model_version="gpt2-instruct/0",
        commit=Commit("unknown", False),
        versions={},
        data={},
        base=BaseRef("benchmark", "", directory_sha256(base, checkpoint_files(base))),
        adapter=bento.describe_adapter(adapter),
        metrics=LineageMetrics(scores, scores, TrainSummary(0.0, None, 0.0, 0.0)),
    )
