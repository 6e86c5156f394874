"""The kernels of cuda.cu against torch: on a GPU, and compiled for the CPU with emulated threads (cuda_emulator.h)."""

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from gpt2core import cuda
from gpt2core.batching import IGNORED, pack
from gpt2core.checkpoint import load_adapter, load_pretrained
from gpt2core.config import GenerationConfig, GPT2Config, LoraConfig
from gpt2core.data import Example
from gpt2core.engine import Engine
from gpt2core.inference import quantized
from gpt2core.losses import _CrossEntropy, batch_losses
from gpt2core.model import GPT2
from gpt2core.sampling import most_likely
from tests.gpt2core.decoding import check_bf16_completion, random_prompts, save_random_adapter

COMPILER = shutil.which("c++")


@pytest.fixture(scope="module", params=["emulated", pytest.param("gpu", marks=pytest.mark.gpu)])
def kernels(request, tmp_path_factory):
    """`Kernels`, and `kernels.device` for their arguments; emulated, their launches run on the CPU."""
    if request.param == "gpu":
        if not torch.cuda.is_available():
            pytest.skip("there is no CUDA device")
        found = cuda.kernels_for(GPT2Config(), torch.bfloat16, torch.device("cuda", 0))
        assert found is not None
        found.device = "cuda"
        return found
    if COMPILER is None:
        pytest.skip("there is no C++ compiler")
    source = tmp_path_factory.mktemp("cuda") / "cuda.cpp"
    emulator = Path(__file__).with_name("cuda_emulator.h")
    launchers = "\n".join(f"LAUNCHER({name})" for name in cuda.NAMES)
    source.write_text(f'#include "{emulator}"\n#include "{cuda.SOURCE}"\n{launchers}\n')
    library = source.with_suffix(".so")
    command = [COMPILER, "-std=c++17", "-O1", "-shared", "-fPIC", "-w", str(source), "-o", str(library)]
    subprocess.run(command, check=True)
    emulated = ctypes.CDLL(str(library))

    class Emulated(cuda.Kernels):
        device = "cpu"

        def __init__(self):
            pass

        def _call(self, name, grid, threads, pointers):
            getattr(emulated, f"launch_{name}")(*grid, threads, pointers)

    return Emulated()


def test_the_check_before_their_use_finds_each_difference(kernels):
    class Other:
        """The kernels, one of which has another result."""

        def __init__(self, name):
            self.name = name

        def __getattr__(self, name):
            own = getattr(kernels, name)
            return own if name != self.name else lambda *arguments: own(*arguments).roll(1, -1)

    with torch.inference_mode():
        cuda.check(kernels, torch.device(kernels.device))
    for name in ("attend", "add_norm", "linear", "most_likely", "cross_entropy_"):
        with pytest.raises(AssertionError):
            cuda.check(Other(name), torch.device(kernels.device))


def test_the_check_passes_within_autocast(kernels):
    """Training all weights is mixed precision, and may be the first use of the kernels in a process."""
    device = torch.device(kernels.device)
    with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16):
        cuda.check(kernels, device)


@pytest.mark.parametrize("max_batch", [2, 3])  # linear layers by kernels, and by torch
def test_the_engine_decodes_with_them(kernels, wide_gpt2_dir, tmp_path, monkeypatch, max_batch):
    """More requests than rows, of different lengths, with adapters, and some with log probabilities."""
    monkeypatch.setattr(cuda, "kernels_for", lambda config, dtype, device: kernels)
    monkeypatch.setattr(quantized, "_has_bf16_products", lambda device: True)  # as on a GPU
    models = [load_pretrained(wide_gpt2_dir), load_pretrained(wide_gpt2_dir)]
    directory = save_random_adapter(load_pretrained(wide_gpt2_dir), LoraConfig(rank=2), 1, tmp_path)
    load_adapter(models[1], directory)
    prompts = random_prompts(5, 60, seed=3)
    with Engine(load_pretrained(wide_gpt2_dir, device=kernels.device), max_batch, "bf16", static_cache=True) as engine:
        engine.load_adapter("x", directory)
        requests = [
            engine.submit(prompt, GenerationConfig(2 + i), "x" if i % 3 == 1 else None, logprobs=1 if i > 2 else None)
            for i, prompt in enumerate(prompts)
        ]
        completions = [request.result(120) for request in requests]
    for i, (prompt, request, completion) in enumerate(zip(prompts, requests, completions, strict=True)):
        logprobs = [one.logprob for one in request.logprobs] or None
        check_bf16_completion(models[i % 3 == 1], prompt, completion, logprobs)


def random(kernels, *shape, dtype=torch.bfloat16):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(kernels.device, dtype)


def test_attention_of_rows_of_different_lengths_reads_and_extends_their_caches(kernels):
    H, D, columns = 3, cuda.HEAD_WIDTH, 300
    positions = torch.tensor([0, 1, 31, 32, 127, 128, 299], device=kernels.device)
    B = len(positions)
    kv, qkv = random(kernels, B + 2, 2, H, columns, D), random(kernels, B, 3, H, D)
    before, expected = kv.clone(), []
    for row, position in enumerate(positions.tolist()):
        kv[row, :, :, position + 1 :] = torch.nan  # must not be read
        before[row, :, :, position + 1 :] = torch.nan
        before[row, :, :, position] = qkv[row, 1:]
        k, v = before[row, :, :, : position + 1].float()
        expected.append(F.scaled_dot_product_attention(qkv[row, 0, :, None].float(), k, v, scale=0.2).flatten())
    found = kernels.attend(qkv, kv, positions, 0.2)
    torch.testing.assert_close(found.float(), torch.stack(expected), rtol=0.01, atol=0.01)
    assert torch.equal(kv.view(torch.int16), before.view(torch.int16))


