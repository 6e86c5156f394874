import logging
from pathlib import Path
from typing import Annotated

from zenml import get_step_context, step
from zenml.types import HTMLString

from gpt2core.data import to_jsonl
from gpt2core.metrics import METRICS
from gpt2core.types import Evaluation, Lineage, Sample, SplitSummary
from steps.adapters.base import REFERENCE, has_checkpoint
from steps.outputs import to_json, write_outputs

logger = logging.getLogger(__name__)


@step(enable_cache=False)
def export_outputs(
    samples: list[Sample],
    metrics: Evaluation,
    split: SplitSummary,
    report: HTMLString,
    report_json: str,
    curves: HTMLString,
    base: Path,
    adapter: Path,
    lineage: Lineage,
) -> Annotated[str, "outputs"]:
    """Write the run's results below outputs/; return the directory."""
    texts: dict[str, str | bytes] = {
        "report.html": str(report),
        "report.json": report_json,
        "curves.html": str(curves),
        "metrics.json": to_json(metrics.to_json()),
        "samples.jsonl": to_jsonl([sample.to_json() for sample in samples]),
        "split.json": to_json(split.to_json()),
        "lineage.json": to_json(lineage.to_json()),
        "bento.txt": lineage.bento + "\n",
    }
    folders = {"adapter": adapter}
    if has_checkpoint(base):
        folders["base"] = base
    else:
        texts[REFERENCE] = (base / REFERENCE).read_text()
    directory = write_outputs(get_step_context().pipeline_run.name, texts, folders)
    for name, metric in METRICS.items():
        base_score, tuned_score = getattr(metrics.base, name), getattr(metrics.tuned, name)
        logger.info("%s: base %.4g, tuned %.4g", metric.heading, base_score, tuned_score)
    logger.info("report: %s", directory / "report.html")
    return str(directory)
