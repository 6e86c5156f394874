"""Checkpoints in ZenML's artifact store: a local directory, or an S3 that outlives the machine."""

import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from shutil import rmtree

import pytest
import torch
from zenml.client import Client
from zenml.io import fileio

from gpt2core.config import GPT2Config, LoraConfig, TrainConfig
from gpt2core.data import Example
from gpt2core.lora import add_lora
from gpt2core.model import GPT2
from gpt2core.train import finetune
from gpt2core.training_state import CHECKPOINT
from steps.checkpoints import TRAINING_ID, stored_checkpoints
from tests.s3 import register_stack, serve_s3

ROOT = Path(__file__).parent.parent.parent
EXAMPLES = [Example([(7 * i + j * j) % 97 for j in range(5 + i % 4)], 2) for i in range(12)]
CONFIG = TrainConfig(epochs=8, batch_size=4, warmup_steps=2, log_every_steps=1)  # three steps per epoch
KEY = ["tests", 1]


class Stop(Exception):
    pass


def stop() -> None:
    raise Stop


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture
def local_store():
    """The artifact store is a local directory, without the checkpoints of other tests."""
    path = Client().active_stack.artifact_store.path
    rmtree(f"{path}/checkpoints", ignore_errors=True)
    return path


@pytest.fixture(scope="module")
def s3_url():
    with serve_s3("bucket") as url:
        yield url


@pytest.fixture
def s3_store(s3_url, request):
    """The artifact store is in S3."""
    before, name = Client().active_stack_model.id, f"s3-{request.node.name}"[:40]
    register_stack(name, f"s3://bucket/{abs(hash(name))}", s3_url)
    yield Client().active_stack.artifact_store.path
    Client().activate_stack(before)


@pytest.fixture(params=["local_store", "s3_store"])
def store(request):
    return request.getfixturevalue(request.param)


def stored(store: str) -> list[str]:
    folder = f"{store}/checkpoints"
    return [f"{folder}/{key}/{CHECKPOINT}" for key in fileio.listdir(folder)] if fileio.exists(folder) else []


def train(end: int | None = None, by=stop, found: list | None = None) -> bytes:
    """Finetune, up to step `end` if given; return the adapter's bytes."""
    base = GPT2(GPT2Config(97, 16, n_embd=8, n_layer=1, n_head=2), torch.Generator().manual_seed(0)).eval()
    model = add_lora(base, LoraConfig(rank=2, dropout=0.3), seed=0)

    def log(step, values):
        if step == end:
            by()

    with stored_checkpoints(KEY) as checkpoints:
        if found is not None:
            found += checkpoints.directory.glob("*")
        finetune(model, EXAMPLES, EXAMPLES[:3], CONFIG, checkpoints.after(log), checkpoints.directory)
    return b"".join(value.numpy().tobytes() for name, value in model.state_dict().items() if "lora_" in name)


def test_a_stopped_training_resumes_and_ends_with_the_same_adapter(store):
    whole = train()
    with pytest.raises(Stop):
        train(end=11)
    assert len(stored(store)) == 1
    found: list[Path] = []
    assert train(found=found) == whole
    assert CHECKPOINT in [file.name for file in found]


def test_a_successful_training_removes_its_checkpoint(store):
    train()
    assert stored(store) == []


def test_the_same_training_in_another_run_may_finish_first_and_remove_the_checkpoint(store):
    def finish():
        if fileio.exists(f"{store}/checkpoints"):
            fileio.rmtree(f"{store}/checkpoints")

    whole = train()
    assert train(end=11, by=finish) == train(end=24, by=finish) == whole


def test_a_local_store_is_written_to_directly(local_store):
    with stored_checkpoints(KEY) as checkpoints:
        assert str(checkpoints.directory).startswith(f"{local_store}/checkpoints/")


def test_each_key_has_its_own_checkpoint(store):
    with pytest.raises(Stop):
        train(end=5)
    with stored_checkpoints([*KEY, "other"]) as checkpoints:
        assert [file for file in checkpoints.directory.glob("*") if file.name != TRAINING_ID] == []
    assert len(stored(store)) == 1
    train()


def test_the_training_id_stays_the_same_until_the_training_succeeds(store):
    ids = []
    for succeeds in (False, True, True):
        with suppress(Stop), stored_checkpoints(KEY) as checkpoints:
            ids.append(checkpoints.training_id)
            if not succeeds:
                raise Stop
    assert ids[0] == ids[1] != ids[2]


def test_a_killed_process_leaves_its_checkpoint_in_s3(s3_store, tmp_path):
    code = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from tests.steps.test_checkpoints import die, train
train(end=14, by=die)
"""
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    threads = str(torch.get_num_threads())  # float sums depend on the number of threads
    environment = os.environ | {"TMPDIR": str(scratch), "OMP_NUM_THREADS": threads}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert list(scratch.rglob(CHECKPOINT))
    rmtree(scratch)  # the machine is lost
    assert len(stored(s3_store)) == 1

    found: list[Path] = []
    resumed = train(found=found)
    assert found
    assert resumed == train()
