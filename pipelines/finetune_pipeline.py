"""The main pipeline, from instruction records to a deployed service; configuration classes have the defaults."""

from dataclasses import replace
from typing import Annotated

from pydantic import Field
from zenml import Model, pipeline
from zenml.enums import ExecutionMode

from deploy.config import DeployConfig
from gpt2core.config import LoraConfig, TrainConfig
from gpt2core.types import NAME
from steps.compare import compare
from steps.config import (
    BaseConfig,
    DataConfig,
    EvaluateConfig,
    JudgeConfig,
    PackageConfig,
    PromoteConfig,
    TrackingConfig,
)
from steps.deploy import deploy as deploy_step
from steps.evaluate import evaluate as evaluate_step
from steps.export_outputs import export_outputs
from steps.fetch_data import fetch_step
from steps.finetune import finetune
from steps.package import package as package_step
from steps.prepare_base import prepare_base
from steps.promote import promote as promote_step
from steps.report import report as report_step
from steps.split_data import split_data

Seed = Annotated[int, Field(ge=0, lt=2**63)]


@pipeline(
    execution_mode=ExecutionMode.FAIL_FAST,
    model=Model(name=NAME, description="GPT-2 with a LoRA adapter for instructions"),
)
def finetune_pipeline(
    seed: Seed = 0,
    data: DataConfig = DataConfig(),
    base: BaseConfig = BaseConfig(),
    lora: LoraConfig = LoraConfig(),
    train: TrainConfig = TrainConfig(),
    evaluate: EvaluateConfig = EvaluateConfig(),
    promote: PromoteConfig = PromoteConfig(),
    package: PackageConfig = PackageConfig(),
    deploy: DeployConfig = DeployConfig(),
    tracking: TrackingConfig = TrackingConfig(),
) -> None:
    """Finetune an adapter on instruction data; evaluate, package, promote and deploy it."""
    if lora.dora:  # the service does not merge adapters, and the engine cannot apply an unmerged DoRA
        raise ValueError("lora.dora is true, but the service cannot serve DoRA; set it to false")
    base.check_rank_early(lora)
    data.check_patience_early(train)
    base, base_sha256 = base.resolved()
    records = fetch_step(data)(data, base, seed, base_sha256)
    train_records, val_records, test_records, split = split_data(records, data, seed, train.patience)
    # Runs after the split, so that wrong data fails before pretraining.
    base_dir = prepare_base(base, data.n_facts, seed, base_sha256, after="split_data")
    adapter, history, train_summary = finetune(
        train_records, val_records, base_dir, lora, replace(train, seed=seed), tracking
    )
    # The judge runs in `compare`, so that a change of it does not repeat evaluation, packaging and deployment.
    unjudged = replace(evaluate, judge=JudgeConfig())
    samples, metrics = evaluate_step(test_records, base_dir, adapter, train_summary, unjudged)
    compared, comparison, same_as = compare(samples, test_records, adapter, evaluate, promote)
    page, report_json, curves = report_step(
        compared, metrics, comparison, history, train_records, val_records, test_records, tracking
    )
    bento, lineage = package_step(base_dir, adapter, samples, metrics, split, package, unjudged)
    # Runs after `package`, which verifies the service's answers.
    promotion = promote_step(comparison, same_as, metrics, promote, after="package")
    deploy_step(bento, lineage, samples, promotion, deploy, package, evaluate)
    export_outputs(
        compared,
        metrics,
        split,
        page,
        report_json,
        curves,
        base_dir,
        adapter,
        lineage,
        promotion,
        comparison,
        promote,
    )
