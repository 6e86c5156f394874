from typing import Annotated

from zenml import step

from steps.adapters.bento import exists
from steps.config import DeployConfig


@step(enable_cache=False)
def deploy(bento: str, deploy: DeployConfig) -> Annotated[dict[str, str], "deployment"]:
    """Bring the Bento to where it answers users; with target none it stays in the store, for `make serve`."""
    if not exists(bento):
        raise RuntimeError(f"the Bento {bento} is not in the store; run the pipeline again with --no-cache")
    return {"target": deploy.target, "bento": bento}
