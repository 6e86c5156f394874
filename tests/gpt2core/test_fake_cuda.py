"""Training and decoding on a fake CUDA device: placement of every tensor, and host synchronizations.

torch's `FakeTensorMode` computes shapes, dtypes and devices instead of values. So it runs the code for a GPU where none
is, and fails at a tensor on the wrong device and at a result whose shape depends on values.
"""

import traceback
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map_only

from gpt2core import batching, training_plan
from gpt2core.batching import pack
from gpt2core.config import GenerationConfig, LoraConfig, TrainConfig
from gpt2core.data import Example
from gpt2core.generate import generate
from gpt2core.inference.adapters import Adapter
from gpt2core.inference.graphs import RowDecoder
from gpt2core.inference.quantized import QuantizedModel
from gpt2core.inference.request import Request
from gpt2core.inference.runner import ModelRunner
from gpt2core.inference.scheduler import Scheduler
from gpt2core.lora import add_lora
from gpt2core.model import GPT2
from gpt2core.sampling import Sampler
from gpt2core.step_graphs import StepGraphs, _Graph, add_gradients
from gpt2core.train import finetune

DEVICE = torch.device("cuda", 0)


class FakeCuda(FakeTensorMode):
    """Tensors on DEVICE are fake and others real. `waits`: each time that the host waited for the device, and where.

    What the host reads is ones.
    """

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)
        self.waits: list[str] = []
        self.copies = 0  # from the host, whether it waits or not
        self.kernels = Counter[str]()  # operators that compute something

    def dispatch(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if kwargs.get("device") == torch.device("meta"):  # autograd takes the tensors for meta tensors
            kwargs["device"] = DEVICE
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        host = [x for x in tensors if not isinstance(x, FakeTensor)]
        if host == tensors and kwargs.get("device") != DEVICE:
            with _disable_current_modes():
                return func(*args, **kwargs)
        name = func._schema.name.removeprefix("aten::")
        if name == "_local_scalar_dense" or (name == "_to_copy" and kwargs.get("device") == torch.device("cpu")):
            if not kwargs.get("non_blocking"):
                self._note("read")
            found = torch.ones(tensors[0].shape, dtype=kwargs.get("dtype", tensors[0].dtype))
            return found if name == "_to_copy" else found.item()
        is_copy = name in ("_to_copy", "copy_", "to") and (kwargs.get("non_blocking") or any(x is True for x in args))
        self.copies += any(x.dim() for x in host)
        if any(x.dim() and not (is_copy and hasattr(x, "pinned")) for x in host):
            self._note(f"blocking {name}")
        if not any(one.alias_info and not one.alias_info.is_write for one in func._schema.returns):  # a view
            self.kernels[name] += 1
        args, kwargs = tree_map_only(torch.Tensor, self._as_fake, (args, kwargs))
        return super().dispatch(func, types, args, kwargs)

    def _as_fake(self, tensor):
        if isinstance(tensor, FakeTensor):
            return tensor
        options = {"dtype": tensor.dtype, "device": tensor.device}
        return super().dispatch(torch.ops.aten.empty_strided.default, (), (tensor.shape, tensor.stride()), options)

    def _note(self, what):
        frames = [f for f in traceback.extract_stack() if "gpt2core" in f.filename and "tests" not in f.filename]
        self.waits += [f"{what} in {frame.name}" for frame in frames[-1:]] or [what]


@pytest.fixture
def cuda(monkeypatch):
    def pin(tensor):
        tensor.pinned = True
        return tensor

    make = torch.Tensor._make_subclass
    device = FakeCuda()
    with monkeypatch.context() as patch:
        # not `dispatch_device`: autograd would look for CUDA's device guard, which a CPU build of torch does not have
        make_without = staticmethod(lambda cls, data, requires_grad=False, **_: make(cls, data, requires_grad))
        patch.setattr(torch.Tensor, "_make_subclass", make_without)
        patch.setattr(fake_tensor, "init_gpu_context", lambda device: None)
        patch.setattr(torch.Tensor, "pin_memory", pin)
        patch.setattr(FakeTensor, "tolist", lambda tensor: tensor.cpu().tolist())
        patch.setattr(torch.cuda, "is_available", lambda: True)
        event = SimpleNamespace(synchronize=lambda: device._note("wait"))
        patch.setattr(torch.cuda, "current_stream", lambda _: SimpleNamespace(record_event=lambda: event))
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        # a CUDA build of torch would look for the driver
        patch.setattr(torch.optim.Optimizer, "_accelerator_graph_capture_health_check", lambda _: None)
        patch.setattr(torch.cuda, "is_bf16_supported", lambda *_: True)
        patch.setattr(torch.cuda, "get_rng_state", lambda device: torch.get_rng_state())
        patch.setattr(torch.cuda, "set_rng_state", lambda state, device: None)
        patch.setattr(batching, "has_varlen_attention", lambda *_: True)
        with device:
            yield device


ALL_TARGETS = ("q", "k", "v", "o", "fc", "proj")
CONFIG = TrainConfig(epochs=2, batch_size=4, log_every_steps=3, precision="bf16-mixed")  # 10 steps
EXAMPLES = [Example([7, 8, 9, *range(4 + i % 5)], 4) for i in range(20)]


@pytest.mark.parametrize(
    ("config", "lora"),
    [
        (CONFIG, LoraConfig(rank=2)),
        (replace(CONFIG, gradient_checkpointing=True, precision="fp32"), LoraConfig(rank=2, targets=ALL_TARGETS)),
        (replace(CONFIG, batch_size=2, gradient_accumulation_steps=2), LoraConfig(rank=2, dropout=0.1, b_lr_ratio=4)),
        (replace(CONFIG, precision="bf16-true"), LoraConfig(rank=2, dora=True)),
        (CONFIG, None),
    ],
    ids=["packed", "checkpointing", "accumulation", "dora", "all-weights"],
)
def test_training_waits_for_the_gpu_only_to_log(tiny_config, monkeypatch, cuda, config, lora):
    monkeypatch.setattr(training_plan, "pack", lambda *arguments: cuda.waits.append("pack") or pack(*arguments))
    finetune(make_model(tiny_config, lora), EXAMPLES, [], config)
    packs = ["pack"] * config.gradient_accumulation_steps
    logged = ["read in _read_losses", "read in _step"]  # the losses since the last entry, and the norm of the gradient
    # the next batch is made before the host waits
    assert cuda.waits == [
        *(4 * packs + logged),
        *(3 * packs + logged),
        *(3 * packs + logged),
        *logged,
        "read in check_finite",
    ]


def test_a_graph_of_a_training_step_neither_waits_nor_copies_from_the_host(tiny_config, monkeypatch, cuda):
    """Graphs need a GPU: here each replay computes what was captured."""
    n_replays = 0

    def capture(graphs, batch):
        def replay():
            nonlocal n_replays
            n_replays += 1
            before = [*cuda.waits], cuda.copies
            add_gradients(graphs._model, batch, graphs._n_labels)
            assert ([*cuda.waits], cuda.copies) == before

        return _Graph(SimpleNamespace(replay=replay), batch, torch.zeros((), device=DEVICE))

    monkeypatch.setattr(StepGraphs, "_capture", capture)
    finetune(make_model(tiny_config, LoraConfig(rank=2)), EXAMPLES, [], replace(CONFIG, batch_size=20, epochs=5))
    assert n_replays == 5
    logged = ["read in _read_losses", "read in _step"]
    assert cuda.waits == ["read in _check", *logged, *logged, "read in check_finite"]  # checked once


def test_validation_reads_once(tiny_config, cuda):
    finetune(make_model(tiny_config, LoraConfig(rank=2)), EXAMPLES, EXAMPLES[:7], replace(CONFIG, epochs=1))
    validated = ["read in _read_losses", "read in _step", "read in check_finite", "read in token_losses"]
    assert cuda.waits == [*validated[:2], *validated]


def test_generate_waits_once_per_token(tiny_config, cuda):
    config = GenerationConfig(max_new_tokens=5, temperature=0.7, seed=0)
    generate(make_model(tiny_config, LoraConfig(rank=2)), [[1, 2, 3], [4, 5]], config)
    assert cuda.waits == 5 * ["wait in read"]


def random_adapter(rank):
    a, b = (torch.rand(shape, dtype=torch.bfloat16) for shape in ((rank, 32), (96, rank)))
    return Adapter({(layer, "attn.c_attn"): (a, b) for layer in range(2)})


def make_model(config, lora):
    with DEVICE:
        model = GPT2(config)
    return model if lora is None else add_lora(model, lora)


def test_reading_more_prompts_launches_no_more_kernels(tiny_config, cuda):
    """Apart from copies of cached prefixes, of which each prompt may have one."""
    model = QuantizedModel(make_model(tiny_config, None), "bf16")
    launched = []
    for n in (2, 9):
        scheduler = Scheduler(model, max_batch=16)
        for i in range(n):
            config = GenerationConfig(max_new_tokens=3)
            scheduler.add(Request([i] * (3 + i), Sampler(config, [i], DEVICE), 3, None, None, None, None))
        scheduler.admit()
        with torch.inference_mode():
            cuda.kernels.clear()
            ModelRunner(model, scheduler.row_cache).run(scheduler.next_step())
        launched.append(Counter(cuda.kernels))
    assert launched[1] <= launched[0]  # equal, apart from what FakeTensorMode computes only once
    assert launched[0]["torch_attn::_varlen_attn"] == tiny_config.n_layer


def test_a_decoding_step_waits_once_and_its_graph_never(tiny_config, cuda, monkeypatch):
    """Graphs need a GPU: here the function that they capture runs instead, which may not copy from the host."""
    waits_in_graph = []

    def compute(decoder, *arguments):
        before = [*cuda.waits], cuda.copies
        outputs = compute_rows(decoder, *arguments)
        waits_in_graph.append(([*cuda.waits], cuda.copies) != before)
        return outputs

    compute_rows = RowDecoder._compute
    monkeypatch.setattr(RowDecoder, "_replay", compute)
    with torch.inference_mode():
        model = QuantizedModel(make_model(tiny_config, None), "bf16")
        scheduler = Scheduler(model, max_batch=8)
        runner = ModelRunner(model, scheduler.row_cache)
        with DEVICE:
            adapters = [random_adapter(rank) for rank in (2, 3)]
        configs = [
            GenerationConfig(max_new_tokens=3 + i, temperature=i % 3 * 0.5, top_k=5, top_p=0.9, min_p=0.1, seed=i)
            for i in range(12)
        ]
        for i, config in enumerate(configs):
            prompt = list(range(1, 18 + i))  # longer than a block of the prefix cache
            adapter = [None, *adapters][i % 3]
            sampler = Sampler(config, prompt, DEVICE)
            scheduler.add(Request(prompt, sampler, config.max_new_tokens, adapter, None, None, None))
        n_steps = 0
        while scheduler.admit() or (step := scheduler.next_step()) is not None:
            n_steps += 1
            cuda.waits.clear()
            scheduler.complete_step(step, runner.run(step))
            assert cuda.waits == ["wait in read"]
    assert 12 < len(waits_in_graph) < n_steps + len(configs)  # fewer than one a request are computed again
    assert not any(waits_in_graph)
