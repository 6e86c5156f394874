from dataclasses import asdict
from typing import Annotated, Any

from zenml import get_step_context, step
from zenml.client import Client
from zenml.utils.pagination_utils import depaginate

from deploy.bento import exists
from deploy.config import DeployConfig
from deploy.target import DeployError, DeployInterrupted, Deployment
from deploy.targets import open_target
from gpt2core.types import Lineage, Sample
from steps.config import EvaluateConfig, PackageConfig
from steps.metadata import attach_metadata, save_extra_artifact
from steps.promote import Promotion, check_stage


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
    check_stage(deploy.require_stage, promotion, lineage.model_version)
    target = open_target(deploy)
    deployment = Deployment("none", "none", bento)
    interrupt: BaseException | None = None
    if target is not None:
        try:
            deployment = target.deploy(lineage, samples[: package.smoke_prompts], evaluate.max_new_tokens)
        except DeployInterrupted as error:
            deployment, interrupt = error.deployment, error.__cause__
    content = _artifact(deployment, deploy) | {"run": str(get_step_context().pipeline_run.id)}
    if deployment.outcome in ("rolled_back", "failed"):
        save_extra_artifact("deployment", content)  # a step that fails has no outputs
        if interrupt is not None:
            raise interrupt
        raise RuntimeError(f"{bento} was not deployed: {deployment.reason}")
    attach_metadata("deployment", content)
    return content


def rollback() -> Deployment:
    """Roll back the newest deployment, on its target.

    Raises:
        DeployError: nothing was deployed, there is no earlier version, or that version does not start.
    """
    newest_first = {"artifact": "deployment", "sort_by": "desc:created", "size": 1000}
    for artifact in depaginate(Client().list_artifact_versions, **newest_first):
        config = DeployConfig(**artifact.load()["config"])
        target = open_target(config)
        if target is not None:
            deployment = target.rollback()
            save_extra_artifact("deployment", _artifact(deployment, config))
            return deployment
    raise DeployError("no run has deployed anything yet; deploy.target selects where to deploy")


def _artifact(deployment: Deployment, config: DeployConfig) -> dict[str, Any]:
    return deployment.to_json() | {"config": asdict(config)}
