"""The pipeline of experiments; its steps depend on the configuration (`pipelines/trials.py`)."""

from zenml import pipeline
from zenml.enums import ExecutionMode

from gpt2core.config import AttentionConfig, GenerationConfig, LoraConfig, PretrainConfig, TrainConfig
from pipelines.finetune_pipeline import Seed
from pipelines.trials import TRIALS
from pipelines.variants import variants_of
from steps.compare_trials import compare_trials
from steps.config import BaseConfig, DataConfig, ModelConfig, SweepConfig, TextConfig, TrackingConfig


@pipeline(execution_mode=ExecutionMode.FAIL_FAST)
def sweep_pipeline(
    sweep: SweepConfig,
    seed: Seed = 0,
    data: DataConfig = DataConfig(),
    base: BaseConfig = BaseConfig(),
    lora: LoraConfig = LoraConfig(),
    train: TrainConfig = TrainConfig(),
    generation: GenerationConfig = GenerationConfig(),
    text: TextConfig = TextConfig(),
    model: ModelConfig = ModelConfig(),
    pretrain: PretrainConfig = PretrainConfig(),
    attention: AttentionConfig = AttentionConfig(),
    tracking: TrackingConfig = TrackingConfig(),
) -> None:
    """Run every variant with every seed in independent steps, which may run in parallel; then compare them."""
    given = {
        **{"data": data, "base": base, "lora": lora, "train": train, "generation": generation},
        **{"text": text, "model": model, "pretrain": pretrain, "attention": attention},
    }
    add_trial = TRIALS[sweep.kind](sweep, seed, tracking)
    trials = [
        add_trial(label, parameters, trial_seed)
        for label, parameters in variants_of(sweep, given).items()
        for trial_seed in sweep.seeds
    ]
    compare_trials(trials, sweep)
