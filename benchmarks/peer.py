"""The peers: Hugging Face transformers and PEFT, used as their documentation recommends."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import GenerationConfig, GPT2LMHeadModel

from gpt2core.data import Example


class Decoder:
    """`generate` with its KV cache, greedy, to a fixed length; in fp32 or bf16, whichever is faster for `prompts`."""

    def __init__(self, directory: Path, prompts: Sequence[Sequence[int]], device: str = "cpu") -> None:
        tried = []
        for dtype in (torch.float32, torch.bfloat16):
            self.model = GPT2LMHeadModel.from_pretrained(directory, dtype=dtype, device_map=device).eval()
            self.decode(prompts, 4)
            start = perf_counter()
            self.decode(prompts, 16)
            tried.append((perf_counter() - start, str(dtype).removeprefix("torch."), self.model))
        _, self.dtype, self.model = min(tried, key=lambda one: one[0])

    @torch.inference_mode()
    def decode(self, prompts: Sequence[Sequence[int]], n_new: int) -> list[list[int]]:
        """Generate new tokens for each prompt. All prompts form one batch, padded on the left."""
        longest = max(map(len, prompts))
        ids = torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts])
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        # the model's own config would stop at end of text
        self.model.generation_config = GenerationConfig(pad_token_id=0, eos_token_id=None)
        out = self.model.generate(
            input_ids=ids.to(self.model.device),
            attention_mask=mask.to(self.model.device),
            max_new_tokens=n_new,
            do_sample=False,
            use_cache=True,
        )
        completions: list[list[int]] = out[:, longest:].tolist()
        return completions

    def rate(self, prompts: Sequence[Sequence[int]], n_new: int, batch_size: int) -> float:
        """Throughput in new tokens/s, prompt processing included in the time."""
        start = perf_counter()
        batches = [prompts[i : i + batch_size] for i in range(0, len(prompts), batch_size)]
        n_tokens = sum(len(completion) for batch in batches for completion in self.decode(batch, n_new))
        return n_tokens / (perf_counter() - start)

    def weights(self) -> str:
        return self.dtype


class Trainer:
    """PEFT's LoRA on c_attn and AdamW; bf16 is a bf16 base with PEFT's fp32 adapter, or autocast over an fp32 base."""

    def __init__(self, directory: Path, dtype: torch.dtype, autocast: bool = False, device: str = "cpu") -> None:
        self.device = device
        # our side has no dropout; transformers' GPT-2 has one of 0.1 unless the checkpoint's config says otherwise
        dropout: dict[str, Any] = dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), 0.0)
        base = GPT2LMHeadModel.from_pretrained(directory, dtype=dtype, device_map=device, **dropout)
        base.config.use_cache = False
        lora = LoraConfig(
            r=8, lora_alpha=16, target_modules=["c_attn"], fan_in_fan_out=True, task_type="CAUSAL_LM", lora_dropout=0.0
        )
        self.model, self.autocast = get_peft_model(base, lora).train(), autocast
        trained = [weight for weight in self.model.parameters() if weight.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-3, fused=True)  # as transformers' Trainer and our side

    def train(self, examples: Sequence[Example], batch_size: int) -> float:
        """Throughput in tokens/s over all batches, padding not counted."""
        n_tokens = 0
        start = perf_counter()
        for ids, mask, labels in _batches(examples, batch_size):
            n_tokens += int(mask.sum()) - len(
                ids
            )  # the last token of a record is a label only; our side counts the same way
            ids, mask, labels = (part.to(self.device) for part in (ids, mask, labels))
            bf16 = torch.autocast(self.device, torch.bfloat16)
            context: AbstractContextManager = bf16 if self.autocast else nullcontext()
            with context:
                loss = self.model(input_ids=ids, attention_mask=mask, labels=labels).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()
        if self.device == "cuda":
            torch.cuda.synchronize()
        return n_tokens / (perf_counter() - start)


def best_trainer(directory: Path, precision: str, examples: Sequence[Example], batch_size: int) -> Trainer:
    """Choose for bf16 the faster of a bf16 base and autocast, measured on one batch each."""
    if precision == "fp32":
        return Trainer(directory, torch.float32)
    tried = []
    for dtype, autocast in ((torch.bfloat16, False), (torch.float32, True)):
        trainer = Trainer(directory, dtype, autocast)
        trainer.train(examples[:batch_size], batch_size)
        tried.append((trainer.train(examples[:batch_size], batch_size), trainer))
    return max(tried, key=lambda one: one[0])[1]


def _batches(examples: Sequence[Example], batch_size: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Build a batch, padded on the right to the longest record. The labels are the tokens of the response."""
    for start in range(0, len(examples), batch_size):
        part = examples[start : start + batch_size]
        longest = max(len(example.input_ids) for example in part)
        ids = torch.zeros(len(part), longest, dtype=torch.long)
        mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
        for row, example in enumerate(part):
            n = len(example.input_ids)
            ids[row, :n] = torch.tensor(example.input_ids)
            mask[row, :n] = 1
            labels[row, example.prompt_length : n] = ids[row, example.prompt_length : n]
        yield ids, mask, labels
