"""The pipeline that makes a base from a text; `finetune_pipeline` pretrains gpt2-nano itself and does not need it."""

from zenml import pipeline
from zenml.enums import ExecutionMode

from gpt2core.config import PretrainConfig
from pipelines.finetune_pipeline import Seed
from steps.config import ModelConfig, TextConfig, TrackingConfig
from steps.evaluate_text import evaluate_text
from steps.export_base import export_base
from steps.fetch_text import text_step
from steps.pretrain import pretrain as pretrain_step


@pipeline(execution_mode=ExecutionMode.FAIL_FAST)
def pretrain_pipeline(
    seed: Seed = 0,
    text: TextConfig = TextConfig(),
    model: ModelConfig = ModelConfig(),
    pretrain: PretrainConfig = PretrainConfig(),
    tracking: TrackingConfig = TrackingConfig(),
) -> None:
    """Pretrain a GPT-2 on a text; `finetune_pipeline` can use it as its base."""
    documents = text_step(text)(text, seed)
    base, history, summary = pretrain_step(documents, text, model, pretrain, seed, tracking)
    metrics = evaluate_text(documents, base, summary, text)
    export_base(base, history, metrics)
