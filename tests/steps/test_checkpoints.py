"""Checkpoints in ZenML's artifact store: a folder here, or an S3 that outlives the machine."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from shutil import rmtree

import pytest
import torch
from zenml.client import Client
from zenml.io import fileio

from gpt2core.checkpoint import load_pretrained
from gpt2core.config import LoraConfig, TrainConfig
from gpt2core.data import Example
from gpt2core.lora import add_lora
from gpt2core.train import finetune
from gpt2core.training_state import CHECKPOINT
from steps.checkpoints import kept_checkpoints
from tests.s3 import register_stack, serve_s3

ROOT = Path(__file__).parent.parent.parent
EXAMPLES = [Example([(7 * i + j * j) % 97 for j in range(5 + i % 4)], 2) for i in range(12)]
CONFIG = TrainConfig(epochs=8, batch_size=4, warmup_steps=2, log_every_steps=1)  # three steps an epoch
KEY = ["tests", 1]


class Stop(Exception):
    pass


def stop() -> None:
    raise Stop


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture
def here():
    """The artifact store is a folder of this machine."""
    return Client().active_stack.artifact_store.path


@pytest.fixture(scope="module")
def s3_url():
    with serve_s3("bucket") as url:
        yield url


@pytest.fixture
def elsewhere(s3_url, request):
    """The artifact store is in an S3."""
    before, name = Client().active_stack_model.id, f"s3-{request.node.name}"[:40]
    register_stack(name, f"s3://bucket/{abs(hash(name))}", s3_url)
    yield Client().active_stack.artifact_store.path
    Client().activate_stack(before)


@pytest.fixture(params=["here", "elsewhere"])
def store(request):
    return request.getfixturevalue(request.param)


def kept(store: str) -> list[str]:
    folder = f"{store}/checkpoints"
    return [f"{folder}/{key}/{CHECKPOINT}" for key in fileio.listdir(folder)] if fileio.exists(folder) else []


def train(base_dir, end: int | None = None, by=stop, found: list | None = None) -> bytes:
    """Finetune, perhaps until a step; the adapter's bytes."""
    model = add_lora(load_pretrained(base_dir), LoraConfig(rank=2, dropout=0.3), seed=0)

    def log(step, values):
        if step == end:
            by()

    with kept_checkpoints(KEY, log) as (directory, log_and_keep):
        if found is not None:
            found += directory.glob("*")
        finetune(model, EXAMPLES, EXAMPLES[:3], CONFIG, log_and_keep, directory)
    return b"".join(value.numpy().tobytes() for name, value in model.state_dict().items() if "lora_" in name)


def test_a_stopped_training_goes_on_where_it_was_and_ends_as_one_that_was_not_stopped(store, base_dir):
    whole = train(base_dir)
    with pytest.raises(Stop):
        train(base_dir, end=11)
    assert len(kept(store)) == 1
    found: list[Path] = []
    assert train(base_dir, found=found) == whole
    assert CHECKPOINT in [file.name for file in found]


def test_nothing_is_left_of_a_training_that_ended_well(store, base_dir):
    train(base_dir)
    assert kept(store) == []


def test_a_folder_of_this_machine_is_written_to_directly(here):
    with kept_checkpoints(KEY, lambda step, values: None) as (directory, _):
        assert str(directory).startswith(f"{here}/checkpoints/")


def test_another_key_is_another_checkpoint(store, base_dir):
    with pytest.raises(Stop):
        train(base_dir, end=5)
    with kept_checkpoints([*KEY, "other"], lambda step, values: None) as (directory, _):
        assert list(directory.glob("*")) == []
    assert len(kept(store)) == 1
    train(base_dir)


def test_a_process_killed_without_warning_leaves_its_checkpoint_elsewhere(elsewhere, base_dir, tmp_path):
    code = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from tests.steps.test_checkpoints import die, train
train({str(base_dir)!r}, end=14, by=die)
"""
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    threads = str(torch.get_num_threads())  # sums of floats depend on how many threads share them
    environment = os.environ | {"TMPDIR": str(scratch), "OMP_NUM_THREADS": threads}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert list(scratch.rglob(CHECKPOINT))
    rmtree(scratch)  # the machine is gone
    assert len(kept(elsewhere)) == 1

    found: list[Path] = []
    resumed = train(base_dir, found=found)
    assert found
    assert resumed == train(base_dir)
