"""Each private call still exists and computes what is expected, and torch still has no public replacement."""

import gc
import os
import platform
import subprocess
import sys
import threading
import time
import weakref
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from gpt2core import kernels
from gpt2core.checkpoint import save_pretrained
from gpt2core.config import GPT2Config, LoraConfig
from gpt2core.model import GPT2
from tests.gpt2core.decoding import save_random_adapter

needs_onednn = pytest.mark.skipif(not kernels.has_onednn(), reason="torch has no oneDNN here")
needs_int8 = pytest.mark.skipif(not kernels.has_onednn_int8(), reason="no int8 kernel on this processor")
needs_proc = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="no /proc file system")


def tensors(dtype=torch.float32):
    """x (64, 512), W (256, 512) and b (256)."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(*shape, generator=generator).to(dtype) for shape in ((64, 512), (256, 512), (256,))]


def run(code: str, *arguments: str, **environ: str) -> str:
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, timeout=120, env={**os.environ, **environ}
    )
    return done.stdout


@pytest.mark.parametrize("dtype", [dtype for dtype in (torch.float32, torch.bfloat16) if kernels.has_onednn(dtype)])
@pytest.mark.parametrize("packed", [False, True])
def test_onednn_linear_computes_f_linear(dtype, packed):
    x, weight, bias = tensors(dtype)
    y = kernels.onednn_linear(x, kernels.prepack(weight) if packed else weight, bias)
    torch.testing.assert_close(y.float(), F.linear(x.float(), weight.float(), bias.float()), rtol=0.02, atol=0.2)


@needs_int8
def test_int8_product_is_the_exact_integer_product_times_the_scale():
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (3, 64), generator=generator, dtype=torch.uint8)
    weight = torch.randint(-127, 128, (32, 64), generator=generator, dtype=torch.int8)
    scale = torch.rand(32, generator=generator)
    packed, zero_points = kernels.prepack_int8(weight), torch.zeros(32, dtype=torch.int32)
    expected = (x.int() - 128) @ weight.int().T * scale
    torch.testing.assert_close(kernels.int8_product(x, packed, scale, zero_points), expected)


PRODUCTS = """
import torch, torch.nn.functional as F
x, weight = torch.randn(64, 512), torch.randn(256, 512)
F.linear(x, weight)
print("bf16", flush=True)
F.linear(x.bfloat16(), weight.bfloat16())
"""


@needs_onednn
def test_torchs_own_linear_still_needs_the_private_operators():
    """When this fails, torch sends fp32 to oneDNN, or prepacks bf16 weights, by itself: remove the workaround."""
    fp32, bf16 = run(PRODUCTS, ONEDNN_VERBOSE="1").split("bf16\n", 1)
    assert "primitive,exec" not in fp32  # fp32 goes to MKL
    if "primitive,exec" in bf16:
        assert "wei:bf16::blocked:ba::" in bf16  # bf16 goes to oneDNN, and reads the weight in its plain layout
    with pytest.raises(NotImplementedError):
        F.linear(tensors()[0], kernels.prepack(tensors()[1]))


def test_torch_still_has_no_int8_product_with_a_wider_result():
    """When this fails, `torch.matmul` may replace the private int8 product."""
    assert torch.matmul(torch.ones(4, 4, dtype=torch.int8), torch.ones(4, 4, dtype=torch.int8)).dtype == torch.int8


RESIDENT = """
import os, sys, torch
from gpt2core.kernels import lazy_zeros

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

before = resident()
zeros = lazy_zeros((64, 2**20), torch.float32, torch.device("cpu")) if sys.argv[1] == "lazy" else torch.zeros(64, 2**20)
print(resident() - before)
"""


@needs_proc
def test_lazy_zeros_take_no_memory_and_torchs_still_do():
    MiB = 2**20
    assert int(run(RESIDENT, "lazy")) < 64 * MiB  # of 256 MiB
    assert int(run(RESIDENT, "torch")) > 192 * MiB


FREED = """
import sys, torch
from contextlib import nullcontext
from gpt2core.kernels import returning_freed_memory

def allocated():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon"))

torch.ones(2**22)  # 16 MiB: when it is freed, glibc begins to keep blocks of up to that size
before = allocated()
with returning_freed_memory() if sys.argv[1] == "return" else nullcontext():
    temporary = [torch.ones(2**20) for _ in range(32)]  # 128 MiB
    kept = torch.ones(2**14)  # behind them in memory
    del temporary
