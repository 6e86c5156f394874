"""`make gpu-check`: correctness and throughput on a GPU, in stages ordered by importance.

Runs on a machine with torch, transformers, peft, tiktoken, safetensors and pytest, without a network and without this
project's environment. Each stage is a process of its own with a time limit, and its result is written as soon as it
ends. A stage that exceeds its limit keeps the figures recorded until then.
"""

import argparse
import json
import logging
import os
import re
import shlex
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.measure import versions
from benchmarks.models import random_adapter, random_model, training_flop
from benchmarks.peer import Decoder, Trainer
from benchmarks.sides import Ours
from gpt2core.batching import Batch, pack
from gpt2core.checkpoint import load_pretrained, save_pretrained
from gpt2core.config import GPT2Config, LoraConfig, TrainConfig
from gpt2core.data import Example, encode_records, read_records, split_records
from gpt2core.demo.base import make_tokenizer
from gpt2core.demo.records import write_records
from gpt2core.demo.world import make_world
from gpt2core.files import atomic_write
from gpt2core.kernels import capture_graph, has_varlen_attention
from gpt2core.lora import add_lora
from gpt2core.losses import batch_losses
from gpt2core.model import GPT2
from gpt2core.step_graphs import StepGraphs
from gpt2core.tokenizer import load_tokenizer
from gpt2core.train import TrainResult, finetune

