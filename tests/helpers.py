"""Helpers for the tests of several packages."""

import socket
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import requests
import torch
from torch import nn

from gpt2core.files import checkpoint_files, directory_sha256
from gpt2core.lora import lora_layers
from gpt2core.metrics import RecordScores, Scores
from gpt2core.model import GPT2
from gpt2core.types import (
    AdapterRef,
    Answer,
    BaseRef,
    Commit,
    Lineage,
    LineageMetrics,
    RunRef,
    Sample,
    TrainSummary,
)


def make_lineage(run: str = "run-17", **changes: object) -> Lineage:
    """Return a complete lineage. `changes` replace its fields."""
    scores = Scores(exact_match=0.5, token_f1=0.5, rouge_l=0.5, perplexity=2.0, finished=1.0)
    fields = {
        "run": RunRef(id=run, name=run),
        "model_version": "gpt2-instruct/3",
        "commit": Commit(sha="c" * 40, dirty=False),
        "versions": {"torch": "2.13.0"},
        "data": {"train": "1" * 64, "val": "2" * 64, "test": "3" * 64},
        "base": BaseRef(name="gpt2-nano", revision="", sha256="b" * 64),
        "adapter": AdapterRef(sha256="a" * 64, rank=4, alpha=16.0, targets=["q", "v"], dropout=0.0),
        "metrics": LineageMetrics(scores, scores, TrainSummary(1.0, 1.0, 100.0, 50.0)),
    }
    return Lineage(**{**fields, **changes})  # type: ignore[arg-type]


def build_bento(base_dir: Path, adapter_dir: Path, run: str = "run-17") -> str:
    """Build a Bento whose lineage has the digests of these directories; return its tag."""
    from deploy import bento  # imported here because the tests of gpt2core run without bentoml

    base = BaseRef(name="gpt2-nano", revision="", sha256=directory_sha256(base_dir, checkpoint_files(base_dir)))
    lineage = make_lineage(run, base=base, adapter=bento.describe_adapter(adapter_dir))
    return bento.build(base_dir, adapter_dir, lineage, readme="# a model card\n")


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def wait_until(condition: Callable[[], object], seconds: float, what: str) -> None:
    """Poll until the condition holds. Raise AssertionError with the description `what` after this number of seconds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"{what} did not happen within {seconds:.0f} s"
        time.sleep(0.05)


def is_ready(url: str) -> bool:
    """Whether a service responds to /readyz with a status below 400."""
    try:
        return requests.get(f"{url}/readyz", timeout=5).ok
    except requests.RequestException:
        return False


def make_sample(instruction: str, input: str = "", output: str = "", *, base: str = "", tuned: str) -> Sample:
    """A sample of two answers, each right if it is the output."""

    def answer(text: str) -> Answer:
        right = float(text == output)
        return Answer(text, True, RecordScores(right, right, right, nll=0.0))

    return Sample(instruction, input, output, answer(base), answer(tuned))


def flip_bit(file: Path) -> None:
    """Change one bit in the middle of the file."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def snapshot(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return a copy of the model's state dict."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same_state(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> bool:
    """Whether two state dicts have the same names, dtypes and values."""
    return one.keys() == other.keys() and all(
        torch.equal(one[name], other[name]) and one[name].dtype == other[name].dtype for name in one
    )


def randomize_lora(model: GPT2, std: float = 0.3) -> GPT2:
    """Give the LoRA weights random values, in place, because lora_B is initialized with zeros."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for _, layer in lora_layers(model):
            layer.lora_A.normal_(0, std, generator=generator)
            layer.lora_B.normal_(0, std, generator=generator)
            if layer.config.dora:
                layer.lora_magnitude.mul_(1 + torch.rand(layer.lora_magnitude.shape, generator=generator))
    return model
