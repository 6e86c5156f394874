"""An interrupted and resumed run ends byte for byte like an uninterrupted one."""

import json
import logging
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from gpt2core.checkpoint import load_pretrained
from gpt2core.config import LoraConfig, PretrainConfig, TrainConfig
from gpt2core.data import Example
from gpt2core.lora import add_lora
from gpt2core.model import GPT2
from gpt2core.train import finetune, pretrain
from gpt2core.training_state import CHECKPOINT, PREVIOUS

EXAMPLES = [Example([(7 * i + j * j) % 97 for j in range(5 + i % 4)], 2) for i in range(11)]
CONFIG = TrainConfig(
    epochs=6, batch_size=2, gradient_accumulation_steps=2, learning_rate=1e-2, warmup_steps=2, log_every_steps=1
)
PRETRAIN = PretrainConfig(max_steps=20, batch_size=2, warmup_steps=2, log_every_steps=1, checkpoint_every_steps=4)
TOKENS = torch.arange(32).repeat(8)


class Stop(Exception):
    pass


def stop_at(step: int | None):
    def log(now, values):
        if now == step and "train/loss" in values:
            raise Stop

    return log


@pytest.fixture
def tune(tiny_gpt2_dir):
    """Finetune, possibly interrupted; return the adapter's bytes and the history without times."""

    def run(directory, stop=None, config=CONFIG, data=EXAMPLES):
        model = add_lora(load_pretrained(tiny_gpt2_dir), LoraConfig(rank=2, dropout=0.3), seed=0)
        return summary(model, finetune(model, data, EXAMPLES[:3], config, stop_at(stop), directory))

    return run


@pytest.fixture
def pretrained(tiny_config):
    def run(directory, stop=None):
        model = GPT2(replace(tiny_config, vocab_size=32, n_positions=16), torch.Generator().manual_seed(0))
        return summary(model, pretrain(model, TOKENS, PRETRAIN, stop_at(stop), directory))

    return run


def summary(model, result):
    weights = {name: parameter.detach().numpy().tobytes() for name, parameter in model.named_parameters()}
    measured = ("system/", "train/tokens_per_second")
    without_times = [{k: v for k, v in entry.items() if not k.startswith(measured)} for entry in result.history]
    return weights, without_times, result.best_val_loss


@pytest.mark.parametrize("stop", [1, 7, 9, 18])  # three steps per epoch, a checkpoint after each epoch
def test_interrupted_finetuning_ends_like_uninterrupted_finetuning(tune, tmp_path, stop):
    with pytest.raises(Stop):
        tune(tmp_path, stop)
    assert (tmp_path / CHECKPOINT).is_file() == (stop > 3)
    assert tune(tmp_path) == tune(None)


def test_a_run_may_be_interrupted_repeatedly(tune, tmp_path):
    for stop in (4, 8, 12, 16):
        with pytest.raises(Stop):
            tune(tmp_path, stop)
    assert tune(tmp_path) == tune(None)


@pytest.mark.parametrize("stop", [3, 17])
def test_interrupted_pretraining_ends_like_uninterrupted_pretraining(pretrained, tmp_path, stop):
    with pytest.raises(Stop):
        pretrained(tmp_path, stop)
    assert pretrained(tmp_path) == pretrained(None)


def test_a_checkpoint_of_a_longer_training_is_refused(tune, tmp_path):
    tune(tmp_path)
    with pytest.raises(ValueError, match=r"is of step 18, but this run has 6 steps; raise epochs or max_steps"):
        tune(tmp_path, config=replace(CONFIG, epochs=2))


def test_a_resumed_run_continues_at_the_checkpoint(tune, tmp_path):
    with pytest.raises(Stop):
        tune(tmp_path, 8)
    with pytest.raises(Stop):
        tune(tmp_path, 7)  # the first step after the checkpoint of step 6
    (tmp_path / CHECKPOINT).unlink()  # as a crash leaves it between moving the old checkpoint and writing the new one
    with pytest.raises(Stop):
        tune(tmp_path, 4)
    (tmp_path / PREVIOUS).unlink()
    (tmp_path / CHECKPOINT).unlink(missing_ok=True)
    with pytest.raises(Stop):
        tune(tmp_path, 1)


def test_the_successor_of_a_killed_process_continues_from_its_checkpoint(tune, tmp_path, tiny_gpt2_dir):
    code = f"""
import os, signal, sys
sys.path.insert(0, {str(sys.path[0])!r})
from gpt2core.checkpoint import load_pretrained
from gpt2core.config import LoraConfig, TrainConfig
from gpt2core.data import Example
from gpt2core.lora import add_lora
from gpt2core.train import finetune
examples = [Example([(7 * i + j * j) % 97 for j in range(5 + i % 4)], 2) for i in range(11)]
model = add_lora(load_pretrained({str(tiny_gpt2_dir)!r}), LoraConfig(rank=2, dropout=0.3), seed=0)
def log(step, values):
    if step == 10:
        os.kill(os.getpid(), signal.SIGKILL)
finetune(model, examples, examples[:3], {CONFIG!r}, log, {str(tmp_path)!r})
"""
    # sums of floats depend on the number of threads
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert tune(tmp_path) == tune(None)


def test_a_run_may_be_extended(tune, tmp_path):
    constant = replace(CONFIG, decay_fraction=0.0)
    tune(tmp_path, config=replace(constant, epochs=2))
    assert tune(tmp_path, config=constant) == tune(None, config=constant)


