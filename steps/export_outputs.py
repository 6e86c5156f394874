"""Last step of `finetune_pipeline`: results for users. `run.py ask`, `export` and `compare` read them."""

import logging
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

from zenml import get_step_context, step
from zenml.types import HTMLString

from gpt2core.data import to_jsonl
from gpt2core.metrics import METRICS
from gpt2core.types import Comparison, Evaluation, Lineage, RunRef, Sample, SplitSummary
from steps.adapters.base import REFERENCE, has_checkpoint, open_base
from steps.config import PromoteConfig
from steps.model_versions import in_stage, version_name
from steps.outputs import adapter_in, json_text, shared_path, write_outputs
from steps.promote import Promotion, compared_on

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
    promotion: Promotion,
    comparison: Comparison,
    promote: PromoteConfig,
) -> Annotated[str, "outputs"]:
    """Write the run's results below outputs/. Link outputs/<stage> to them if the stage contains this run's model."""
    texts: dict[str, str | bytes] = {
        "report.html": str(report),
        "report.json": report_json,
        "curves.html": str(curves),
        "metrics.json": json_text(_metrics(metrics, comparison, promote)),
        "samples.jsonl": to_jsonl([sample.to_json() for sample in samples]),
        "split.json": json_text(split.to_json()),
        "lineage.json": json_text(lineage.to_json()),
        "bento.txt": lineage.bento + "\n",
    }
    folders = {"adapter": adapter}
    links = {}
    if has_checkpoint(base):
        folders["base"] = base
    else:
        texts[REFERENCE] = (base / REFERENCE).read_text(encoding="utf-8")
        links["base"] = open_base(base)
    context = get_step_context()
    pointers = ["latest"]
    if _is_in_stage(context.model.name, promote.stage, promotion, lineage.adapter.sha256):
        pointers.append(promote.stage)
    run = context.pipeline_run
    directory = write_outputs(RunRef(str(run.id), run.name), texts, folders, links, pointers)
    _log_scores(metrics, comparison)
    logger.info("%s", promotion.reason)
    logger.info("report: %s", directory / "report.html")
    return str(directory)


def _is_in_stage(model: str, stage: Literal["staging", "production"], promotion: Promotion, adapter: str) -> bool:
    """Whether outputs/<stage> must link to this run.

    It must if the stage contains this run's model version. It must also if the stage contains a version with the same
    adapter and the link is missing or wrong: the run of that version stopped after `promote`, its directory was
    deleted, or the stage was changed in ZenML.
    """
    version = in_stage(model, stage)
    if version is None:
        return False
    if version_name(version) == promotion.model_version:
        return True
    return version_name(version) == promotion.same_as and adapter_in(shared_path(stage)) != adapter


def _metrics(metrics: Evaluation, comparison: Comparison, promote: PromoteConfig) -> dict[str, Any]:
    champion = comparison.champion_scores
    return metrics.to_json() | {
        "champion": None if champion is None else asdict(champion),
        "comparison": compared_on(comparison, promote.metric),
        "judge": None if comparison.judge is None else comparison.judge.to_json(),
    }


def _log_scores(metrics: Evaluation, comparison: Comparison) -> None:
    champion = comparison.champion_scores
    for name, metric in METRICS.items():
        base, tuned = getattr(metrics.base, name), getattr(metrics.tuned, name)
        other = "" if champion is None else f", champion {getattr(champion, name):.4g}"
        logger.info("%s: base %.4g, tuned %.4g%s", metric.heading, base, tuned, other)
