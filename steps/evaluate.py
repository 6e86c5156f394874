"""Generates the answers that all later steps use: scores, comparison, report, and verification of the service."""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Annotated

from zenml import step

from gpt2core.checkpoint import load_adapter, load_pretrained
from gpt2core.data import Record
from gpt2core.evaluate import compare_answers
from gpt2core.evaluate import evaluate as evaluate_model
from gpt2core.lora import merge_lora
from gpt2core.model import best_device
from gpt2core.tokenizer import load_tokenizer
from gpt2core.types import Evaluation, Sample, TrainSummary
from steps.adapters.base import open_base, read_base
from steps.adapters.progress import counting_progress
from steps.adapters.rouge import rouge_l
from steps.adapters.statistics import with_intervals
from steps.cache import code_of
from steps.config import EvaluateConfig
from steps.materializers import SampleListMaterializer
from steps.metadata import attach_metadata

logger = logging.getLogger(__name__)


@step(cache_policy=code_of(__name__), output_materializers={"samples": SampleListMaterializer})
def evaluate(
    test_records: list[Record], base: Path, adapter: Path, train_summary: TrainSummary, evaluate: EvaluateConfig
) -> tuple[Annotated[list[Sample], "samples"], Annotated[Evaluation, "metrics"]]:
    """Generate greedy answers of the base and of the tuned model to the test split, and score them."""
    base_dir, device = open_base(base), best_device()
    tokenizer, model = load_tokenizer(base_dir), load_pretrained(base_dir, device=device)
    limits = (evaluate.max_new_tokens, evaluate.batch_size, rouge_l)
    with counting_progress("evaluate base", len(test_records)) as show:
        before = evaluate_model(model, tokenizer, test_records, *limits, show)
    cut = sum(answer.reference_tokens - 1 > evaluate.max_new_tokens for answer in before.answers)  # 1: end of text
    if cut:
        logger.warning(
            "%d of %d test records have outputs of more than evaluate.max_new_tokens=%d tokens: no answer equals them",
            *(cut, len(test_records), evaluate.max_new_tokens),
        )
    merge_lora(load_adapter(model, adapter, read_base(base).sha256))  # merged, as the service does
    with counting_progress("evaluate tuned", len(test_records)) as show:
        after = evaluate_model(model, tokenizer, test_records, *limits, show)
    samples, evaluation = compare_answers(test_records, before, after, train_summary)
    evaluation = with_intervals(samples, replace(evaluation, device=device.type))
    attach_metadata("metrics", evaluation.to_json())
    return samples, evaluation
