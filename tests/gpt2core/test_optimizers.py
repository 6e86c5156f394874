"""Learning rates and Muon, compared with transformers and torch."""

import math

import pytest
import torch
from transformers import get_scheduler

from gpt2core.config import TrainConfig
from gpt2core.optimizers import CpuMuon, learning_rate_factor


@pytest.mark.parametrize(
    ("values", "factors"),
    [
        ({"warmup_steps": 0, "decay_fraction": 0.0}, [1, 1, 1, 1, 1]),
        ({"warmup_steps": 0, "decay_fraction": 1.0}, [1, 0.8, 0.6, 0.4, 0.2]),
        ({"warmup_steps": 2, "decay_fraction": 0.4}, [1 / 3, 2 / 3, 1, 1, 0.5]),
        ({"warmup_steps": 2, "decay_fraction": 1.0}, [1 / 3, 2 / 3, 1, 2 / 3, 1 / 3]),
        ({"warmup_steps": 9, "decay_fraction": 1.0}, [0.1, 0.2, 0.3, 0.4, 0.5]),
        ({"warmup_steps": 0, "decay_fraction": 0.4, "final_lr_ratio": 0.5}, [1, 1, 1, 1, 0.75]),
        ({"warmup_steps": 1, "schedule": "constant"}, [0.5, 1, 1, 1, 1]),
        (
            {"warmup_steps": 0, "schedule": "cosine", "final_lr_ratio": 0.2},
            [0.2 + 0.8 * (1 + math.cos(math.pi * step / 5)) / 2 for step in range(5)],
        ),
    ],
)
def test_the_learning_rate_warms_up_stays_constant_and_decays(values, factors):
    assert [learning_rate_factor(step, 5, TrainConfig(**values)) for step in range(5)] == pytest.approx(factors)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_the_decay_after_the_warm_up_is_that_of_transformers(schedule):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    reference = get_scheduler(schedule, optimizer, num_warmup_steps=10, num_training_steps=24)
    expected = []
    for _ in range(24):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        reference.step()
    factors = [learning_rate_factor(step, 24, TrainConfig(warmup_steps=10, schedule=schedule)) for step in range(24)]
    assert factors[10:] == pytest.approx(expected[10:])


@pytest.mark.parametrize("shape", [(24, 8), (8, 8), (8, 24)])
def test_muon_on_a_cpu_is_torchs_in_fp32(monkeypatch, shape):
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.float)  # as torch's Muon casts before its iterations
    generator = torch.Generator().manual_seed(0)
    ours, theirs = (torch.nn.Parameter(torch.ones(shape)) for _ in range(2))
    options = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}
    muons = [CpuMuon([ours], **options), torch.optim.Muon([theirs], **options)]
    for _ in range(3):
        ours.grad = theirs.grad = torch.randn(shape, generator=generator)
        for muon in muons:
            muon.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert muons[0].state_dict()["state"][0].keys() == muons[1].state_dict()["state"][0].keys()
