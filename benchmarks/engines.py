"""Alternative engines: llama.cpp, CTranslate2 and OpenVINO GenAI, each with its own file of the same model."""

import json
import os
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import mkdtemp
from time import perf_counter
from typing import Any
from unittest.mock import patch

import numpy as np

PROMPT_BATCH = 512  # prompt tokens that llama.cpp computes at once, its default


def find_version(package: str) -> str | None:
    """Return the installed version; None if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def make_gguf(base: Path, kind: str) -> Path:
    """Write the checkpoint `base`, which includes its tokenizer, for llama.cpp. `kind`: q8_0, f16 or f32."""
    from gpt2core.checkpoint import (
        load_pretrained,
    )  # imported here because a process that runs llama.cpp needs no torch
    from steps.adapters.gguf_file import write_gguf

    file = Path(mkdtemp()) / "model.gguf"
    write_gguf(load_pretrained(base), base, file, kind)
    return file


class LlamaCpp:
    """llama.cpp through its C API; decodes all sequences in one batch, like its server."""

    def __init__(self, file: Path, max_batch: int, n_threads: int) -> None:
        """`file`: in GGUF, as `make_gguf` writes it."""
        import llama_cpp

        self.api = llama_cpp
        self.log = llama_cpp.llama_log_callback(lambda level, text, data: None)
        llama_cpp.llama_log_set(self.log, None)
        self.model = llama_cpp.llama_model_load_from_file(str(file).encode(), llama_cpp.llama_model_default_params())
        self.vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        options = llama_cpp.llama_context_default_params()
        options.n_ctx = max_batch * llama_cpp.llama_model_n_ctx_train(self.model)
        options.n_seq_max = max_batch
        options.n_batch = options.n_ubatch = PROMPT_BATCH
        options.n_threads = options.n_threads_batch = n_threads
        self.context = llama_cpp.llama_init_from_model(self.model, options)
        self.batch = llama_cpp.llama_batch_init(PROMPT_BATCH, 0, 1)

    def rate(self, prompts: Sequence[Sequence[int]], n_new: int) -> float:
        """Throughput in new tokens/s, prompt processing included in the time."""
        start = perf_counter()
        n_tokens = sum(map(len, self.generate(prompts, n_new)))
        return n_tokens / (perf_counter() - start)

    def generate(self, prompts: Sequence[Sequence[int]], n_new: int) -> list[list[int]]:
        """Greedy completions of `n_new` tokens."""
        self.api.llama_memory_clear(self.api.llama_get_memory(self.context), True)
        todo = [(seq, i, token, i == len(p) - 1) for seq, p in enumerate(prompts) for i, token in enumerate(p)]
        completions: list[list[int]] = [[] for _ in prompts]
        while todo:
            for start in range(0, len(todo), PROMPT_BATCH):
                part = todo[start : start + PROMPT_BATCH]
                for seq, token in self._decode(part):
                    completions[seq].append(token)
            todo = [
                (seq, len(prompt) + len(tokens) - 1, tokens[-1], True)
                for seq, (prompt, tokens) in enumerate(zip(prompts, completions, strict=True))
                if len(tokens) < n_new
            ]
        return completions

    def _decode(self, part: Sequence[tuple[int, int, int, bool]]) -> list[tuple[int, int]]:
        """Compute (sequence, position, token, whether to predict); returns (sequence, the most likely next token)."""
        batch = self.batch
        batch.n_tokens = len(part)
        for i, (seq, position, token, predicts) in enumerate(part):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, position, 1, predicts
            batch.seq_id[i][0] = seq
        if code := self.api.llama_decode(self.context, batch):
            raise RuntimeError(f"llama_decode returned {code}")
        found = []
        for i, (seq, _, _, predicts) in enumerate(part):
            if predicts:
                logits = self.api.llama_get_logits_ith(self.context, i)
                found.append((seq, int(np.ctypeslib.as_array(logits, (self.vocab_size,)).argmax())))
        return found


class CTranslate2:
    """CTranslate2's Generator, which decodes all sequences in one batch."""

    def __init__(self, base: Path, kind: str, n_threads: int) -> None:
        """
        Args:
            base: a checkpoint with its tokenizer.
            kind: compute type: int8 or float32.
        """
        import ctranslate2
        from ctranslate2.converters import TransformersConverter

        directory = Path(mkdtemp()) / "model"
        TransformersConverter(str(base)).convert(str(directory), quantization=kind)
        self.vocabulary: list[str] = json.loads((directory / "vocabulary.json").read_text(encoding="utf-8"))
        self.generator: Any = ctranslate2.Generator(
            str(directory), device="cpu", compute_type=kind, inter_threads=1, intra_threads=n_threads
        )

    def rate(self, prompts: Sequence[Sequence[int]], n_new: int) -> float:
        """Throughput in new tokens/s, prompt processing included in the time."""
        start = perf_counter()
        n_tokens = sum(map(len, self.generate(prompts, n_new)))
        return n_tokens / (perf_counter() - start)

    def generate(self, prompts: Sequence[Sequence[int]], n_new: int) -> list[list[int]]:
        """Greedy completions of `n_new` tokens."""
        tokens = [[self.vocabulary[id] for id in prompt] for prompt in prompts]
        results = self.generator.generate_batch(
            tokens, max_length=n_new, min_length=n_new, sampling_topk=1, include_prompt_in_result=False, end_token=[]
        )
        return [result.sequences_ids[0] for result in results]


