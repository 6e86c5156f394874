"""Pretraining on a text of one's own, and the use of the result as a base."""

import functools
import hashlib
import json
import logging
import math
import shlex
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from click.testing import CliRunner
from transformers import AutoModelForCausalLM

from gpt2core.checkpoint import read_config
from gpt2core.demo.prose import write_prose
from gpt2core.demo.world import make_world
from run import main
from tests.runs import newest_run

TINY = ("pretrain.max_steps=3", "pretrain.batch_size=1", "model.n_layer=1", "text.prompts=[The capital]")
TEXT = "\n".join(write_prose(make_world(0, 24), 0))


@pytest.fixture
def invoke(tmp_path, monkeypatch):
    monkeypatch.setenv("GPT2_INSTRUCT_OUTPUTS", str(tmp_path / "my outputs"))

    def run(command, *values, config):
        arguments = [command, "--config", config, *(part for value in values for part in ("--set", value))]
        return CliRunner().invoke(main, arguments, catch_exceptions=False)

    return run


@pytest.fixture
def text_url(tmp_path):
    """A URL with a text, and its sha256."""
    (tmp_path / "text.txt").write_text(TEXT)
    handler = functools.partial(SimpleHTTPRequestHandler, directory=tmp_path)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever).start()
        yield f"http://127.0.0.1:{server.server_port}/text.txt", hashlib.sha256(TEXT.encode()).hexdigest()
        server.shutdown()


def pretrain(invoke, outputs: Path, *values: str) -> Path:
    """Pretrain and return the directory of the results, which the printed options to finetune the base name."""
    result = invoke("pretrain", *TINY, *values, config="configs/pretrain.yaml")
    assert result.exit_code == 0, result.output
    directory = outputs / newest_run().name
    options = shlex.split(result.stdout.splitlines()[-1])[-4:]
    assert options == ["--set", "base.source=hub", "--set", f"base.name={directory / 'base'}"]
    return directory


@pytest.mark.slow
def test_a_base_from_a_url_is_evaluated_and_finetuned(invoke, text_url, tmp_path):
    url, sha256 = text_url
    directory = pretrain(invoke, tmp_path / "my outputs", "text.source=url", f"text.url={url}", f"text.sha256={sha256}")
    metrics = json.loads((directory / "metrics.json").read_text())
    assert metrics["perplexity"] == pytest.approx(math.exp(metrics["val_loss"]))
    assert metrics["train"]["peak_memory_mib"] > 0
    assert (directory / "samples.txt").read_text().startswith("The capital")
    assert AutoModelForCausalLM.from_pretrained(directory / "base").config.n_layer == 1
    assert not (tmp_path / "my outputs" / "latest").exists()

    (tmp_path / "tiny.yaml").write_text("parameters: {sweep: {variants: {x: {}}, seeds: [0]}}")
    base = (f"base={{source: hub, name: {directory / 'base'}}}", "data={n_facts: 18, val_fraction: 0.2}")
    train = ("train={max_steps: 1, batch_size: 4, learning_rate: 1e-3}", "generation.max_new_tokens=1")
    result = invoke("sweep", *base, *train, config=str(tmp_path / "tiny.yaml"))
    assert result.exit_code == 0, result.output


def test_the_scores_on_the_held_out_text_are_logged(invoke, tmp_path, caplog):
    (tmp_path / "text.txt").write_text(TEXT)
    values = ("text.source=file", f"text.path={tmp_path / 'text.txt'}")
    caplog.set_level("INFO", "steps.export_base")
    logging.getLogger("steps.export_base").addHandler(caplog.handler)  # ZenML replaces the root logger's
    directory = pretrain(invoke, tmp_path / "my outputs", *values)
    metrics = json.loads((directory / "metrics.json").read_text())
    scores = f"held-out text: loss {metrics['val_loss']:.4g} nats per token, perplexity {metrics['perplexity']:.4g}"
    assert scores in caplog.messages
    assert f"results: {directory}" in caplog.messages


def test_a_post_norm_base_from_a_file_is_evaluated_but_refused_by_finetune(invoke, tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    values = ("text.source=file", f"text.path={tmp_path / 'text.txt'}", "model.norm_position=post")
    base = pretrain(invoke, tmp_path / "my outputs", *values) / "base"
    assert read_config(base / "config.json").norm_position == "post"
    result = invoke("finetune", "base.source=hub", f"base.name={base}", config="configs/dev.yaml")
    assert result.exit_code == 1
    assert f"{base} has norm_position 'post', which the service cannot decode" in result.output


@pytest.mark.parametrize(
    ("content", "values", "message"),
    [
        (b"", (), "text.txt has no text"),
        (b"caf\xe9", (), "text.txt"),
        (b"short", (), "too few for a step of 8 sequences of 128; use a longer text, or a lower model.n_positions"),
        (b"long enough", ("text.max_bytes=3",), "has 11 bytes, more than text.max_bytes=3"),
        (b"", ("text.url=http://x",), "empty unless text.source is url"),
        (b"", ("model.n_head=7",), "n_embd=128 is not divisible by n_head=7"),
        (b"", ("model.preset=gpt3",), "gpt3"),
        (b"", ("pretrain.seed=1",), "derived from parameters.seed"),
    ],
)
def test_a_mistake_is_one_line(content, values, message, invoke, tmp_path):
    (tmp_path / "text.txt").write_bytes(content)
    own = ("text.source=file", f"text.path={tmp_path / 'text.txt'}", *values)
    result = invoke("pretrain", *own, config="configs/pretrain.yaml")
    assert result.exit_code == 1
    [line] = [line for line in result.output.splitlines() if line.startswith("Error: ")]
    assert message in line
