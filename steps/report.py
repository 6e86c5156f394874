from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

from zenml import get_step_context, step
from zenml.types import HTMLString

from gpt2core.types import Evaluation, Sample
from steps.adapters.report import write_curves, write_report
from steps.cache import code_of


@step(cache_policy=code_of(__name__))
def report(
    samples: list[Sample], metrics: Evaluation, history: list[dict[str, float]]
) -> tuple[Annotated[HTMLString, "report"], Annotated[str, "report_json"], Annotated[HTMLString, "curves"]]:
    """Base against tuned model as a page and as JSON text, and the training curves as a page."""
    run_name = get_step_context().pipeline_run.name
    with TemporaryDirectory() as directory:
        page, data = write_report(samples, metrics, Path(directory), title=run_name)
        curves = write_curves(history, Path(directory), title=run_name)
        return HTMLString(page.read_text()), data.read_text(), HTMLString(curves.read_text())
