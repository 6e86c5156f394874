"""Last step of `pretrain_pipeline`: results for users, and the base for later runs."""

import logging
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

from zenml import get_step_context, step

from gpt2core.types import RunRef
from steps.adapters.report import write_curves
from steps.evaluate_text import TextScores
from steps.outputs import json_text, write_outputs

logger = logging.getLogger(__name__)


@step(enable_cache=False)
def export_base(base: Path, history: list[dict[str, float]], metrics: TextScores) -> Annotated[str, "outputs"]:
    """Write the base and its results below outputs/. outputs/latest still links to a finetuning run."""
    run = get_step_context().pipeline_run
    with TemporaryDirectory() as directory:
        curves = write_curves(history, Path(directory), title=run.name).read_text(encoding="utf-8")
    texts = {
        "metrics.json": json_text(metrics.to_json()),
        "samples.txt": "".join(f"{sample}\n\n" for sample in metrics.samples),
        "curves.html": curves,
    }
    results = write_outputs(RunRef(str(run.id), run.name), texts, {"base": base}, pointers=())
    logger.info("held-out text: loss %.4g nats per token, perplexity %.4g", metrics.val_loss, metrics.perplexity)
    logger.info("results: %s", results)
    return str(results)
