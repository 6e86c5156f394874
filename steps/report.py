"""Renders the report; its content is in `steps/adapters/report.py`."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

from zenml import get_step_context, step
from zenml.types import HTMLString

from gpt2core.data import Record
from gpt2core.types import Comparison, Evaluation, Sample
from steps.adapters.data_check import check_data
from steps.adapters.report import write_curves, write_report
from steps.adapters.tracking import track_results
from steps.cache import code_of
from steps.config import TrackingConfig
from steps.metadata import attach_metadata
from steps.outputs import wandb_directory


@step(cache_policy=code_of(__name__))
def report(
    samples: list[Sample],
    metrics: Evaluation,
    comparison: Comparison,
    history: list[dict[str, float]],
    train_records: list[Record],
    val_records: list[Record],
    test_records: list[Record],
    tracking: TrackingConfig,
) -> tuple[Annotated[HTMLString, "report"], Annotated[str, "report_json"], Annotated[HTMLString, "curves"]]:
    """Write the report as an HTML page and as JSON, and the training curves as an HTML page."""
    data = check_data(train_records, val_records, test_records)
    attach_metadata("report", {"same_record": data.same_record, "same_question": data.same_question, "near": data.near})
    context = get_step_context()
    run_name = context.pipeline_run.name
    with TemporaryDirectory() as directory:
        page, report_data = write_report(samples, metrics, comparison, data, Path(directory), title=run_name)
        curves = write_curves(history, Path(directory), title=run_name)
        texts = [file.read_text(encoding="utf-8") for file in (page, report_data, curves)]
    if metrics.train.wandb_run:
        address, last_step = context.get_output_artifact_uri("report"), int(history[-1]["step"])
        wandb_run = metrics.train.wandb_run
        track_results(tracking, run_name, wandb_run, samples, metrics, address, last_step, wandb_directory())
    return HTMLString(texts[0]), texts[1], HTMLString(texts[2])