class OpenVino:
    """OpenVINO GenAI: continuous batching for several requests, LLMPipeline for one."""

    def __init__(self, base: Path, kind: str, max_batch: int, n_threads: int) -> None:
        """
        Args:
            base: a checkpoint.
            kind: of the weights: int8, with the precisions that OpenVINO chooses for this processor, or all in f32.
        """
        directory = Path(mkdtemp()) / "model"
        with patch.dict(os.environ, CI="true", NNCF_CI="1"):  # keeps these packages from sending telemetry
            import openvino
            import openvino_genai

            from benchmarks.openvino_model import write_openvino

            write_openvino(base, directory, kind)
        self.api, self.tensor = openvino_genai, openvino.Tensor
        # not pinned: a pinned thread waits for other programs on its core
        options: dict[str, Any] = {"INFERENCE_NUM_THREADS": n_threads, "ENABLE_CPU_PINNING": False}
        if kind == "f32":
            options |= {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}
        self.pipeline: Any
        if max_batch == 1:
            self.pipeline = openvino_genai.LLMPipeline(directory, "CPU", ATTENTION_BACKEND="SDPA", **options)
            self.complete = self._one_by_one
        else:
            scheduler = openvino_genai.SchedulerConfig()
            scheduler.max_num_seqs = max_batch
            scheduler.max_num_batched_tokens = 4096  # prompt tokens at once
            scheduler.cache_size = 1  # GB
            scheduler.enable_prefix_caching = True
            self.pipeline = openvino_genai.ContinuousBatchingPipeline(directory, scheduler, "CPU", options)
            self.complete = self._together

    def rate(self, prompts: Sequence[Sequence[int]], n_new: int) -> float:
        """Throughput in new tokens/s, prompt processing included in the time."""
        start = perf_counter()
        n_tokens = sum(map(len, self.generate(prompts, n_new)))
        return n_tokens / (perf_counter() - start)

    def generate(self, prompts: Sequence[Sequence[int]], n_new: int) -> list[list[int]]:
        """Greedy completions of `n_new` tokens."""
        config = self.api.GenerationConfig(max_new_tokens=n_new, ignore_eos=True)
        return self.complete([self.tensor(np.array([prompt])) for prompt in prompts], config)

    def _one_by_one(self, prompts: Sequence[Any], config: Any) -> list[list[int]]:
        return [self.pipeline.generate(prompt, config).tokens[0] for prompt in prompts]

    def _together(self, prompts: Sequence[Any], config: Any) -> list[list[int]]:
        results = self.pipeline.generate(prompts, [config] * len(prompts))
        return [result.m_generation_ids[0] for result in results]
