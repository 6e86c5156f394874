"""The promotion gate. Only this step of the pipeline changes a stage."""

from dataclasses import dataclass
from typing import Annotated, Any

from zenml import Model, get_step_context, log_metadata, step

from gpt2core.metrics import METRICS
from gpt2core.types import Comparison, Difference, Evaluation, JsonDataclass
from steps.config import PromoteConfig
from steps.metadata import attach_metadata
from steps.model_versions import in_stage, version_name


@dataclass(frozen=True)
class Promotion(JsonDataclass):
    """Whether this run's model version was promoted, and why."""

    promoted: bool
    stage: str  # "" unless promoted
    model_version: str  # name/number
    reason: str
    same_as: str = ""  # the champion's model version if its adapter equals this run's, else ""


@step(enable_cache=False)
def promote(
    comparison: Comparison, same_as: str, metrics: Evaluation, promote: PromoteConfig
) -> Annotated[Promotion, "promotion"]:
    """Move this run's model version to the stage if it passes the gate, and record the decision with its reason.

    Runs after `package`, which fails if the service's answers differ from those of the evaluated model.
    """
    if same_as:
        promoted, reason = False, f"{same_as} in stage {promote.stage} has the same adapter; nothing changes"
    else:
        promoted, reason = decide(comparison, promote)
    version = get_step_context().model
    if promoted and promote.champion != "ignore":
        promoted, reason = _unchanged(comparison.champion, version, promote.stage, reason)
    if promoted:
        version.set_stage(promote.stage, force=True)
    promotion = Promotion(
        promoted=promoted,
        stage=promote.stage if promoted else "",
        model_version=f"{version.name}/{version.version}",
        reason=reason,
        same_as=same_as,
    )
    attach_metadata("promotion", promotion.to_json())
    scores = metrics.to_json()
    evidence = {"promotion": promotion.to_json(), "comparison": compared_on(comparison, promote.metric)}
    log_metadata(metadata={model: scores[model] for model in ("base", "tuned")} | evidence, infer_model=True)
    return promotion


def _unchanged(champion: str, tuned: Model, stage: str, reason: str) -> tuple[bool, str]:
    """Whether the stage still contains the champion that this run was compared with, and the reason.

    A concurrent run may have promoted its model in the meantime. The stage contains the run's own version if this step
    is retried.
    """
    version = in_stage(tuned.name, stage)
    now = "" if version is None else version_name(version)
    if now in (champion, f"{tuned.name}/{tuned.version}"):
        return True, reason
    return False, (
        f"the champion changed during the run: stage {stage} held {champion or 'no model version'} when the models "
        f"were compared, and now holds {now or 'none'}; run again"
    )


def decide(comparison: Comparison, promote: PromoteConfig) -> tuple[bool, str]:
    """Decide whether to promote the tuned model; return the decision and its reason.

    The model must be better than its base (p below alpha). If there is a champion, the one-sided confidence bound
    (level 1 - alpha) of the difference to the champion must not be below -margin.
    """
    higher = METRICS[promote.metric].higher_is_better
    base = comparison.tuned_vs_base[promote.metric]
    better = base.difference > 0 if higher else base.difference < 0
    against_base = f"{promote.metric} differs from the base by {_figures(base)}"
    if not better:
        return False, f"not better than the base: {against_base}"
    if base.p_value >= promote.alpha:
        return False, f"not shown to be better than the base: {against_base}; alpha is {promote.alpha:g}"
    if promote.champion == "ignore":
        return True, f"better than the base: {against_base}; promote.champion is ignore"
    if not comparison.champion:
        if promote.champion == "required":
            return False, f"promote.champion is required, but {comparison.note}"
        return True, f"better than the base: {against_base}; {comparison.note}"
    if comparison.tuned_vs_champion is None:
        return False, f"{comparison.note}; promote.champion=ignore skips the comparison with the champion"
    if comparison.lower_bound is None:
        return False, (
            f"not shown to be as good as the champion: {promote.metric} has no confidence bound, because there are too "
            f"few independent test records or an infinite loss ({comparison.note}); use a larger test split or another "
            "promote.metric, or promote.champion=ignore, which skips the comparison with the champion"
        )
    champion = comparison.tuned_vs_champion[promote.metric]
    worse_by = max(0.0, -comparison.lower_bound)
    against = (
        f"{promote.metric} differs from {comparison.champion} by {_figures(champion)}; at a confidence of "
        f"{100 * (1 - promote.alpha):g} % it is worse by at most {worse_by:.4f}, and the margin is {promote.margin:g}"
    )
    if comparison.lower_bound < -promote.margin:
        return False, f"not shown to be as good as the champion: {against}"
    return True, f"better than the base and as good as the champion: {against_base}; {against}"


def compared_on(comparison: Comparison, metric: str) -> dict[str, Any]:
    """Return the comparisons on one metric, as in metrics.json."""
    champion = comparison.tuned_vs_champion
    return {
        "tuned_vs_base": comparison.tuned_vs_base[metric].to_json(),
        "tuned_vs_champion": None if champion is None else champion[metric].to_json(),
        "champion": comparison.champion,
        "note": comparison.note,
    }


def _figures(result: Difference) -> str:
    interval = f"95 % interval {result.ci95[0]:+.4f} to {result.ci95[1]:+.4f}, " if result.ci95 else ""
    return f"{result.difference:+.4f} ({interval}p {result.p_value:.3g}, n {result.n})"
