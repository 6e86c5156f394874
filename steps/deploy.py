from dataclasses import asdict
from typing import Annotated, Any

from zenml import step

from steps.adapters import kube
from steps.adapters.bento import exists
from steps.config import DeployConfig, EvaluateConfig, PackageConfig
from steps.metadata import describe, keep
from steps.promote import check_stage

ADAPTERS = {"kubernetes": kube}


@step(enable_cache=False)
def deploy(
    bento: str,
    lineage: dict[str, Any],
    samples: list[dict[str, Any]],
    promotion: dict[str, Any],
    deploy: DeployConfig,
    package: PackageConfig,
    evaluate: EvaluateConfig,
) -> Annotated[dict[str, Any], "deployment"]:
    """Bring the Bento to where it answers users; with target none it stays in the store, for `make serve`."""
    if not exists(bento):
        raise RuntimeError(f"the Bento {bento} is not in the store; run the pipeline again with --no-cache")
    check_stage(deploy.require_stage, promotion["model_version"], lineage["model_version"])
    deployment: dict[str, Any] = {"target": deploy.target, "bento": bento, "config": asdict(deploy)}
    if deploy.target != "none":
        asked = samples[: package.smoke_prompts]
        deployment |= ADAPTERS[deploy.target].deploy(lineage, deploy, asked, evaluate.max_new_tokens)
        if deployment["outcome"] != "deployed":
            keep("deployment", deployment)  # a step that fails returns nothing
            raise RuntimeError(f"{bento} was not deployed: {deployment['reason']}")
    describe("deployment", deployment)
    return deployment