ROOT = Path(__file__).resolve().parent.parent
# public instruction records and GPT-2's tokenizer, in the checkout or next to it
SHARED = next((d for d in (ROOT / "shared/data", ROOT.parent / "shared/data") if d.is_dir()), ROOT)
TOTAL_SECONDS = 470  # time limit of all stages together
TAIL = 3000  # characters of a stage's output that are kept if it fails
# Part of a device's name -> dense bf16 throughput in FLOP/s, from NVIDIA's data sheets; the first match counts
PEAKS = {"H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "H200": 989e12, "GH200": 989e12, "B200": 2250e12}
PEAKS |= {"A100": 312e12, "L40S": 362e12, "L4": 121e12, "A10": 125e12, "T4": 65e12}


@dataclass(frozen=True)
class Sizes:
    """The sizes to measure: full sizes on a GPU, the smallest sizes for a dry run on a CPU."""

    train: tuple[str, ...] = ("gpt2-medium", "gpt2")  # the first preset is that of mariovas3/llms, and has a peer
    decode: str = "gpt2"
    n_records: int | None = None  # None: all of the training split
    epochs: int = 48
    batch_size: int = 128
    peer_steps: int = 6
    n_requests: tuple[int, ...] = (1, 16, 64, 256)
    n_new: int = 128
    n_adapters: int = 8


DRY_RUN = Sizes(("gpt2-nano",), "gpt2-nano", 12, 2, 4, 1, (1, 4), 4, 2)


class Stage:
    """A stage in its child process: sizes, scratch directory, and recorded figures."""

    def __init__(self, device: str, scratch: Path, file: Path) -> None:
        self.device, self.scratch, self._file = device, scratch, file
        self.sizes = Sizes() if device == "cuda" else DRY_RUN
        self.failed = False
        self._figures: dict[str, Any] = {}

    def record(self, **figures: Any) -> None:
        """Add figures, and write them immediately, so that they are not lost at the time limit."""
        self._figures |= figures
        atomic_write(self._file, json.dumps(self._figures).encode())

    @contextmanager
    def attempt(self, name: str, required: bool = True) -> Iterator[None]:
        """Record an error under `name` and continue with the other measurements.

        The stage then fails at its end if this was `required`, except after out of memory, which is a result.
        """
        try:
            yield
        except Exception as error:
            traceback.print_exc()
            self.record(**{f"{name}.error": " ".join(str(error).split())[:200] or type(error).__name__})
            self.failed |= required and not _is_out_of_memory(error)
        if self.device == "cuda":
            torch.cuda.empty_cache()

    def base(self, preset: str, make: Callable[[GPT2Config], GPT2] = random_model) -> Path:
        """Return the directory of a checkpoint with random weights."""
        directory = self.scratch / f"{preset}-{make.__name__}"
        if not directory.is_dir():
            save_pretrained(make(GPT2Config.preset(preset)), directory)
        return directory

    def examples(self, preset: str) -> list[Example]:
        """Return the training split of the public instruction records, or of the demo's if those are missing."""
        config, file = (
            GPT2Config.preset(preset),
            Path(os.environ.get("INSTRUCTION_DATA", SHARED / "instruction-data.json")),
        )
        public = file.is_file() and config.vocab_size >= GPT2Config().vocab_size
        tokenizer = _gpt2_tokenizer() if public else None
        has_tokenizer = tokenizer is not None
        # the demo's tokenizer is trained on the demo's texts, so it only splits these records into more tokens
        tokenizer = tokenizer or make_tokenizer("gpt2-nano", 0, 18, self.scratch / "tokenizer")
        records = read_records(file) if public else write_records(make_world(0), 0)
        train = split_records(records, seed=0).train[: self.sizes.n_records]
        examples = [
            Example(one.input_ids[: config.n_positions], one.prompt_length)
            for one in encode_records(train, tokenizer, 10**6)
            if one.prompt_length < config.n_positions - 8
        ]
        n_tokens = sum(len(example.input_ids) - 1 for example in examples)
        data = {"records": len(examples), "tokens": n_tokens, "public": public, "gpt2_tokenizer": has_tokenizer}
        self.record(data=data)
        return examples

    def synchronize(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()


class RecordWarnings(logging.Handler):
    """Records the warnings of a stage, such as why it continued without graphs or kernels, and prints them."""

    def __init__(self, stage: Stage) -> None:
        super().__init__(logging.WARNING)
        self._stage, self._found = stage, list[str]()

    def emit(self, record: logging.LogRecord) -> None:
        self._found.append(f"{record.name}: {record.getMessage()}"[:300])
        print(self._found[-1], file=sys.stderr)
        self._stage.record(warnings=self._found[:20])


def _gpt2_tokenizer() -> Any:
    """Load GPT-2's tokenizer; None if its files are missing. The environment may name another directory."""
    if (files := SHARED / "tiktoken").is_dir():
        os.environ["TIKTOKEN_CACHE_DIR"] = str(files)
    try:
        return load_tokenizer("gpt2")
    except OSError:  # the files are not cached, and there is no network
        return None


def trainable_model(config: GPT2Config) -> GPT2:
    """Create a model with GPT-2's initialization, so that the loss falls."""
    return GPT2(config, torch.Generator().manual_seed(0))


def training(stage: Stage) -> None:
    """The run of mariovas3/llms (gpt2-medium, 48 epochs, batches of 128, bf16), compared with transformers and PEFT."""
    stage.record(variable_length_attention=has_varlen_attention(torch.device(stage.device), 64))
    n_graphs, capture = 0, StepGraphs._capture

    def counted(graphs: StepGraphs, batch: Batch) -> Any:
        nonlocal n_graphs
        found = capture(graphs, batch)
        n_graphs += 1
        return found

    StepGraphs._capture = counted  # type: ignore[assignment, method-assign]
    for preset in stage.sizes.train:
        with stage.attempt(preset):
            _train(stage, preset)
    stage.record(graphs=n_graphs)
    first = stage.sizes.train[0]
    with stage.attempt(f"{first}.peer"):
        _train_peer(stage, first)


def _train(stage: Stage, preset: str) -> None:
    sizes, examples = stage.sizes, stage.examples(preset)
    base = stage.base(preset, trainable_model)
    model = add_lora(load_pretrained(base, device=stage.device), LoraConfig(rank=8), seed=0)

    def train(n_epochs: int, batch_size: int) -> tuple[float, TrainResult]:
        config = TrainConfig(
            epochs=n_epochs,
            batch_size=batch_size,
            gradient_accumulation_steps=sizes.batch_size // batch_size,
            precision="bf16-mixed",
            learning_rate=3e-4,
            warmup_steps=0,
        )
        return _timed(stage, lambda: finetune(model, examples, [], config))

    batch_size, (warm_up, _) = _largest(sizes.batch_size, lambda n: train(1, n))
    epoch, _ = train(1, batch_size)
    epochs = max(1, min(sizes.epochs, int(60 / epoch)))
    if stage.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds, result = train(epochs, batch_size)
    flop = training_flop(model, examples, batch_size) * epochs
    figures = {
        "epochs": epochs,
        "batch_size": batch_size,
        "seconds": seconds,
        "seconds_of_all_epochs": seconds * sizes.epochs / epochs,
        "warm_up_seconds": warm_up,
        "tokens_per_second": epochs * sum(len(example.input_ids) - 1 for example in examples) / seconds,
        # without the first two batches of each shape, which are computed without a graph and captured
        "steady_tokens_per_second": median(entry["train/tokens_per_second"] for entry in result.history),
        "flop_per_second": flop / seconds,
        "final_loss": result.history[-1]["train/loss"],
    }
    if stage.device == "cuda":
        figures["peak_mib"] = torch.cuda.max_memory_allocated() / 2**20
        if peak := _peak(torch.cuda.get_device_name()):
            figures["mfu"] = figures["flop_per_second"] / peak
    stage.record(**{f"{preset}.{name}": value for name, value in figures.items()})


def _train_peer(stage: Stage, preset: str) -> None:
    sizes = stage.sizes
    trainer = Trainer(stage.base(preset, trainable_model), torch.bfloat16, device=stage.device)
    data = sorted(stage.examples(preset), key=lambda example: len(example.input_ids))  # least padding
    data = data[-sizes.peer_steps * sizes.batch_size :]
    # the longest records, which need most memory
    batch_size, _ = _largest(sizes.batch_size, lambda n: trainer.train(data[-n:], n))
    trainer.train(data, batch_size)  # warm-up, because memory is allocated for each new length
    rate = trainer.train(data, batch_size)
    figures = {"tokens_per_second": rate, "steps": sizes.peer_steps, "batch_size": batch_size}
    stage.record(**{f"{preset}.peer.{name}": value for name, value in figures.items()})


def decoding(stage: Stage) -> None:
    """Concurrent requests in one engine, greedy and sampled, compared with `generate` of transformers, greedy."""
    sizes, base, prompts = stage.sizes, stage.base(stage.sizes.decode), _prompts(stage)
    largest, engine = _largest(max(sizes.n_requests), lambda n: Ours(base, "bf16", n))
    stage.record(max_batch=largest)
    for n in sizes.n_requests:
        with stage.attempt(f"requests_{n}"):
            warm_up, _ = _timed(stage, engine.rate, prompts(n, 0), sizes.n_new)  # captures graphs
            rates = [engine.rate(prompts(n, run), sizes.n_new) for run in (1, 2)]
            steady = engine.decoding_rate(prompts(n, 3), sizes.n_new)
            figures = {"tokens_per_second": max(rates), "after_first_tokens_per_second": steady}
            figures["warm_up_seconds"] = warm_up
            stage.record(**{f"requests_{n}.{name}": value for name, value in figures.items()})
    with stage.attempt("sampled"):
        n = max(sizes.n_requests)
        rates = [
            engine.rate(prompts(n, run), sizes.n_new, sampling={"temperature": 0.8, "top_p": 0.9}) for run in (1, 2)
        ]
        stage.record(**{f"requests_{n}.sampled_tokens_per_second": max(rates)})
    with stage.attempt("first_token"):
        stage.record(first_token_ms=min(engine.first_tokens(prompts(1, 4), 2) for _ in range(3))[0])
    _record_graphs(stage, engine)
    engine.close()
    del engine
    with stage.attempt("peer"):
        # one prompt takes the same time in both dtypes, because the host limits it
        peer = Decoder(base, prompts(max(sizes.n_requests), 0), stage.device)
        stage.record(**{"peer.dtype": peer.dtype})
        for n in sizes.n_requests:
            with stage.attempt(f"requests_{n}.peer"):
                peer.decode(prompts(n, 0), sizes.n_new)  # warm-up, because memory is allocated for each new length
                stage.record(**{f"requests_{n}.peer.tokens_per_second": peer.rate(prompts(n, 1), sizes.n_new, n)})


def _record_graphs(stage: Stage, engine: Ours) -> None:
    """Record which of the optional fast paths were used, and peak memory."""
    decoder = engine.engine._runner._decoder
    stage.record(uses_graphs=decoder is not None and decoder.uses_graphs)
    stage.record(uses_kernels=engine.engine._model._kernels is not None)
    stage.record(variable_length_attention=engine.engine._runner._use_varlen)
    if stage.device == "cuda":
        stage.record(
            graphs=len(decoder._graphs) if decoder is not None else 0,
            peak_mib=torch.cuda.max_memory_allocated() / 2**20,
            reserved_mib=torch.cuda.max_memory_reserved() / 2**20,
        )


def adapters(stage: Stage) -> None:
    """Requests that use eight adapters in turn, compared with requests without an adapter, in the same engine."""
    sizes, base, prompts = stage.sizes, stage.base(stage.sizes.decode), _prompts(stage)
    model = load_pretrained(base)
    directories = [random_adapter(model, stage.scratch / f"adapter-{i}", i) for i in range(sizes.n_adapters)]
    engine = Ours(base, "bf16", max(sizes.n_requests), directories)
    for n in sizes.n_requests[1:3]:
        for n_adapters in (0, 1, sizes.n_adapters):
            with stage.attempt(f"requests_{n}.adapters_{n_adapters}"):
                engine.rate(prompts(n, 0), sizes.n_new, n_adapters)
                rates = [engine.rate(prompts(n, run), sizes.n_new, n_adapters) for run in (1, 2)]
                stage.record(**{f"requests_{n}.adapters_{n_adapters}.tokens_per_second": max(rates)})
    _record_graphs(stage, engine)
    engine.close()


def profiling(stage: Stage) -> None:
    """Measure the time per kernel in training and decoding."""
    sizes, preset = stage.sizes, stage.sizes.train[0]
    with stage.attempt("training"):
        base, examples = stage.base(preset, trainable_model), stage.examples(preset)
        model = add_lora(load_pretrained(base, device=stage.device), LoraConfig(rank=8), seed=0)
        config = TrainConfig(batch_size=sizes.batch_size, precision="bf16-mixed", learning_rate=3e-4, max_steps=40)
        stage.record(training=_profile(stage, lambda: finetune(model, examples, [], config)))
    prompts, engine = _prompts(stage), Ours(stage.base(sizes.decode), "bf16", max(sizes.n_requests))
    for n in (1, max(sizes.n_requests)):
        with stage.attempt(f"decoding_{n}"):
            stage.record(**{f"decoding_{n}": _profile(stage, partial(engine.rate, prompts(n, 0), 32))})
    engine.close()


def launches(stage: Stage) -> None:
    """Measure whether kernel launches limit a training step: forward and backward of a batch, with and without them.

    A CUDA graph launches all kernels at once, and compiling the blocks makes fewer of them. All times are measured
    before the first profile: CUDA stays instrumented after one, and launches take longer.
    """
    timed = dict[str, tuple[Callable[[], object], float]]()  # name -> the step and its milliseconds
    for preset in stage.sizes.train:
        with stage.attempt(preset):
            model, step, n_tokens = _training_step(stage, preset)
            stage.record(**{f"{preset}.tokens": n_tokens})
            timed[f"{preset}.eager"] = step, _record_times(stage, f"{preset}.eager", step)
            if stage.device == "cuda":
                with stage.attempt(f"{preset}.graph", required=False):
                    _record_times(stage, f"{preset}.graph", _graph_of(step, model))
                model.zero_grad()  # the gradients' memory belongs to the graph
    preset = stage.sizes.train[-1]  # the smallest, since compiling takes half a minute or more
    with stage.attempt(f"{preset}.compiled", required=False):  # needs Triton and a C compiler
        model, step, _ = _training_step(stage, preset)
        for block in model.h:
            block.compile(backend="inductor" if stage.device == "cuda" else "aot_eager", dynamic=True)
        timed[f"{preset}.compiled"] = step, _record_times(stage, f"{preset}.compiled", step)
    for name, (step, step_ms) in timed.items():
        with stage.attempt(f"{name}.profile"):
            found = _profile(stage, step)
            busy_ms = 1e3 * found["busy_share"] * found["seconds"]
            figures = {"kernels": found["calls"], "busy_ms": busy_ms, "busy_share": busy_ms / step_ms}
            stage.record(**{f"{name}.{key}": value for key, value in figures.items()})


def _training_step(stage: Stage, preset: str) -> tuple[GPT2, Callable[[], object], int]:
    """Return a model, a function that computes forward and backward of one batch, and the batch's number of tokens."""
    device, config = torch.device(stage.device), GPT2Config.preset(preset)
    model = add_lora(load_pretrained(stage.base(preset, trainable_model), device=device), LoraConfig(rank=8), seed=0)
    for weight in model.train().parameters():  # as precision="bf16-mixed" does
        weight.data = weight.data.to(torch.float32 if weight.requires_grad else torch.bfloat16)
    use_varlen = has_varlen_attention(device, config.head_width)
    batch = pack(stage.examples(preset)[: stage.sizes.batch_size], "response", device, use_varlen=use_varlen)
    return model, lambda: batch_losses(model, batch).sum().backward(), batch.input_ids.numel()


def _record_times(stage: Stage, name: str, step: Callable[[], object]) -> float:
    """Record the times of a step; return its milliseconds."""
    first, _ = _timed(stage, step)
    step()
    n_steps = 20 if stage.device == "cuda" else 2
    seconds, _ = _timed(stage, lambda: [step() for _ in range(n_steps)])
    host_seconds = min(_launch_seconds(stage, step) for _ in range(5 if stage.device == "cuda" else 1))
    figures = {"first_ms": 1e3 * first, "step_ms": 1e3 * seconds / n_steps, "host_ms": 1e3 * host_seconds}
    stage.record(**{f"{name}.{key}": value for key, value in figures.items()})
    return figures["step_ms"]


def _launch_seconds(stage: Stage, step: Callable[[], object]) -> float:
    """Measure the host's time to launch one step. With many steps, the host would wait for a slower GPU's queue."""
    stage.synchronize()
    start = perf_counter()
    step()
    return perf_counter() - start


def _graph_of(step: Callable[[], object], model: GPT2) -> Callable[[], None]:
    """Return a function that repeats the step as a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # first calls of libraries allocate memory outside of the graph
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    model.zero_grad()  # so that the gradients are in the graph's memory
    graph, _ = capture_graph(step, model.wte.weight.device)
    return graph.replay


STAGES: dict[str, tuple[float, Callable[[Stage], None] | None]] = {  # name -> (time limit in seconds, function)
    "tests": (150, None),  # pytest
    "training": (150, training),
    "decoding": (110, decoding),
    "adapters": (60, adapters),
    "profile": (60, profiling),
    "launches": (90, launches),
}


def _largest(n: int, work: Callable[[int], Any]) -> tuple[int, Any]:
    """Return the largest of n, n / 2, ... for which `work` has enough memory, and its result."""
    while True:
        try:
            return n, work(n)
        except Exception as error:
            if n == 1 or not _is_out_of_memory(error):
                raise
        n //= 2
        torch.cuda.empty_cache()


def _is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "out of memory" in str(error)


def _timed(stage: Stage, work: Callable[..., Any], *arguments: Any) -> tuple[float, Any]:
    stage.synchronize()
    start = perf_counter()
    result = work(*arguments)
    stage.synchronize()
    return perf_counter() - start, result


def _peak(name: str) -> float | None:
    return next((value for part, value in PEAKS.items() if re.search(rf"\b{part}\b", name)), None)


def _prompts(stage: Stage) -> Callable[[int, int], list[list[int]]]:
    """Return a function (n, run) -> n prompts, which differ between runs."""
    examples = stage.examples(stage.sizes.decode)
    all_prompts = [list(example.input_ids[: example.prompt_length]) for example in examples]
    return lambda n, run: [all_prompts[(run * n + i) % len(all_prompts)] for i in range(n)]


def _profile(stage: Stage, work: Callable[[], object]) -> dict[str, Any]:
    """Profile a call, after a call without the profiler; return the most expensive kernels (on a CPU: operators)."""
    work()
    on_gpu = stage.device == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * on_gpu]) as profiler:
        seconds, _ = _timed(stage, work)
    kind = DeviceType.CUDA if on_gpu else DeviceType.CPU
    # ignore annotations, such as the optimizer's step, whose time includes their kernels
    events = [e for e in profiler.key_averages() if e.device_type == kind and not e.is_user_annotation]
    spent = [event.self_device_time_total if on_gpu else event.self_cpu_time_total for event in events]  # microseconds
    top = sorted(zip(spent, events, strict=True), key=lambda pair: -pair[0])[:15]
    return {
        "seconds": seconds,
        "busy_share": sum(spent) / 1e6 / seconds,
        "calls": sum(event.count for event in events),
        "top": [{"kernel": e.key[:100], "ms": us / 1e3, "calls": e.count, "share": us / sum(spent)} for us, e in top],
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="make gpu-check", description=__doc__)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"], help="cpu: a dry run at the smallest size")
    parser.add_argument("--only", default=",".join(STAGES), help=f"stages, of {','.join(STAGES)}")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/gpu.json; of a dry run outputs/gpu.json")
    parser.add_argument("--stage", choices=list(STAGES), help=argparse.SUPPRESS)  # run it in this process
    parser.add_argument("--scratch", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.exit(2, f"torch {torch.__version__} finds no CUDA device; DEVICE=cpu is a dry run without one\n")
    if unknown := set(options.only.split(",")) - set(STAGES):
        parser.error(f"unknown stage {', '.join(sorted(unknown))}; choose from {', '.join(STAGES)}")
    if options.stage:
        function = STAGES[options.stage][1]
        assert function is not None
        stage = Stage(options.device, options.scratch, options.scratch / f"{options.stage}.json")
        logging.getLogger("gpt2core").addHandler(RecordWarnings(stage))
        function(stage)
        sys.exit(stage.failed)
    out = options.out or ROOT / ("benchmarks/results" if options.device == "cuda" else "outputs") / "gpu.json"
    sys.exit(_run_stages(options.device, options.only.split(","), out))


def _run_stages(device: str, names: Sequence[str], out: Path) -> int:
    """Run the stages; return 0 if all of them succeed."""
    out.parent.mkdir(parents=True, exist_ok=True)
    start = perf_counter()
    factor = 1 if device == "cuda" else 3  # a dry run may share its processor, and measures nothing
    result: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", "-m", "benchmarks.gpu", *sys.argv[1:]]),
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "versions": versions() | {"cuda": torch.version.cuda},
        "stages": [],
    }
    with TemporaryDirectory() as scratch:
        for name in [name for name in STAGES if name in names]:
            left = factor * TOTAL_SECONDS - (perf_counter() - start)
            entry: dict[str, Any] = (
                _run_stage(name, device, Path(scratch), min(left, factor * STAGES[name][0]))
                if left > 15
                else {"stage": name, "status": "skipped", "seconds": 0.0, "error": "no time is left"}
            )
            result["stages"].append(entry)
            atomic_write(out, (json.dumps(result, indent=2) + "\n").encode())
            print(f"{name}: {entry['status']}, {entry['seconds']:.0f} s", flush=True)
            figures: dict[str, Any] = entry.get("figures", {})
            for key, value in figures.items():
                if isinstance(value, str | bool):
                    print(f"  {key}: {value}")
                elif isinstance(value, int | float):
                    print(f"  {key}: {value:,.4g}" if value < 100 else f"  {key}: {value:,.0f}")
            for message in figures.get("warnings", []):
                print(f"  warning: {message}")
            if "error" in entry:
                print(entry["error"])
    print(f"written to {out}")
    return 0 if all(entry["status"] == "ok" for entry in result["stages"]) else 1


def _run_stage(name: str, device: str, scratch: Path, limit: float) -> dict[str, Any]:
    """Run a stage in its own process; return its entry of the results."""
    command = [sys.executable, "-m", "benchmarks.gpu", "--device", device, "--stage", name, "--scratch", str(scratch)]
    if name == "tests":
        command = [sys.executable, "-m", "pytest", "-m", "gpu", "-v", "--tb=short"]
        command += [f"tests/gpt2core/test_{name}.py" for name in ("gpu", "cuda")]
        command += ["-p", "no:cacheprovider", "-W", "ignore"]
    environment = os.environ | {"GPU_CHECK_DEVICE": device, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    environment["PYTHONUNBUFFERED"] = "1"  # so that the log of a killed process is complete
    log, start = scratch / f"{name}.log", perf_counter()
    with log.open("w", encoding="utf-8") as output:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            status = "ok" if process.wait(limit) == 0 else "failed"
        except subprocess.TimeoutExpired:
            status = "timeout"
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    entry: dict[str, Any] = {"stage": name, "status": status, "seconds": round(perf_counter() - start, 1)}
    text, figures = log.read_text(encoding="utf-8", errors="replace"), scratch / f"{name}.json"
    if name == "tests":
        outcomes = dict(re.findall(r"^\S+::(\S+) (PASSED|FAILED|ERROR|SKIPPED)", text, re.MULTILINE))
        counts = {
            kind.lower(): list(outcomes.values()).count(kind) for kind in ("PASSED", "FAILED", "ERROR", "SKIPPED")
        }
        bad = sorted(test for test, outcome in outcomes.items() if outcome in ("FAILED", "ERROR"))
        entry["figures"] = counts | {"failed_tests": bad}
        if status == "ok" and not counts["passed"]:
            entry["status"] = "skipped"
    elif figures.is_file():
        entry["figures"] = json.loads(figures.read_text(encoding="utf-8"))
    if status != "ok":
        entry["error"] = text[-TAIL:]
    return entry


if __name__ == "__main__":
    main()
