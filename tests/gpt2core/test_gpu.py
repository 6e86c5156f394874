"""Every exactness claim of gpt2core on a GPU: `pytest -m gpu`, or `make gpu-check` with figures.

Imports nothing beyond torch, transformers, peft, tiktoken, safetensors and pytest. GPU_CHECK_DEVICE=cpu runs the same
tests without a GPU, so that they are known to work before one is at hand.
"""

import os
import warnings
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig as PeftConfig
from peft import get_peft_model
from transformers import GPT2LMHeadModel

from gpt2core import step_graphs
from gpt2core.checkpoint import load_adapter, load_pretrained, save_adapter, save_pretrained
from gpt2core.config import GenerationConfig, LoraConfig, TrainConfig
from gpt2core.data import Example
from gpt2core.engine import Engine
from gpt2core.generate import generate
from gpt2core.kernels import has_varlen_attention
from gpt2core.lora import add_lora, lora_layers, merge_lora, unmerge_lora
from gpt2core.losses import token_losses
from gpt2core.model import GPT2, KVCache
from gpt2core.step_graphs import StepGraphs
from gpt2core.train import finetune
from tests.gpt2core.decoding import check_bf16_completion, mixed_configs, random_prompts, save_random_adapter
from tests.helpers import randomize_lora, same_state, snapshot

DEVICE = os.environ.get("GPU_CHECK_DEVICE", "cuda")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# Relative to the spread of the values. fp32: another order of summation; bf16: 8 bits of mantissa through two blocks.
TOLERANCE = {"fp32": 1e-4, "bf16": 3e-2}
ALL_TARGETS = ("q", "k", "v", "o", "fc", "proj")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(), reason="there is no CUDA device"),
]
precisions = pytest.mark.parametrize("precision", ["fp32", "bf16"])


def load(directory, precision="fp32", device=DEVICE) -> GPT2:
    return load_pretrained(directory, dtype=DTYPES[precision], device=device)


def close(found: torch.Tensor, expected: torch.Tensor, precision: str) -> None:
    found, expected = found.detach().float().cpu(), expected.detach().float().cpu()
    error = (found - expected).norm() / expected.norm()
    assert error < TOLERANCE[precision], f"relative error {float(error):.2e}"