print((allocated() - before) * 1024)
"""


@needs_proc
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library's allocator")
def test_freed_memory_is_returned_and_still_kept_by_default():
    assert int(run(FREED, "return")) < 16 * 2**20
    assert int(run(FREED, "keep")) > 16 * 2**20


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lazy_zeros_are_writable_zeros(dtype):
    zeros = kernels.lazy_zeros((3, 5), dtype, torch.device("cpu"))
    assert (zeros.shape, zeros.dtype) == ((3, 5), dtype)
    assert not zeros.any()
    zeros += 1
    assert (zeros == 1).all()


@pytest.mark.parametrize("is_valid", [True, False], ids=["valid", "invalid"])
def test_a_failed_capture_is_ended_and_its_memory_released_once(monkeypatch, is_valid):
    """With a stand-in for torch's graphs: `capture_end` of an invalid capture raises before it tells the allocator."""
    recording, released = [], []
    states = ["counts for a capture"]  # of the device's generator of random numbers

    class Graph:
        def capture_begin(self, pool, capture_error_mode):
            recording.append(pool)

        def capture_end(self):
            if not is_valid:
                raise RuntimeError("CUDA error: operation failed due to a previous error during capture")
            recording.remove((0, 7))
            released.append("by the graph")

    def end(device, pool):
        if pool not in recording:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        recording.remove(pool)

    def compute():
        raise ValueError("not computable")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    for name in ("device", "stream"):
        monkeypatch.setattr(torch.cuda, name, lambda _: nullcontext())
    monkeypatch.setattr(kernels, "_capture_stream", lambda device: None)
    assert hasattr(torch.Generator, "clone_state")
    assert hasattr(torch.Generator, "graphsafe_set_state")
    generator = SimpleNamespace(clone_state=lambda: "new", graphsafe_set_state=states.append)
    monkeypatch.setattr(torch.cuda, "default_generators", [generator])
    assert hasattr(torch._C, "_cuda_endAllocateToPool")
    assert hasattr(torch._C, "_cuda_releasePool")
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", end)
    monkeypatch.setattr(torch._C, "_cuda_releasePool", lambda device, pool: released.append("by us"))
    with pytest.raises(ValueError, match="not computable"):
        kernels.capture_graph(compute, torch.device("cuda", 0), (0, 7))
    assert not recording
    assert released == ["by the graph" if is_valid else "by us"]
    assert states[1:] == ([] if is_valid else ["new"])


def test_the_first_capture_starts_without_garbage(monkeypatch):
    """Autograd nodes in a reference cycle would keep the default stream, which invalidates a capture."""

    class Cycle:
        def __init__(self):
            self.itself = self

    class Graph:
        def capture_begin(self, pool, capture_error_mode):
            pass

        def capture_end(self):
            pass

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 7))
    for name in ("device", "stream"):
        monkeypatch.setattr(torch.cuda, name, lambda _: nullcontext())
    monkeypatch.setattr(kernels, "_capture_stream", lambda device: None)
    garbage = weakref.ref(Cycle())
    _, is_collected = kernels.capture_graph(lambda: garbage() is None, torch.device("cuda", 0))
    assert is_collected


def test_a_capture_that_waits_for_another_leaves_the_garbage_collector_enabled(monkeypatch):
    """The engine's thread and a training can capture at the same time."""
    has_started = threading.Event()
    graph = SimpleNamespace(capture_begin=lambda **_: None, capture_end=lambda: None)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: has_started.set() or graph)
    for name in ("device", "stream"):
        monkeypatch.setattr(torch.cuda, name, lambda _: nullcontext())
    monkeypatch.setattr(kernels, "_capture_stream", lambda device: None)
    arguments = (lambda: None, torch.device("cuda", 0), (0, 7))
    waiting = threading.Thread(target=kernels.capture_graph, args=arguments, daemon=True)

    def compute():
        has_started.clear()
        waiting.start()
        assert has_started.wait(60)
        time.sleep(0.1)  # until it waits for the lock

    kernels.capture_graph(compute, *arguments[1:])
    waiting.join(60)
    try:
        assert gc.isenabled()
    finally:
        gc.enable()


THREADS = """
import os, sys, time, torch
from concurrent.futures import ThreadPoolExecutor
from gpt2core.checkpoint import load_pretrained
from gpt2core.config import GenerationConfig
from gpt2core.engine import Engine
torch.set_num_threads(2)

def n_threads():
    return len(os.listdir("/proc/self/task"))

def settles_at(expected):  # threads that have ended take a moment to disappear
    last = time.monotonic() + 30
    while n_threads() != expected and time.monotonic() < last:
        time.sleep(0.01)
    return n_threads() == expected

def compute():
    torch.rand(512, 512) @ torch.rand(512, 512)

Engine._run = lambda self: None  # decodes nothing
engine = Engine(load_pretrained(sys.argv[1]), 1, "fp32")
engine.start()
with ThreadPoolExecutor(1) as pool:  # its thread lives on, as a server's does
    pool.submit(int).result()
    engine.submit([1], GenerationConfig())
    time.sleep(0.5)
    before = n_threads()
    compute()
    assert n_threads() > before, "computing starts no worker"
    engine.submit([1], GenerationConfig())
    assert settles_at(before), "submit keeps the workers"
    pool.submit(engine.load_adapter, "x", sys.argv[2]).result()
    assert settles_at(before), "load_adapter keeps the workers"
"""


@needs_proc
def test_threads_that_submit_or_load_adapters_keep_no_openmp_workers(tmp_path):
    """The first assertion in THREADS fails when OpenMP keeps no workers any more: remove the workaround."""
    if kernels._openmp() is None:
        pytest.skip("torch does not use GNU's OpenMP here")
    config = GPT2Config(vocab_size=97, n_positions=64, n_embd=128, n_layer=1, n_head=4)
    base = save_pretrained(GPT2(config), tmp_path / "base")
    adapter = save_random_adapter(GPT2(config), LoraConfig(rank=128), 0, tmp_path / "adapter")  # uses two threads
    run(THREADS, str(base), str(adapter))
