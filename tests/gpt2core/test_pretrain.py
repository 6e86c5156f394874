"""Pretraining on a text."""

import math

import pytest
import torch

from gpt2core.config import GPT2Config, PretrainConfig
from gpt2core.model import GPT2
from gpt2core.train import pretrain


@pytest.fixture
def small():
    return GPT2(
        GPT2Config(vocab_size=32, n_positions=16, n_embd=16, n_layer=2, n_head=2), torch.Generator().manual_seed(0)
    )


def test_pretraining_learns_a_repeating_text(small):
    tokens = torch.arange(16).repeat(40)
    result = pretrain(small, tokens, PretrainConfig(max_steps=160, batch_size=4, warmup_steps=5))
    assert result.history[0]["train/loss"] > 2
    assert result.history[-1]["train/loss"] < 0.2  # a uniform guess among sixteen tokens has 2.8
    assert result.history[-1]["train/tokens_seen"] == 160 * 4 * 16


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed"])
def test_pretraining_in_bf16_learns_too(small, precision):
    tokens = torch.arange(16).repeat(40)
    config = PretrainConfig(max_steps=60, batch_size=4, warmup_steps=5, precision=precision)
    assert pretrain(small, tokens, config).history[-1]["train/loss"] < 0.5
    assert small.wte.weight.dtype == torch.float32


def test_every_window_is_part_of_the_text_and_each_pass_cuts_it_at_other_places(small):
    tokens = torch.randint(32, (16 * 9,), generator=torch.Generator().manual_seed(0))
    windows: list[list[int]] = []
    small.wte.register_forward_pre_hook(lambda _, ids: windows.extend(ids[0].tolist()))
    pretrain(small, tokens, PretrainConfig(max_steps=35, batch_size=1))  # five passes
    starts = [next(i for i in range(len(tokens)) if tokens[i : i + 16].tolist() == window) for window in windows]
    passes = [starts[i : i + 7] for i in range(0, 35, 7)]
    assert all(len({start % 16 for start in one}) == 1 and len(set(one)) == 7 for one in passes)
    assert len({one[0] % 16 for one in passes}) > 1
    assert len({tuple(start // 16 for start in one) for one in passes}) > 1  # in another order, too


def test_muon_trains_the_matrices_of_the_blocks_and_adamw_the_rest(small, monkeypatch):
    taken = {}
    for kind in (torch.optim.Muon, torch.optim.AdamW):

        def spy(self, parameters, *arguments, original=kind.__init__, name=kind.__name__, **options):
            parameters = list(parameters)
            groups = [one["params"] if isinstance(one, dict) else [one] for one in parameters]
            taken.setdefault(name, {id(parameter) for group in groups for parameter in group})
            original(self, parameters, *arguments, **options)

        monkeypatch.setattr(kind, "__init__", spy)
    pretrain(small, torch.arange(32).repeat(20), PretrainConfig(max_steps=1, batch_size=2))
    matrices = {
        id(p)
        for name, p in small.named_parameters()
        if name.startswith("h.") and name.endswith(".weight") and p.dim() == 2
    }
    assert len(matrices) == 8
    assert taken["Muon"] == matrices
    assert taken["AdamW"] == {id(p) for p in small.parameters()} - matrices


def test_diverging_pretraining_stops_with_the_pass_and_advice(small):
    small.wte.weight.data[5] = math.nan
    with pytest.raises(FloatingPointError, match=r"step 1 \(pass 1 over the text\); lower learning_rate="):
        pretrain(small, torch.arange(32).repeat(20), PretrainConfig(max_steps=2, batch_size=2))


@pytest.mark.parametrize(("tokens", "way_out"), [(40, "product of at most 1"), (32, "lower model.n_positions")])
def test_a_text_too_short_for_a_step_is_refused(small, tokens, way_out):
    with pytest.raises(ValueError, match=f"{tokens} tokens are too few for a step of 8 sequences of 16; .*{way_out}"):
        pretrain(small, torch.zeros(tokens, dtype=torch.long), PretrainConfig())
