from pathlib import Path
from typing import Annotated, Any

from zenml import step

from gpt2core.checkpoint import load_adapter, load_pretrained
from gpt2core.evaluate import compare_answers
from gpt2core.evaluate import evaluate as answer_and_score
from gpt2core.lora import merge_lora
from gpt2core.model import best_device
from gpt2core.tokenizer import load_tokenizer
from gpt2core.types import TrainSummary
from steps.adapters.base import open_base
from steps.adapters.progress import counting
from steps.adapters.rouge import rouge_l
from steps.cache import code_of
from steps.config import EvaluateConfig
from steps.metadata import describe


@step(cache_policy=code_of(__name__))
def evaluate(
    test_records: list[dict[str, str]],
    base: Path,
    adapter: Path,
    train_metrics: dict[str, float | None],
    evaluate: EvaluateConfig,
) -> tuple[Annotated[list[dict[str, Any]], "samples"], Annotated[dict[str, Any], "metrics"]]:
    """Greedy answers of the base and of the tuned model to the test split, row by row, and their scores."""
    base_dir = open_base(base)
    tokenizer, model = load_tokenizer(base_dir), load_pretrained(base_dir, device=best_device())
    limits = (evaluate.max_new_tokens, evaluate.batch_size, rouge_l)
    with counting("base model's answers", len(test_records)) as show:
        before = answer_and_score(model, tokenizer, test_records, *limits, show)
    merge_lora(load_adapter(model, adapter))  # as it is served
    with counting("tuned model's answers", len(test_records)) as show:
        after = answer_and_score(model, tokenizer, test_records, *limits, show)
    samples, evaluation = compare_answers(test_records, before, after, TrainSummary.from_json(train_metrics))
    describe("metrics", evaluation.to_json())
    return [sample.to_json() for sample in samples], evaluation.to_json()
