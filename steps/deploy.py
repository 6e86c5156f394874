"""Deployment of the Bento to the configured target, and the rollback of the newest deployment."""

from dataclasses import asdict
from typing import Annotated, Any, Literal

from zenml import get_step_context, step
from zenml.client import Client
from zenml.utils.pagination_utils import depaginate

from deploy.bento import exists
from deploy.config import DeployConfig
from deploy.open_target import open_target
from deploy.target import DeployError, DeployFailed, DeployOutcome
from gpt2core.types import Lineage, Sample
from steps.config import EvaluateConfig, PackageConfig
from steps.metadata import attach_metadata, save_extra_artifact
from steps.model_versions import adapter_of, find_version
from steps.promote import Promotion

FAILED = ("rolled_back", "failed")  # outcomes of a deployment that failed


@step(enable_cache=False)
def deploy(
    bento: str,
    lineage: Lineage,
    samples: list[Sample],
    promotion: Promotion,
    deploy: DeployConfig,
    package: PackageConfig,
    evaluate: EvaluateConfig,
) -> Annotated[dict[str, Any], "deployment"]:
    """Deploy the Bento to the configured target; target none leaves it in the Bento store."""
    if not exists(bento):
        raise RuntimeError(f"the Bento {bento} is not in the store; run the pipeline again with --no-cache")
    _check_stage(deploy.require_stage, promotion, lineage)
    target = open_target(deploy)
    outcome = DeployOutcome("none", "none", bento)
    failure: BaseException | None = None
    if target is not None:
        try:
            outcome = target.deploy(lineage, samples[: package.smoke_prompts], evaluate.max_new_tokens)
        except DeployFailed as error:
            outcome, failure = error.outcome, error.interrupt or error
        except DeployError as error:
            outcome, failure = DeployOutcome(deploy.target, "failed", bento, reason=str(error)), error
    content = _artifact(outcome, deploy) | {"run": str(get_step_context().pipeline_run.id)}
    if failure is not None:
        save_extra_artifact("deployment", content)  # a step that fails has no outputs
        raise failure
    attach_metadata("deployment", content)
    return content


def _check_stage(required: Literal["", "staging", "production"], promotion: Promotion, lineage: Lineage) -> None:
    """Raise RuntimeError unless the adapter is in the required stage or a later one.

    It can be in the stage as this run's model version, as that of the run that built the Bento, if the Bento is cached,
    or as the champion.
    """
    if not required:
        return
    names = dict.fromkeys(name for name in (lineage.model_version, promotion.model_version, promotion.same_as) if name)
    # ZenML gives the number of a deleted version to another one, so the name alone does not identify the adapter
    stages = {
        name: version.stage
        for name in names
        if (version := find_version(name)) is not None and adapter_of(version) == lineage.adapter.sha256
    }
    if not stages:
        raise RuntimeError(
            f"deploy.require_stage is {required}, but no model version has this adapter; run this with --no-cache"
        )
    if not {required, "production"} & {*stages.values()}:
        found = ", ".join(f"{name} is in {f'stage {stage}' if stage else 'no stage'}" for name, stage in stages.items())
        name, _, number = next(iter(stages)).partition("/")
        raise RuntimeError(
            f"deploy.require_stage is {required}, but {found}; promote it with `zenml model version update {name} "
            f"{number} --stage {required}` and run this again"
        )


def rollback() -> DeployOutcome:
    """Roll back the newest deployment that succeeded, or the newest rollback, on the target that it was made on.

    Raises:
        DeployError: nothing was deployed, there is no earlier version, or that version does not start.
    """
    newest_first = {"artifact": "deployment", "sort_by": "desc:created", "size": 1000, "hydrate": True}
    for artifact in depaginate(Client().list_artifact_versions, **newest_first):
        content: dict[str, Any] = artifact.run_metadata  # the content of the artifact, whose file may be missing
        if "config" not in content or "outcome" not in content:  # of another project in the same store
            continue
        if "run" in content and content["outcome"] in FAILED:  # a rollback on request has no run
            continue
        config = DeployConfig(**content["config"])
        target = open_target(config)
        if target is not None:
            outcome = target.rollback()
            save_extra_artifact("deployment", _artifact(outcome, config))
            return outcome
    raise DeployError("no run has deployed anything yet; deploy.target selects where to deploy")


def _artifact(outcome: DeployOutcome, config: DeployConfig) -> dict[str, Any]:
    return outcome.to_json() | {"config": asdict(config)}
