"""Finetuning on several devices. This process is rank 0, and starts one process for each other device of this machine.

torchrun starts the processes itself, also on several machines. Under torchrun, this process joins their group instead.
"""

import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from gpt2core.checkpoint import load_pretrained
from gpt2core.config import LoraConfig, TrainConfig
from gpt2core.data import Example
from gpt2core.lora import add_lora
from gpt2core.model import GPT2
from gpt2core.train import Log, TrainResult, finetune


def finetune_adapter(
    base_dir: str | Path,
    lora: LoraConfig,
    train: Sequence[Example],
    val: Sequence[Example],
    config: TrainConfig,
    log: Log | None = None,
    checkpoint_dir: str | Path | None = None,
) -> tuple[GPT2, TrainResult]:
    """Load the base and finetune an adapter on it with `gpt2core.train.finetune`, on `config.devices` devices.

    Under torchrun, every process calls this, and all processes get the same adapter.

    Raises:
        ValueError: `config.devices` exceeds the number of GPUs (without a GPU: of CPU cores), or is not 1 under
            torchrun; otherwise as `finetune`.
        RuntimeError: another process ended early.
    """
    with _process_group(config.devices, base_dir, lora, train, val, config, checkpoint_dir):
        model = _model(local_rank(), base_dir, lora, config)
        return model, finetune(model, train, val, config, log, checkpoint_dir)


def rank() -> int:
    """Return the rank of this process under torchrun, else 0."""
    return int(os.environ["RANK"]) if dist.is_torchelastic_launched() else 0


def local_rank() -> int:
    """Return the rank of this process among the processes of this machine under torchrun, else 0."""
    return int(os.environ["LOCAL_RANK"]) if dist.is_torchelastic_launched() else 0


def _model(rank: int, base_dir: str | Path, lora: LoraConfig, config: TrainConfig) -> GPT2:
    device = torch.device("cuda", rank) if torch.cuda.is_available() else torch.device("cpu")
    return add_lora(load_pretrained(base_dir, device=device), lora, config.seed)


@contextmanager
def _process_group(devices: int, *arguments: object) -> Iterator[None]:
    if dist.is_torchelastic_launched():
        with _torchrun_group(devices):
            yield
        return
    if devices == 1:
        yield
        return
    on_gpu = torch.cuda.is_available()
    available = torch.cuda.device_count() if on_gpu else os.cpu_count() or 1
    if devices > available:
        raise ValueError(f"train.devices is {devices}, but there are {available} {'GPUs' if on_gpu else 'CPU cores'}")
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{listener.getsockname()[1]}"
    threads = torch.get_num_threads()
    others = mp.spawn(_work, (address, devices, *arguments), nprocs=devices - 1, join=False)
    try:
        _join(0, address, devices)
        yield
        dist.barrier()
        others.join()
    except RuntimeError as error:  # of gloo or NCCL, which do not say that another process has ended
        try:
            others.join(10)
        except (mp.ProcessRaisedException, mp.ProcessExitedException) as ended:
            reason = str(ended).strip().splitlines()[-1]
            hint = "; the machine may have run out of memory" if "SIGKILL" in reason else ""
            raise RuntimeError(f"a training process ended early: {reason}{hint}") from error
        raise
    finally:
        for process in others.processes:  # after an error in this process, the others would wait forever
            process.kill()
            process.join()
        if dist.is_initialized():
            dist.destroy_process_group()
        torch.set_num_threads(threads)


@contextmanager
def _torchrun_group(devices: int) -> Iterator[None]:
    if devices != 1:
        raise ValueError(f"train.devices is {devices}; leave it at 1, since torchrun starts the processes")
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank())
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")  # from torchrun's environment variables
    try:
        yield
        dist.barrier()
    finally:
        dist.destroy_process_group()


def _join(rank: int, address: str, devices: int) -> None:
    if torch.cuda.is_available():
        torch.cuda.set_device(rank)
    else:
        torch.set_num_threads(max(1, torch.get_num_threads() // devices))  # the processes share the cores
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, init_method=address, rank=rank, world_size=devices)


def _work(
    index: int,
    address: str,
    devices: int,
    base_dir: str | Path,
    lora: LoraConfig,
    train: Sequence[Example],
    val: Sequence[Example],
    config: TrainConfig,
    checkpoint_dir: str | Path | None,
) -> None:
    rank = index + 1
    _join(rank, address, devices)
    finetune(_model(rank, base_dir, lora, config), train, val, config, None, checkpoint_dir)
    dist.barrier()  # rank 0 has all results
    os._exit(0)  # a normal exit sometimes destroys gloo's threads while they run, which aborts
