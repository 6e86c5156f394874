"""Overhead of the pipeline, and the quality of the model it produces in other weight formats."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from math import exp
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
import torch.nn.functional as F

from gpt2core.checkpoint import load_adapter, load_pretrained
from gpt2core.config import GenerationConfig, WeightFormat
from gpt2core.data import Example, encode_records
from gpt2core.engine import Engine
from gpt2core.inference.quantized import QuantizedModel
from gpt2core.lora import merge_lora
from gpt2core.model import GPT2
from gpt2core.tokenizer import load_tokenizer

ROOT = Path(__file__).parent.parent
WORK = ("prepare_base", "finetune", "evaluate")
# prints the duration of each step of the newest run, as ZenML recorded it
STEPS = """
import json
from zenml.client import Client
run = Client().list_pipeline_runs(sort_by="desc:created").items[0]
print(json.dumps({name: (step.end_time - step.start_time).total_seconds() for name, step in run.steps.items()}))
"""


def run_cold(config: str, home: Path) -> tuple[float, float, Path]:
    """Run the pipeline in an empty home directory; return its seconds, those of the steps in WORK, and its outputs."""
    home.mkdir()
    names = ("PATH", "LANG", "TMPDIR", "INSTRUCTION_DATA", "TIKTOKEN_CACHE_DIR")
    environment = {name: os.environ[name] for name in names if name in os.environ}
    environment |= {"HOME": str(home), "GPT2_INSTRUCT_OUTPUTS": str(home / "outputs"), "PYTHONPATH": str(ROOT)}
    environment |= {"ZENML_ANALYTICS_OPT_IN": "false"}

    def python(*arguments: str) -> str:
        command = [sys.executable, *arguments]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, encoding="utf-8")
        if done.returncode:
            raise RuntimeError(f"{' '.join(arguments)} failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
        return done.stdout

    start = perf_counter()
    python("run.py", "finetune", "--config", config)
    seconds = perf_counter() - start
    steps = json.loads(python("-c", STEPS).splitlines()[-1])
    return seconds, sum(steps[name] for name in WORK), home / "outputs" / "latest"


class Quality:
    """The model of a run on its test split, in several weight formats."""

    def __init__(self, run: Path) -> None:
        self.model: GPT2 = merge_lora(load_adapter(load_pretrained(run / "base"), run / "adapter"))
        self.tokenizer = load_tokenizer(run / "base")
        records: list[dict[str, Any]] = [json.loads(line) for line in (run / "samples.jsonl").open(encoding="utf-8")]
        self.examples: Sequence[Example] = encode_records(records, self.tokenizer, self.model.config.n_positions)
        self.prompts = [example.input_ids[: example.prompt_length] for example in self.examples]

    @torch.inference_mode()
    def perplexity(self, weights: WeightFormat) -> float:
        """Perplexity per token of the references."""
        quantized, loss, count = QuantizedModel(self.model, weights), 0.0, 0
        for example in self.examples:
            ids = torch.tensor(example.input_ids[:-1])
            logits = quantized.logits(quantized.hidden(ids, torch.arange(len(ids))))
            first = example.prompt_length - 1
            labels = torch.tensor(example.input_ids[example.prompt_length :])
            loss += float(F.cross_entropy(logits[first:], labels, reduction="sum"))
            count += len(labels)
        return exp(loss / count)

    def completions(self, weights: WeightFormat) -> list[list[int]]:
        """Greedy completions of the test prompts, as token ids."""
        config = GenerationConfig(max_new_tokens=32, eos_id=self.tokenizer.eot_token)
        with Engine(self.model, weights=weights) as engine:
            return [request.result() for request in [engine.submit(prompt, config) for prompt in self.prompts]]
