from dataclasses import asdict, replace
from typing import Annotated, Any

from zenml import get_step_context, step
from zenml.client import Client

from deploy.bento import exists
from deploy.config import DeployConfig
from deploy.containers import service as docker
from deploy.containers.images import pinned
from deploy.kubernetes import rollout as kube
from gpt2core.types import Lineage, Sample
from steps.config import EvaluateConfig, PackageConfig
from steps.metadata import describe, keep
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
    """Bring the Bento to where it answers users, as in `evaluate`; with target none it stays for `make serve`."""
    if not exists(bento):
        raise RuntimeError(f"the Bento {bento} is not in the store; run the pipeline again with --no-cache")
    check_stage(deploy.require_stage, promotion.model_version, lineage.model_version)
    run = str(get_step_context().pipeline_run.id)
    deployment: dict[str, Any] = {"target": deploy.target, "bento": bento, "run": run, "config": asdict(deploy)}
    asked = [sample.to_json() for sample in samples[: package.smoke_prompts]]
    if deploy.target == "docker":
        deployment |= docker.deploy(bento, deploy, asked, evaluate.max_new_tokens)
    elif deploy.target == "kubernetes":
        exact = replace(deploy, image=pinned(deploy.image))
        deployment |= kube.deploy(lineage.to_json(), exact, asked, evaluate.max_new_tokens)
    if deployment.get("outcome") in ("rolled_back", "failed"):
        keep("deployment", deployment)  # a step that fails returns nothing
        raise RuntimeError(f"{bento} was not deployed: {deployment['reason']}")
    describe("deployment", deployment)
    return deployment


def rollback() -> dict[str, Any]:
    """Bring back what answered before the last deployment, there where that was made; the outcome.

    Raises:
        RuntimeError: nothing was deployed, nothing before it, or it does not start any more.
    """
    for version in Client().list_artifact_versions(artifact="deployment", sort_by="desc:created", size=1000).items:
        last = version.load()
        if last["target"] != "none":
            config = DeployConfig(**last["config"])
            outcome = (docker if config.target == "docker" else kube).rollback(config)
            keep("deployment", {"target": config.target, "config": last["config"], **outcome})
            return {"target": config.target, **outcome}
    raise RuntimeError("no run has deployed anything yet; deploy.target names where to")
