from typing import Annotated, Any

from zenml import get_step_context, log_metadata, step

from steps.config import PromoteConfig
from steps.metadata import describe


@step(enable_cache=False)
def promote(metrics: dict[str, Any], promote: PromoteConfig) -> Annotated[dict[str, Any], "promotion"]:
    """Move this run's model version to the stage if it beats its base; record why or why not."""
    base, tuned = metrics["base"][promote.metric], metrics["tuned"][promote.metric]
    promoted = tuned > base + promote.margin
    version = get_step_context().model
    if promoted:
        version.set_stage(promote.stage, force=True)
    promotion: dict[str, Any] = {
        "promoted": promoted,
        "stage": promote.stage if promoted else "",
        "model_version": f"{version.name}/{version.version}",
        "reason": f"{promote.metric} of tuned {tuned:.4f} is {'above' if promoted else 'not above'} "
        f"base {base:.4f} + margin {promote.margin:.4f}",
    }
    describe("promotion", promotion)
    log_metadata(metadata={side: metrics[side] for side in ("base", "tuned")}, infer_model=True)
    return promotion