def examples(n: int = 20) -> list[Example]:
    """A shared prefix of three tokens, as prompts have, and 4 to 12 random ones."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(4, 13, (n,), generator=generator).tolist()
    rests = [torch.randint(97, (length,), generator=generator).tolist() for length in lengths]
    return [Example([7, 8, 9, *rest], 3 + len(rest) // 2) for rest in rests]


# Model


@precisions
def test_logits_are_those_of_transformers(tiny_gpt2_dir, precision):
    ids = torch.tensor(random_prompts(3, seed=1)[2])[None]
    reference = GPT2LMHeadModel.from_pretrained(tiny_gpt2_dir, dtype=torch.float32).eval()
    with torch.no_grad():
        close(load(tiny_gpt2_dir, precision)(ids.to(DEVICE)), reference(ids).logits, precision)


@precisions
def test_padding_and_the_cache_do_not_change_logits(tiny_gpt2_dir, precision):
    model, ids = load(tiny_gpt2_dir, precision), torch.arange(1, 13, device=DEVICE)[None]
    padded = torch.cat([torch.zeros_like(ids[:, :5]), ids], 1)
    mask = torch.cat([torch.zeros_like(ids[:, :5]), torch.ones_like(ids)], 1)
    with torch.no_grad():
        expected = model(ids)
        close(model(padded, mask)[:, 5:], expected, precision)
        cache = KVCache(model, 1, 12)
        parts = [model(ids[:, :7], cache=cache), *(model(ids[:, i : i + 1], cache=cache) for i in range(7, 12))]
        close(torch.cat(parts, 1), expected, precision)


@precisions
def test_gradients_are_those_of_the_cpu(tiny_gpt2_dir, precision):
    grads = []
    for device, dtype in (("cpu", "fp32"), (DEVICE, precision)):
        model = load(tiny_gpt2_dir, dtype, device).train()
        model(torch.arange(40, device=device)[None]).float().log_softmax(-1)[..., 3].sum().backward()
        grads.append(torch.cat([weight.grad.flatten().float().cpu() for weight in model.parameters()]))
    close(grads[1], grads[0], precision)


# LoRA and checkpoints


@precisions
def test_merging_keeps_the_logits_and_unmerging_restores_every_bit(tiny_gpt2_dir, precision):
    lora = LoraConfig(rank=4, targets=ALL_TARGETS)
    model = randomize_lora(add_lora(load(tiny_gpt2_dir, precision, "cpu"), lora, seed=0), 0.05).to(DEVICE)
    ids = torch.arange(30, device=DEVICE)[None]
    before = snapshot(model)
    with torch.no_grad():
        expected = model(ids)
        close(merge_lora(model)(ids), expected, precision)
        assert same_state(snapshot(unmerge_lora(model)), before)
        assert torch.equal(model(ids), expected)


def test_an_adapter_saved_on_the_gpu_is_the_same_on_the_cpu(tiny_gpt2_dir, tmp_path):
    model = randomize_lora(add_lora(load(tiny_gpt2_dir, device="cpu"), LoraConfig(), seed=0)).to(DEVICE)
    save_adapter(model, tmp_path)
    loaded = load_adapter(load(tiny_gpt2_dir, device="cpu"), tmp_path)
    assert same_state(snapshot(loaded), snapshot(model.cpu()))


def test_a_checkpoint_saved_on_the_gpu_is_the_same_on_the_cpu(tiny_gpt2_dir, tmp_path):
    save_pretrained(load(tiny_gpt2_dir), tmp_path)
    assert same_state(snapshot(load(tmp_path, device="cpu")), snapshot(load(tiny_gpt2_dir, device="cpu")))


# Training

CONFIG = TrainConfig(epochs=3, batch_size=5, learning_rate=1e-2, warmup_steps=1, log_every_steps=2)
PRECISIONS = {"fp32": "fp32", "bf16": "bf16-mixed"}


@precisions
def test_losses_of_packed_records_are_those_of_the_cpu(tiny_gpt2_dir, precision):
    expected = token_losses(load(tiny_gpt2_dir, device="cpu"), examples(), 7, "response")
    found = token_losses(load(tiny_gpt2_dir, precision), examples(), 7, "response")
    assert [count for _, count in found] == [count for _, count in expected]
    close(torch.tensor([loss for loss, _ in found]), torch.tensor([loss for loss, _ in expected]), precision)


def tuned(directory, device, config=CONFIG, val=(), **options):
    model = add_lora(load(directory, device=device), LoraConfig(rank=3, targets=ALL_TARGETS), seed=None)
    generator = torch.Generator().manual_seed(0)
    for _, layer in lora_layers(model):  # the same on every device
        layer.lora_A.data.copy_(torch.randn(layer.lora_A.shape, generator=generator) * 0.1)
    return model, finetune(model, examples(), val, config, **options)


@precisions
def test_training_is_that_of_the_cpu(tiny_gpt2_dir, precision):
    config = replace(CONFIG, precision=PRECISIONS[precision], gradient_accumulation_steps=2)
    expected, before = tuned(tiny_gpt2_dir, "cpu", replace(config, precision="fp32"), examples()[:5])
    found, after = tuned(tiny_gpt2_dir, DEVICE, config, examples()[:5])
    for key in ("train/loss", "val/loss", "train/grad_norm", "train/learning_rate"):
        values = [torch.tensor([entry[key] for entry in one.history if key in entry]) for one in (after, before)]
        close(*values, precision)
    if precision == "fp32":  # in bf16, AdamW's division amplifies rounding of small gradients
        for (_, one), (_, other) in zip(lora_layers(found), lora_layers(expected), strict=True):
            torch.testing.assert_close(one.lora_B.cpu(), other.lora_B, rtol=1e-2, atol=1e-4)


def test_packed_records_are_trained_as_sequences_of_a_flash_kernel():
    assert has_varlen_attention(torch.device(DEVICE, 0), 64) == (DEVICE == "cuda")


@pytest.mark.skipif(DEVICE == "cpu", reason="only CUDA reports where the host waits")
def test_training_steps_do_not_wait_for_the_gpu(tiny_gpt2_dir):
    """As test_fake_cuda.py, with what CUDA itself reports: more steps must not add a wait."""

    def waits(epochs: int) -> int:
        config = replace(CONFIG, epochs=epochs, precision="bf16-mixed", log_every_steps=1000)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                tuned(tiny_gpt2_dir, DEVICE, config)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        return sum("synchronizing CUDA operation" in str(one.message) for one in caught)

    waits(3)  # what happens only once in a process
    # in three epochs a graph is captured, whose check waits once
    assert waits(3) == waits(8) > 0


@pytest.mark.skipif(DEVICE == "cpu", reason="a CPU has no graphs")
def test_graphs_of_training_steps_give_the_losses_of_the_same_kernels_launched_one_by_one(tiny_gpt2_dir, monkeypatch):
    config = replace(CONFIG, epochs=4, precision="bf16-mixed", log_every_steps=1)
    captured, capture = [], StepGraphs._capture

    def counted(graphs, batch):
        captured.append(capture(graphs, batch))
        return captured[-1]

    monkeypatch.setattr(StepGraphs, "_capture", counted)
    found = tuned(tiny_gpt2_dir, DEVICE, config)[1]
    assert captured
    monkeypatch.setattr(step_graphs, "MAX_GRAPHS", 0)
    n_captured, expected = len(captured), tuned(tiny_gpt2_dir, DEVICE, config)[1]
    assert len(captured) == n_captured
    for key in ("train/loss", "train/grad_norm"):
        close(*(torch.tensor([entry[key] for entry in one.history]) for one in (found, expected)), "bf16")


def test_gradients_of_the_adapter_are_those_of_peft(tiny_gpt2_dir):
    ours = randomize_lora(
        add_lora(load(tiny_gpt2_dir, device="cpu"), LoraConfig(rank=3, targets=("o", "proj")), seed=0)
    )
    peft = PeftConfig(r=3, lora_alpha=16, target_modules=["c_proj"], fan_in_fan_out=True, task_type="CAUSAL_LM")
    reference = get_peft_model(GPT2LMHeadModel.from_pretrained(tiny_gpt2_dir, dtype=torch.float32), peft)
    theirs, ids = dict(reference.named_parameters()), torch.arange(30)[None]
    for name, layer in lora_layers(ours):
        for part in ("lora_A", "lora_B"):
            theirs[f"base_model.model.transformer.{name}.{part}.default.weight"].data.copy_(
                getattr(layer, part).data[0]
            )
    ours, reference = ours.to(DEVICE), reference.to(DEVICE)
    ours(ids.to(DEVICE)).log_softmax(-1)[..., 3].sum().backward()
    reference(ids.to(DEVICE)).logits.log_softmax(-1)[..., 3].sum().backward()
    for name, layer in lora_layers(ours):
        for part in ("lora_A", "lora_B"):
            other = theirs[f"base_model.model.transformer.{name}.{part}.default.weight"].grad
            close(getattr(layer, part).grad[0], other, "fp32")


def test_frozen_weights_end_as_they_began(tiny_gpt2_dir):
    before = snapshot(load(tiny_gpt2_dir, device="cpu"))
    model, _ = tuned(tiny_gpt2_dir, DEVICE, replace(CONFIG, precision="bf16-mixed"))
    after = {
        name.replace(".linear.", "."): value.cpu() for name, value in snapshot(model).items() if "lora_" not in name
    }
    assert same_state(after, before)


@precisions
def test_a_resumed_run_continues_where_it_stopped(tiny_gpt2_dir, tmp_path, precision):
    """A GPU's attention adds gradients in no fixed order, so equality up to rounding; on a CPU it is exact."""
    config = replace(CONFIG, precision=PRECISIONS[precision])

    class Stop(Exception):
        pass

    def stop(step, values):
        if step == 7:
            raise Stop

    expected, whole = tuned(tiny_gpt2_dir, DEVICE, replace(config, log_every_steps=1))
    with pytest.raises(Stop):
        tuned(tiny_gpt2_dir, DEVICE, replace(config, log_every_steps=1), log=stop, checkpoint_dir=tmp_path)
    resumed, rest = tuned(tiny_gpt2_dir, DEVICE, replace(config, log_every_steps=1), checkpoint_dir=tmp_path)
    assert [entry["step"] for entry in rest.history] == [entry["step"] for entry in whole.history]
    losses = [torch.tensor([entry["train/loss"] for entry in one.history]) for one in (rest, whole)]
    close(*losses, precision)
    for (_, one), (_, other) in zip(lora_layers(resumed), lora_layers(expected), strict=True):
        close(one.lora_B, other.lora_B, "bf16")


