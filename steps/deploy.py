from dataclasses import asdict
from typing import Annotated, Any

from zenml import step
from zenml.client import Client

from steps.adapters import docker
from steps.adapters.bento import exists
from steps.config import DeployConfig, EvaluateConfig, PackageConfig
from steps.metadata import describe

ADAPTERS = {"docker": docker}


@step(enable_cache=False)
def deploy(
    bento: str,
    samples: list[dict[str, Any]],
    deploy: DeployConfig,
    package: PackageConfig,
    evaluate: EvaluateConfig,
) -> Annotated[dict[str, Any], "deployment"]:
    """Bring the Bento to where it answers users, as in `evaluate`; with target none it stays for `make serve`."""
    if not exists(bento):
        raise RuntimeError(f"the Bento {bento} is not in the store; run the pipeline again with --no-cache")
    deployment: dict[str, Any] = {"target": deploy.target, "bento": bento, "config": asdict(deploy)}
    if deploy.target != "none":
        asked = samples[: package.smoke_prompts]
        deployment |= ADAPTERS[deploy.target].deploy(bento, deploy, asked, evaluate.max_new_tokens)
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
            return {"target": last["target"], **ADAPTERS[last["target"]].rollback(config)}
    raise RuntimeError("no run has deployed anything yet; deploy.target names where to")