def test_a_row_with_nan_does_not_affect_the_others(kernels):
    qkv, positions = random(kernels, 3, 3, 2, 64), torch.zeros(3, dtype=torch.long, device=kernels.device)
    kv = torch.zeros(3, 2, 2, 8, 64, dtype=torch.bfloat16, device=kernels.device)
    qkv[1, 2, 0, 5] = torch.nan
    found = kernels.attend(qkv, kv, positions, 1.0).view(3, 2, 64)
    assert found.isnan().nonzero().tolist() == [[1, 0, 5]]
    assert torch.equal(found[[0, 2]], qkv[[0, 2], 2])


@pytest.mark.parametrize("n", [16, 768, 1600, cuda.MAX_WIDTH])
def test_the_sum_is_normalized(kernels, n):
    x, y = random(kernels, 3, n, dtype=torch.float32), random(kernels, 3, n)
    weight, bias = random(kernels, n).float(), random(kernels, 1, n)[0].float()
    expected = x + y
    found = kernels.add_norm(x, y, weight, bias, 1e-5)
    assert torch.equal(x, expected)
    torch.testing.assert_close(found.float(), F.layer_norm(expected, (n,), weight, bias, 1e-5), rtol=0.01, atol=0.01)


@pytest.mark.parametrize("N", cuda.LINEAR_ROWS)
@pytest.mark.parametrize(("n_in", "n_out"), [(8, 3), (768, 6), (1032, 3), (3072, 5), (6400, 2)])
def test_linear_layers_of_few_rows(kernels, N, n_in, n_out):
    x, weight, bias = random(kernels, N, n_in), random(kernels, n_out, n_in), random(kernels, n_out)
    found = kernels.linear(x, weight, bias)
    torch.testing.assert_close(found.float(), F.linear(x.float(), weight.float(), bias.float()), rtol=0.01, atol=0.01)
    assert torch.equal(found[-1:], kernels.linear(x[-1:], weight, bias))
    activated = kernels.linear(x, weight, bias, gelu=True)
    torch.testing.assert_close(activated, F.gelu(found, approximate="tanh"), rtol=0.01, atol=1e-4)  # one bit of bf16


@pytest.mark.parametrize("n", [5, 1025, 50_257])
def test_the_most_likely_token_is_the_first_of_the_largest(kernels, n):
    logits = random(kernels, 8, n, dtype=torch.float32)
    logits[1, [n // 2, n - 1]] = 9  # twice the largest one
    logits[2:6, n - 2] = torch.tensor([torch.nan, torch.inf, -torch.inf, 9], device=kernels.device)
    logits[5, 1], logits[5, n - 1] = torch.inf, torch.nan
    logits[6], logits[7] = -torch.inf, -1e38
    found = kernels.most_likely(logits).cpu()
    assert torch.equal(found, most_likely(logits.cpu()))
    assert found[[1, 2, 3, 5, 6, 7]].tolist() == [n // 2, -1, -1, -1, -1, 0]


@pytest.mark.parametrize("n", [64, 8200, 50_304])
def test_the_loss_and_its_gradients_are_those_of_torch(kernels, n):
    """With columns of padding, which are -inf, and an ignored label."""
    logits = 3 * random(kernels, 4, n)
    logits[:, n - 3 :] = -torch.inf
    labels = torch.tensor([0, n - 4, IGNORED, n // 2], device=kernels.device)
    weights = torch.tensor([0.3, 2.0, 5.0, -1.0], device=kernels.device)
    ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    expected = F.cross_entropy(theirs.float(), labels, ignore_index=IGNORED, reduction="none")
    found = _CrossEntropy.apply(ours * 1, labels, kernels)  # a copy, as it is overwritten
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    for loss in (found, expected):
        (loss * weights).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=0.02, atol=1e-6)
    assert not ours.grad[2].any()
    assert not ours.grad[:, n - 3 :].any()


def test_training_with_the_loss_kernel_gives_the_gradients_of_torch(kernels, monkeypatch):
    config = GPT2Config(vocab_size=104, n_positions=16, n_embd=32, n_layer=2, n_head=2)
    model = GPT2(config, torch.Generator().manual_seed(0)).to(kernels.device, torch.bfloat16)
    batch = pack([Example([1, 2, 3, 4, 5], 2), Example([7, 8, 9], 1)], "response", kernels.device)
    found = []
    for one in (None, kernels):
        monkeypatch.setattr(cuda, "loss_kernels_for", lambda logits, one=one: one)
        model.zero_grad()
        losses = batch_losses(model, batch)
        losses.mean().backward()
        found.append((losses.detach(), [weight.grad.float() for weight in model.parameters()]))
    torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-4, atol=1e-4)
    for one, other in zip(found[1][1], found[0][1], strict=True):
        assert (one - other).norm() <= 0.02 * other.norm() + 1e-6
