from typing import Annotated, Any

from zenml import step

from steps.adapters import bento as bentos
from steps.adapters import kube
from steps.config import DeployConfig, EvaluateConfig, PackageConfig
from steps.metadata import describe, keep
from steps.promote import check_stage


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
    if not bentos.exists(bento):
        raise RuntimeError(f"the Bento {bento} is not in the store; run the pipeline again with --no-cache")
    check_stage(deploy.require_stage, promotion["model_version"], lineage["model_version"])
    outcome: dict[str, Any] = {"target": deploy.target, "bento": bento, "outcome": "deployed"}
    if deploy.target == "kubernetes":
        cluster = kube.Cluster(deploy.kubeconfig, deploy.context, deploy.namespace)
        expected = bentos.expect(samples, package.smoke_prompts)
        outcome = kube.deploy(cluster, deploy.image, lineage, expected, evaluate.max_new_tokens, deploy.force)
    if outcome["outcome"] != "deployed":
        keep("deployment", outcome)  # a step that fails returns nothing
        raise RuntimeError(f"{bento} was not deployed: {outcome['reason']}")
    describe("deployment", outcome)
    return outcome
