"""CUDA graphs of training steps, on a CPU: a replay computes what was captured once more, on the captured tensors."""

from copy import deepcopy
from types import SimpleNamespace

import pytest
import torch

from gpt2core import batching, sequences, step_graphs
from gpt2core.batching import pack
from gpt2core.config import LoraConfig
from gpt2core.data import Example
from gpt2core.lora import add_lora, lora_layers
from gpt2core.model import GPT2
from gpt2core.step_graphs import StepGraphs, _Graph, add_gradients
from tests.gpt2core.test_batching import attention_by_sequence
from tests.helpers import randomize_lora


@pytest.fixture
def model(tiny_config, monkeypatch):
    monkeypatch.setattr(sequences, "varlen_attention", attention_by_sequence)
    monkeypatch.setattr(batching, "MIN_TOKENS", 1)  # otherwise batches as small as these have one shape
    monkeypatch.setattr(batching, "MIN_LABELS", 1)
    model = GPT2(tiny_config, torch.Generator().manual_seed(0))
    return randomize_lora(add_lora(model, LoraConfig(rank=2), seed=0)).train()


def batches(n: int, padded: bool):
    """Of two shapes, with other tokens each."""
    for i in range(n):
        examples = [Example([7, 7, *((i + j * k) % 97 for k in range(8 + j + 9 * (i % 2)))], 4) for j in range(3)]
        yield pack(examples, "response", use_varlen=True, padded=padded)


def gradients(model) -> list[torch.Tensor]:
    return [weight.grad for _, layer in lora_layers(model) for weight in (layer.lora_A, layer.lora_B)]


def stand_in(monkeypatch, factor: float = 1.0) -> list:
    """Replays compute what was captured, times `factor`; returns the captured batches."""
    captured = []

    def capture(graphs, batch):
        graph = SimpleNamespace(
            replay=lambda: loss.copy_(add_gradients(graphs._model, batch, graphs._n_labels / factor))
        )
        loss = torch.zeros(())
        captured.append(batch)
        return _Graph(graph, batch, loss)

    monkeypatch.setattr(StepGraphs, "_capture", capture)
    return captured


def compare_with_plain_steps(model) -> None:
    found, expected, step, copy = [], [], StepGraphs(model), deepcopy(model)
    for divisor, (batch, plain) in enumerate(zip(batches(8, True), batches(8, False), strict=True), 1):
        found.append(float(step(batch, divisor)))
        expected.append(float(add_gradients(copy, plain, divisor)))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    for one, other in zip(gradients(model), gradients(copy), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


def test_replays_give_the_losses_and_add_the_gradients_of_plain_steps(model, monkeypatch, caplog):
    caplog.set_level("WARNING")
    captured = stand_in(monkeypatch)
    compare_with_plain_steps(model)
    assert len(captured) == 2
    assert not caplog.text


@pytest.mark.parametrize("factor", [0.0, 0.8, 2.0, float("nan")])
def test_graphs_with_other_gradients_are_not_used(model, monkeypatch, caplog, factor):
    caplog.set_level("WARNING")
    captured = stand_in(monkeypatch, factor or 1e-9)
    compare_with_plain_steps(model)
    assert len(captured) == 1
    assert caplog.text.count("its gradients are not those") == 1


@pytest.mark.parametrize("call", [2, 3])  # the check of the first graph, and the first batch of another shape
def test_running_out_of_memory_beside_graphs_ends_them_and_changes_no_gradient(model, monkeypatch, caplog, call):
    """Where the graphs keep too much memory, a step without one fails in the middle of its backward pass."""
    calls, failing = [], next(layer for _, layer in lora_layers(model)).lora_A

    def counted(*arguments):
        calls.append(arguments)
        hook = None
        if len(calls) == call:
            hook = failing.register_post_accumulate_grad_hook(out_of_memory)
        try:
            return add_gradients(*arguments)
        finally:
            if hook is not None:
                hook.remove()

    def out_of_memory(weight):
        raise torch.OutOfMemoryError("CUDA out of memory")

    caplog.set_level("WARNING")
    monkeypatch.setattr(step_graphs, "add_gradients", counted)
    stand_in(monkeypatch)
    small, large = batches(2, True)
    step, copy = StepGraphs(model), deepcopy(model)
    for batch in (small, small, large, small):
        step(batch, 3)
        add_gradients(copy, batch, 3)
    assert caplog.text.count("no CUDA graph of a training step, training without, which is slower: CUDA out of") == 1
    for one, other in zip(gradients(model), gradients(copy), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


def test_without_graphs_training_goes_on(model, caplog):
    """Here capturing fails: there is no CUDA."""
    caplog.set_level("WARNING")
    step = StepGraphs(model)
    losses = [float(step(batch, 5)) for batch in batches(6, True)]
    assert caplog.text.count("no CUDA graph") == 1
    assert losses == pytest.approx([float(add_gradients(model, batch, 5)) for batch in batches(6, False)], rel=1e-4)
