"""Two real processes that share each batch over gloo, compared with one process."""

import json
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from gpt2core.checkpoint import load_adapter, load_pretrained
from gpt2core.config import LoraConfig, TrainConfig
from gpt2core.data import Example
from gpt2core.distributed import finetune_adapter
from gpt2core.files import checkpoint_files, directory_sha256
from gpt2core.lora import lora_layers
from gpt2core.records import read_records

LORA = LoraConfig(rank=3)


def examples(n: int) -> list[Example]:
    generator = torch.Generator().manual_seed(0)
    rests = [torch.randint(97, (4 + i % 9,), generator=generator).tolist() for i in range(n)]
    return [Example([7, 8, 9, *rest], 3 + len(rest) // 2) for rest in rests]


def adapter(model) -> dict[str, torch.Tensor]:
    return {
        f"{name}.{part}": getattr(layer, part) for name, layer in lora_layers(model) for part in ("lora_A", "lora_B")
    }


def curve(result, key: str) -> list[float]:
    return [entry[key] for entry in result.history if key in entry]


@pytest.fixture(scope="module")
def config():
    # 13 records in batches of 4: the last batch has one record, so one process has none of it
    return TrainConfig(epochs=3, batch_size=4, learning_rate=1e-2, warmup_steps=1, log_every_steps=1)


@pytest.fixture(scope="module")
def alone(tiny_gpt2_dir, config):
    return finetune_adapter(tiny_gpt2_dir, LORA, examples(13), examples(5), config)


def test_two_processes_train_like_one_and_lose_no_record(tiny_gpt2_dir, config, alone, tmp_path):
    logged: list[int] = []
    model, result = finetune_adapter(
        tiny_gpt2_dir,
        LORA,
        examples(13),
        examples(5),
        replace(config, devices=2),
        lambda step, values: logged.append(step),
        tmp_path,
    )
    for key in ("train/loss", "val/loss", "train/grad_norm"):
        assert curve(result, key) == pytest.approx(curve(alone[1], key), rel=1e-4)
    assert curve(result, "train/tokens_seen") == curve(alone[1], "train/tokens_seen")
    ours, theirs = adapter(model), adapter(alone[0])
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-3, atol=1e-5)
    assert set(logged) == set(range(1, 13))
    assert not torch.distributed.is_initialized()

    # one process continues from the checkpoint of two
    longer = replace(config, epochs=4)
    resumed = finetune_adapter(tiny_gpt2_dir, LORA, examples(13), examples(5), longer, checkpoint_dir=tmp_path)[1]
    assert curve(resumed, "train/loss")[:12] == curve(result, "train/loss")
    assert len(curve(resumed, "train/loss")) == 16


def test_a_failing_process_raises_here_and_leaves_no_process_behind(tiny_gpt2_dir, config):
    with pytest.raises((RuntimeError, FloatingPointError)):
        finetune_adapter(tiny_gpt2_dir, LORA, examples(4), [], replace(config, devices=2, learning_rate=1e30))
    assert not torch.distributed.is_initialized()
    assert torch.multiprocessing.active_children() == []


def test_the_error_names_the_signal_that_killed_a_process(tiny_gpt2_dir, config):
    def kill_other(step, values):
        for process in torch.multiprocessing.active_children():
            process.kill()

    with pytest.raises(
        RuntimeError,
        match=r"a training process ended early: process 0 .* SIGKILL; the machine may have run out of memory",
    ):
        finetune_adapter(tiny_gpt2_dir, LORA, examples(13), [], replace(config, devices=2), kill_other)
    assert torch.multiprocessing.active_children() == []


def test_one_device_needs_no_process_group(tiny_gpt2_dir, alone):
    base = load_pretrained(tiny_gpt2_dir)
    assert torch.equal(alone[0].wte.weight, base.wte.weight)


def train_job(directory: Path, out: str, base: Path, *nodes: dict[str, str]) -> list[dict[str, float]]:
    """The history of a job, as one process per node under torchrun with these variables; without nodes one process."""
    records = [{"instruction": f"Count to {i}.", "input": "", "output": "one " * (1 + i % 5)} for i in range(16)]
    train = {"epochs": 2, "batch_size": 4, "learning_rate": 1e-2, "log_every_steps": 1}
    job = {"base": str(base), "records": str(directory / "records.json"), "out": str(directory / out)}
    (directory / "records.json").write_text(json.dumps(records))
    (directory / "job.json").write_text(json.dumps(job | {"lora": {"rank": 3}, "train": train}))
    launcher = ["-m", "torch.distributed.run"] if nodes else []
    command = [sys.executable, *launcher, "-m", "gpt2core.train_job", str(directory / "job.json")]
    common = {"cwd": Path(__file__).parent.parent.parent, "stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    processes = [subprocess.Popen(command, env=os.environ | node, **common) for node in nodes or ({},)]
    errors = [process.communicate(timeout=200)[1].decode() for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), errors
    return json.loads((directory / out / "history.json").read_text())


@pytest.mark.slow
def test_two_machines_under_kubeflows_trainer_train_like_one_process(base_dir, tmp_path):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = str(listener.getsockname()[1])
    # what Trainer v2 sets in the pods of a TrainJob with two nodes and one process each
    trainer = {"PET_NNODES": "2", "PET_NPROC_PER_NODE": "1", "PET_MASTER_ADDR": "127.0.0.1", "PET_MASTER_PORT": port}
    alone = train_job(tmp_path, "alone", base_dir)
    adapter, base = tmp_path / "alone" / "adapter", load_pretrained(base_dir)
    load_adapter(base, adapter, directory_sha256(base_dir, checkpoint_files(base_dir)))
    with pytest.raises(ValueError, match="trained on the base"):
        load_adapter(load_pretrained(base_dir), adapter, "0" * 64)
    assert len(read_records(tmp_path / "alone" / "test.jsonl")) == 2
    together = train_job(tmp_path, "together", base_dir, *(trainer | {"PET_NODE_RANK": rank} for rank in "01"))
    for key in ("train/loss", "val/loss", "train/grad_norm"):
        ours, theirs = ([entry[key] for entry in history if key in entry] for history in (together, alone))
        assert theirs
        assert ours == pytest.approx(theirs, rel=1e-4)
    assert {path.name for path in (tmp_path / "together" / "adapter").iterdir()} == {
        path.name for path in (tmp_path / "alone" / "adapter").iterdir()
    }
