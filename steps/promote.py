from typing import Annotated, Any

from zenml import get_step_context, log_metadata, step
from zenml.client import Client

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


def check_stage(required: str, version: str, built_by: str) -> None:
    """Raise RuntimeError unless one of two model versions (`name/number`) is in the stage, or beyond it.

    Args:
        version: of this run.
        built_by: the version whose run built what this run has from the cache; often the same.
    """
    enough = {"": (), "staging": ("staging", "production"), "production": ("production",)}[required]
    stages = {each: _stage(each) for each in (version, built_by)}
    if enough and not any(stage in enough for stage in stages.values()):
        found = ", ".join(f"{each} is in {f'stage {stage}' if stage else 'no stage'}" for each, stage in stages.items())
        name, _, number = built_by.partition("/")
        raise RuntimeError(
            f"deploy.require_stage is {required}, but {found}; promote it with `zenml model version update {name} "
            f"{number} --stage {required}` and run this again"
        )


def _stage(version: str) -> str | None:
    name, _, number = version.partition("/")
    try:
        return Client().get_model_version(name, number).stage
    except KeyError:  # deleted since
        return None
