"""An interrupted and resumed run ends byte for byte like an uninterrupted one."""

import os
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from gpt2core.checkpoint import load_pretrained
from gpt2core.config import LoraConfig, PretrainConfig, TrainConfig
from gpt2core.data import Example
from gpt2core.lora import add_lora
from gpt2core.model import GPT2
from gpt2core.train import CHECKPOINT, finetune, pretrain

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
    without_times = [{k: v for k, v in entry.items() if k != "train/tokens_per_second"} for entry in result.history]
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


def test_a_resumed_run_continues_at_the_checkpoint(tune, tmp_path):
    with pytest.raises(Stop):
        tune(tmp_path, 8)
    with pytest.raises(Stop):
        tune(tmp_path, 7)  # the first step after the checkpoint of step 6
    (tmp_path / CHECKPOINT).unlink()
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


def test_a_finished_run_is_not_trained_further(tune, tmp_path):
    done = tune(tmp_path)
    assert tune(tmp_path, stop=1) == done


@pytest.mark.parametrize("length", [0, 100, -1])
def test_a_damaged_checkpoint_is_named(tune, tmp_path, length):
    tune(tmp_path)
    file = tmp_path / CHECKPOINT
    file.write_bytes(file.read_bytes()[:length])
    with pytest.raises(ValueError, match=r"checkpoint\.safetensors is damaged .* delete it"):
        tune(tmp_path)


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