def test_a_loss_that_is_not_finite_is_an_error_that_names_the_step(tiny_gpt2_dir):
    with pytest.raises(FloatingPointError, match=r"after step \d+|at step \d+"):
        tuned(tiny_gpt2_dir, DEVICE, replace(CONFIG, learning_rate=1e30, max_grad_norm=None))


# Decoding


def test_greedy_completions_are_those_of_the_cpu(tiny_gpt2_dir):
    prompts, config = random_prompts(6, 40), GenerationConfig(max_new_tokens=20)
    expected = generate(load(tiny_gpt2_dir, device="cpu"), prompts, config)
    assert generate(load(tiny_gpt2_dir), prompts, config) == expected


@pytest.mark.parametrize("max_batch", [1, 3, 16])
def test_the_engine_gives_the_completions_of_generate(tiny_gpt2_dir, max_batch):
    model, prompts, configs = load(tiny_gpt2_dir), random_prompts(40), mixed_configs(40)
    with Engine(model, max_batch, "fp32", static_cache=True) as engine:
        requests = [engine.submit(*pair) for pair in zip(prompts, configs, strict=True)]
        completions = [request.result(120) for request in requests]
    assert completions == [generate(model, [p], c)[0] for p, c in zip(prompts, configs, strict=True)]


def test_each_request_uses_its_own_adapter(tiny_gpt2_dir, tmp_path):
    loras = [None, LoraConfig(rank=2), LoraConfig(rank=5, targets=ALL_TARGETS)]
    prompts, config, models = random_prompts(12, 40), GenerationConfig(max_new_tokens=12), [load(tiny_gpt2_dir)]
    with Engine(models[0], 5, "fp32", static_cache=True) as engine:
        for i, lora in enumerate(loras[1:], 1):
            directory = save_random_adapter(load(tiny_gpt2_dir, device="cpu"), lora, i, tmp_path / str(i))
            engine.load_adapter(str(i), directory)
            models.append(merge_lora(load_adapter(load(tiny_gpt2_dir), directory)))
        names = [None, "1", "2"]
        requests = [engine.submit(prompt, config, names[i % 3]) for i, prompt in enumerate(prompts)]
        completions = [request.result(120) for request in requests]
    assert completions == [generate(models[i % 3], [prompt], config)[0] for i, prompt in enumerate(prompts)]


