"""Peak memory of finetuning with one side, in bytes; run in its own process.

`python -m benchmarks.memory ours|peer DIRECTORY LENGTH`
"""

import sys
from pathlib import Path

import torch

from gpt2core.checkpoint import load_pretrained
from gpt2core.config import LoraConfig, TrainConfig
from gpt2core.data import Example
from gpt2core.lora import add_lora
from gpt2core.train import finetune

BATCH_SIZE, STEPS = 8, 2


def main(side: str, directory: Path, length: int) -> None:
    examples = [
        Example([(7 * i + t) % 1000 + 1 for t in range(length)], length // 2) for i in range(BATCH_SIZE * STEPS)
    ]
    if side == "ours":
        model = add_lora(load_pretrained(directory, torch.bfloat16), LoraConfig(), seed=0)
        config = TrainConfig(epochs=1, batch_size=BATCH_SIZE, precision="bf16-mixed", learning_rate=1e-3)
        finetune(model, examples, [], config)
    else:
        from benchmarks.peer import Trainer  # imported here, so that our side does not load the peer's libraries

        Trainer(directory, torch.bfloat16).train(examples, BATCH_SIZE)
    # not ru_maxrss, which includes the parent's memory at the time of the fork
    status = Path("/proc/self/status").read_text().split()
    print(int(status[status.index("VmHWM:") + 1]) * 1024)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