def test_a_finished_run_is_not_trained_further(tune, tmp_path, monkeypatch):
    done = tune(tmp_path)
    monkeypatch.setattr("gpt2core.train._step", None)
    assert tune(tmp_path) == done


def test_a_resumed_run_logs_every_entry_of_its_history_once(tiny_gpt2_dir, tmp_path):
    model = add_lora(load_pretrained(tiny_gpt2_dir), LoraConfig(rank=2), seed=0)
    with pytest.raises(Stop):
        finetune(model, EXAMPLES, EXAMPLES[:3], CONFIG, stop_at(7), tmp_path)
    logged: dict[int, dict[str, float]] = {}

    def log(step, values):
        assert not logged.setdefault(step, {}).keys() & values.keys()
        logged[step].update(values)

    model = add_lora(load_pretrained(tiny_gpt2_dir), LoraConfig(rank=2), seed=0)
    result = finetune(model, EXAMPLES, EXAMPLES[:3], CONFIG, log, tmp_path)
    assert [{"step": step, **values} for step, values in logged.items()] == result.history


@pytest.fixture(autouse=True)
def warnings_are_captured(caplog):
    caplog.set_level(logging.WARNING, "gpt2core.training_state")  # whatever level other tests leave the root logger at


def flip(file, place, mask=1):
    content = bytearray(file.read_bytes())
    content[place] ^= mask
    file.write_bytes(content)


def change_progress(file, **values):
    """Rewrite the metadata of a checkpoint, as its tensors are."""
    with safe_open(file, framework="pt") as stored:
        metadata = stored.metadata()
    metadata["progress"] = json.dumps(json.loads(metadata["progress"]) | values)
    save_file(load_file(file), file, metadata)


def drop_a_tensor(file):
    with safe_open(file, framework="pt") as stored:
        metadata = stored.metadata()
    tensors = load_file(file)
    tensors.pop(next(key for key in tensors if key.startswith("optimiser.")))
    save_file(tensors, file, metadata)


DAMAGES = {
    "empty": lambda file: file.write_bytes(b""),
    "truncated": lambda file: file.write_bytes(file.read_bytes()[:-1]),
    "one bit of a tensor": lambda file: flip(file, -1, 0x40),
    "one bit of the header": lambda file: flip(file, 30),
    "another step": lambda file: change_progress(file, step=10**9),
    "broken progress": lambda file: change_progress(file, history=None),
    "a lost tensor": drop_a_tensor,
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_checkpoint_is_skipped_with_a_warning_for_the_one_before(tune, tmp_path, caplog, damage):
    with pytest.raises(Stop):
        tune(tmp_path, stop=13)
    damage(tmp_path / CHECKPOINT)
    assert tune(tmp_path) == tune(None)
    assert re.search(rf"{CHECKPOINT} is damaged \(.*\); starting from {PREVIOUS}", caplog.text)


def test_a_checkpoint_of_another_run_is_skipped_for_the_one_before(tune, tmp_path, caplog):
    with pytest.raises(Stop):
        tune(tmp_path / "this", stop=13)
    tune(tmp_path / "other", config=replace(CONFIG, seed=5))
    (tmp_path / "other" / CHECKPOINT).replace(tmp_path / "this" / CHECKPOINT)
    assert tune(tmp_path / "this") == tune(None)
    assert re.search(rf"{CHECKPOINT} belongs to a run with other data.*; starting from {PREVIOUS}", caplog.text)


def test_without_an_undamaged_checkpoint_training_starts_from_the_beginning(tune, tmp_path, caplog):
    tune(tmp_path)
    for name in (CHECKPOINT, PREVIOUS):
        flip(tmp_path / name, -1)
    with pytest.raises(Stop):
        tune(tmp_path, stop=1)
    assert f"{PREVIOUS} is damaged" in caplog.text
    assert "starting from the beginning" in caplog.text


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        (1, r"weight .*lora_[AB] has NaN or infinite values after step 1; lower the learning rate of 1e\+39"),
        (3, "the loss is"),
    ],
)
def test_diverging_weights_are_an_error_and_never_a_checkpoint(tune, tmp_path, steps, message):
    diverging = replace(CONFIG, learning_rate=1e39, epochs=1, max_steps=steps, warmup_steps=0, decay_fraction=0.0)
    with pytest.raises(FloatingPointError, match=message):
        tune(tmp_path, config=diverging)
    assert not (tmp_path / CHECKPOINT).exists()


@pytest.mark.parametrize(
    "values",
    [{"config": replace(CONFIG, learning_rate=2e-2)}, {"config": replace(CONFIG, seed=5)}, {"data": EXAMPLES[:-1]}],
)
def test_the_checkpoint_of_another_run_is_refused(tune, tmp_path, values):
    tune(tmp_path)
    with pytest.raises(ValueError, match="other data, another config"):
        tune(tmp_path, **values)


def test_the_checkpoint_of_another_adapter_is_refused(tune, tmp_path, tiny_gpt2_dir):
    tune(tmp_path)
    model = add_lora(load_pretrained(tiny_gpt2_dir), LoraConfig(rank=2, targets=("fc",)), seed=0)
    with pytest.raises(ValueError, match="other trainable weights"):
        finetune(model, EXAMPLES, EXAMPLES[:3], CONFIG, None, tmp_path)
