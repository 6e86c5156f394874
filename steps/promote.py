from dataclasses import dataclass
from typing import Annotated, Literal

from zenml import get_step_context, log_metadata, step
from zenml.client import Client

from gpt2core.metrics import METRICS
from gpt2core.types import Evaluation, JsonDataclass
from steps.config import PromoteConfig
from steps.metadata import describe


@dataclass(frozen=True)
class Promotion(JsonDataclass):
    """Whether this run's model version was promoted, and why."""

    promoted: bool
    stage: str  # "" unless promoted
    model_version: str  # name/number
    reason: str


@step(enable_cache=False)
def promote(metrics: Evaluation, promote: PromoteConfig) -> Annotated[Promotion, "promotion"]:
    """Move this run's model version to the stage if it beats its base; record the reason either way."""
    promoted, reason = compare(metrics, promote)
    version = get_step_context().model
    if promoted:
        version.set_stage(promote.stage, force=True)
    promotion = Promotion(promoted, promote.stage if promoted else "", f"{version.name}/{version.version}", reason)
    describe("promotion", promotion.to_json())
    scores = metrics.to_json()
    log_metadata(metadata={model: scores[model] for model in ("base", "tuned")}, infer_model=True)
    return promotion


def compare(metrics: Evaluation, promote: PromoteConfig) -> tuple[bool, str]:
    """Whether the tuned model is better than the base by more than the margin, and a sentence that says so."""
    base, tuned = getattr(metrics.base, promote.metric), getattr(metrics.tuned, promote.metric)
    higher = METRICS[promote.metric].higher_is_better
    better = (tuned - base if higher else base - tuned) > promote.margin
    relation = f"{'' if better else 'not '}{'above' if higher else 'below'}"
    return better, (
        f"{promote.metric} {tuned:.4f} of the tuned model is {relation} {base:.4f} of the base "
        f"by more than the margin {promote.margin:.4f}"
    )


def check_stage(required: Literal["", "staging", "production"], version: str, built_by: str) -> None:
    """Raise RuntimeError unless one of two model versions (`name/number`) is in the required stage or a later one.

    Args:
        version: of this run.
        built_by: the version whose run built the cached artifacts of this run; often the same.
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
    except KeyError:  # the version was deleted
        return None
