import logging
from pathlib import Path
from typing import Annotated, Any

from zenml import get_step_context, step
from zenml.types import HTMLString

from gpt2core.data import to_jsonl
from steps.adapters.base import REFERENCE, holds_checkpoint
from steps.outputs import to_json, write_outputs

logger = logging.getLogger(__name__)


@step(enable_cache=False)
def export_outputs(
    samples: list[dict[str, Any]],
    metrics: dict[str, Any],
    split: dict[str, Any],
    report: HTMLString,
    report_json: dict[str, Any],
    curves: HTMLString,
    base: Path,
    adapter: Path,
    lineage: dict[str, Any],
) -> Annotated[str, "outputs"]:
    """Lay the run's results out under outputs/ for people; return that directory."""
    texts: dict[str, str | bytes] = {
        "report.html": str(report),
        "report.json": to_json(report_json),
        "curves.html": str(curves),
        "metrics.json": to_json(metrics),
        "samples.jsonl": to_jsonl(samples),
        "split.json": to_json(split),
        "lineage.json": to_json(lineage),
        "bento.txt": lineage["bento"] + "\n",
    }
    folders = {"adapter": adapter}
    if holds_checkpoint(base):
        folders["base"] = base
    else:
        texts[REFERENCE] = (base / REFERENCE).read_text()
    directory = write_outputs(get_step_context().pipeline_run.name, texts, folders)
    for name, value in metrics["base"].items():
        logger.info("%s: %.4g of the base, %.4g of the tuned model", name, value, metrics["tuned"][name])
    logger.info("all of it: %s", directory / "report.html")
    return str(directory)