@pytest.mark.parametrize("n", [1, 7])
def test_bf16_decoding_takes_tokens_that_fp32_finds_as_likely(wide_gpt2_dir, n):
    """In bf16 another token may be the largest by rounding: compare probabilities instead of tokens."""
    reference, prompts = load(wide_gpt2_dir, device="cpu"), random_prompts(n, 150, seed=2)
    with Engine(load(wide_gpt2_dir), 8, "bf16", static_cache=True) as engine:
        assert (engine._model._kernels is not None) == (DEVICE == "cuda")
        for _ in range(2):  # then with prefixes in the cache
            requests = [engine.submit(p, GenerationConfig(max_new_tokens=20), logprobs=1) for p in prompts]
            completions = [request.result(120) for request in requests]
        assert engine._runner._use_varlen == (DEVICE == "cuda")
    for prompt, request, completion in zip(prompts, requests, completions, strict=True):
        check_bf16_completion(reference, prompt, completion, [one.logprob for one in request.logprobs])


@pytest.mark.parametrize("weights", ["fp32", "bf16"])
def test_graphs_give_the_completions_of_the_same_kernels_launched_one_by_one(wide_gpt2_dir, weights, caplog):
    completions, prompts, configs = [], random_prompts(20, 150), mixed_configs(20)
    for uses_graphs in (DEVICE == "cuda", False):
        with Engine(load(wide_gpt2_dir), 8, weights, static_cache=True) as engine:
            decoder = engine._runner._decoder
            decoder.uses_graphs = uses_graphs
            # one after the other: which requests run together must not depend on time
            completions.append([engine.submit(*pair).result(120) for pair in zip(prompts, configs, strict=True)])
            assert bool(decoder._graphs) == uses_graphs, caplog.text
    assert completions[0] == completions[1]


def test_a_batch_of_many_sizes_is_decoded_by_graphs(tiny_gpt2_dir, tmp_path, caplog):
    """Rows come and go, and adapters are loaded by this thread while the engine's captures graphs."""
    model, prompts = load(tiny_gpt2_dir), random_prompts(60, 30)
    configs = [GenerationConfig(max_new_tokens=1 + i % 30) for i in range(60)]
    expected = [generate(model, [p], c)[0] for p, c in zip(prompts, configs, strict=True)]
    directory = save_random_adapter(load(tiny_gpt2_dir, device="cpu"), LoraConfig(), 1, tmp_path)
    with Engine(model, 13, "fp32", static_cache=True) as engine:
        requests = []
        for i, pair in enumerate(zip(prompts, configs, strict=True)):
            requests.append(engine.submit(*pair))
            engine.load_adapter(str(i % 3), directory)
        assert [request.result(120) for request in requests] == expected
        assert engine._runner._decoder.uses_graphs == (DEVICE == "cuda"), caplog.text


def test_auto_weights_on_a_gpu_are_bf16(tiny_gpt2_dir):
    if DEVICE == "cpu":
        pytest.skip("on a CPU the fastest format is measured")
    with Engine(load(tiny_gpt2_dir), 2) as engine:
        assert engine.weights == "bf16"
