import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

from zenml import get_step_context, step
from zenml.types import HTMLString

from steps.adapters.report import write_curves, write_report
from steps.cache import code_of


@step(cache_policy=code_of(__name__))
def report(
    samples: list[dict[str, Any]], metrics: dict[str, Any], history: list[dict[str, float]]
) -> tuple[Annotated[HTMLString, "report"], Annotated[dict[str, Any], "report_json"], Annotated[HTMLString, "curves"]]:
    """What finetuning changed, as a page and as data; and the training curves."""
    run_name = get_step_context().pipeline_run.name
    with TemporaryDirectory() as directory:
        page, data = write_report(samples, metrics, Path(directory), title=run_name)
        curves = write_curves(history, Path(directory), title=run_name)
        return HTMLString(page.read_text()), json.loads(data.read_text()), HTMLString(curves.read_text())
