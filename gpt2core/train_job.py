"""Finetuning without a pipeline, on one machine or on several: `torchrun -m gpt2core.train_job JOB.json`.

The job is `{"base": DIR, "records": FILE, "out": DIR, "seed": 0, "lora": {…}, "train": {…}}`. torchrun takes the number
of machines and its own rank from its options, or from the variables PET_* that Kubeflow's Trainer sets. All processes
must see the same directories. `python -m gpt2core.train_job` runs the job in one process, with the same losses.

A tenth of the records is the test split, as in the pipeline; it is not trained on, but written for an evaluation.
"""

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gpt2core.checkpoint import read_config, save_adapter
from gpt2core.config import LoraConfig, TrainConfig
from gpt2core.data import encode_records, split_records
from gpt2core.distributed import finetune_adapter, rank
from gpt2core.files import atomic_write, checkpoint_files, directory_sha256, json_bytes
from gpt2core.records import read_records, to_jsonl
from gpt2core.tokenizer import load_tokenizer
from gpt2core.types import BaseRef


@dataclass(frozen=True)
class Job:
    base: str  # a checkpoint directory in Hugging Face's format, with its tokenizer
    records: str  # a file that `read_records` reads
    # directory for adapter/, history.json, test.jsonl, and checkpoints/, from which an interrupted job resumes
    out: str
    seed: int = 0
    lora: dict[str, Any] = field(default_factory=dict)  # arguments of LoraConfig
    train: dict[str, Any] = field(default_factory=dict)  # arguments of TrainConfig


def main(file: str) -> None:
    try:
        run(Job(**json.loads(Path(file).read_text(encoding="utf-8"))))
    except (ValueError, TypeError, OSError) as error:
        sys.exit(f"{file}: {' '.join(str(error).split())}")


def run(job: Job) -> None:
    """Finetune an adapter and write it to `job.out`.

    Raises:
        ValueError, TypeError, OSError: a value, key or file of the job is wrong.
    """
    tokenizer, n_positions = load_tokenizer(job.base), read_config(Path(job.base, "config.json")).n_positions
    split = split_records(read_records(job.records), job.seed)
    train, val = (encode_records(records, tokenizer, n_positions) for records in (split.train, split.val))
    lora, config = LoraConfig(**job.lora), TrainConfig(**({"seed": job.seed} | job.train))
    out = Path(job.out)
    (out / "checkpoints").mkdir(parents=True, exist_ok=True)

    def log(step: int, values: Mapping[str, float]) -> None:
        print(json.dumps({"step": step, **values}), flush=True)

    model, result = finetune_adapter(job.base, lora, train, val, config, log, out / "checkpoints")
    if rank() == 0:
        base = BaseRef(job.base, "", directory_sha256(job.base, checkpoint_files(job.base)))
        save_adapter(model, out / "adapter", base=base.to_json())
        atomic_write(out / "test.jsonl", to_jsonl(split.test))
        atomic_write(out / "history.json", json_bytes(result.history))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m gpt2core.train_job JOB.json, also under torchrun")
    main(sys.argv[1])
