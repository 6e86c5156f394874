"""Memory of finetuning or serving with one side, in bytes; run in its own process.

`python -m benchmarks.memory finetune|finetune-peer|serve|serve-peer MODEL LENGTH`
"""

import os
import sys
from collections.abc import Callable
from pathlib import Path

# The functions import what they need, so that no side loads the libraries of another side.

BATCH_SIZE, STEPS = 8, 2
N_REQUESTS, N_NEW = 16, 32


def finetuning(directory: Path, length: int) -> int:
    """Measure peak memory of finetuning a checkpoint on records of this length."""
    import torch

    from gpt2core.checkpoint import load_pretrained
    from gpt2core.config import LoraConfig, TrainConfig
    from gpt2core.data import Example
    from gpt2core.lora import add_lora
    from gpt2core.train import finetune

    model = add_lora(load_pretrained(directory, torch.bfloat16), LoraConfig(), seed=0)
    config = TrainConfig(epochs=1, batch_size=BATCH_SIZE, precision="bf16-mixed", learning_rate=1e-3)
    finetune(model, [Example(ids, length // 2) for ids in _texts(BATCH_SIZE * STEPS, length)], [], config)
    return _status("VmHWM")


def finetuning_with_peft(directory: Path, length: int) -> int:
    import torch

    from benchmarks.peer import Trainer
    from gpt2core.data import Example

    examples = [Example(ids, length // 2) for ids in _texts(BATCH_SIZE * STEPS, length)]
    Trainer(directory, torch.bfloat16).train(examples, BATCH_SIZE)
    return _status("VmHWM")


def serving(directory: Path, length: int) -> int:
    """Measure memory of the engine after it has decoded requests together, with prompts of half this length."""
    from benchmarks.sides import Ours

    engine = Ours(directory)
    engine.rate(_texts(N_REQUESTS, length // 2), N_NEW)
    engine.close()
    return _status("VmRSS")


def serving_with_llama_cpp(file: Path, length: int) -> int:
    from benchmarks.engines import LlamaCpp

    engine = LlamaCpp(file, N_REQUESTS, len(os.sched_getaffinity(0)))
    engine.rate(_texts(N_REQUESTS, length // 2), N_NEW)
    return _status("VmRSS")


def _texts(n: int, length: int) -> list[list[int]]:
    return [[(7 * i + t) % 1000 + 1 for t in range(length)] for i in range(n)]


def _status(field: str) -> int:
    # not ru_maxrss, which includes the parent's memory at the time of the fork
    status = Path("/proc/self/status").read_text(encoding="utf-8").split()
    return int(status[status.index(f"{field}:") + 1]) * 1024


SIDES: dict[str, Callable[[Path, int], int]] = {
    "finetune": finetuning,
    "finetune-peer": finetuning_with_peft,
    "serve": serving,
    "serve-peer": serving_with_llama_cpp,
}

if __name__ == "__main__":
    print(SIDES[sys.argv[1]](Path(sys.argv[2]), int(sys.argv[3])))
