"""Opens the deploy target that a configuration names."""

from deploy.config import DeployConfig
from deploy.target import Target


def open_target(config: DeployConfig) -> Target | None:
    """Return the target that the configuration names; None for "none".

    Imports only the client libraries of that target. Kubernetes needs docker's client too, which resolves the digest of
    the image.
    """
    if config.target == "docker":
        from deploy.containers.rollout import DockerTarget

        return DockerTarget(config)
    if config.target == "kubernetes":
        from deploy.kubernetes.rollout import KubernetesTarget

        return KubernetesTarget(config)
    return None
