"""Checks that the active stack, this machine and the deploy target provide what a run configuration uses."""

from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from typing import Any

from zenml.client import Client

from bentos.settings import Settings
from deploy.config import DeployConfig
from deploy.containers.client import EngineError, connect, require_image
from deploy.open_target import open_target
from deploy.server import service_environment
from deploy.target import DeployError
from pipelines.errors import ConfigError
from stacks import register
from stacks.containers import FLAVOR


def check_stack(config: Mapping[str, Any], source: str) -> None:
    """Raise ConfigError if a component, an image or a secret is missing, pods cannot reach the store, or the deploy
    target would refuse a deployment.

    Args:
        source: origin of the configuration, for the message.
    """
    stack = Client().active_stack_model
    flavors = {
        (kind.value, component.name): component.flavor_name
        for kind, components in stack.components.items()
        for component in components
    }
    available = {*flavors, *((kind, flavor) for (kind, _), flavor in flavors.items())}
    used = set(_components(config))
    for kind, name in sorted(used - available):
        stacks = " or ".join(f"`make stack-{other}`" for other in register.names() if register.has(other, kind, name))
        raise ConfigError(
            f"{source} uses the {kind.replace('_', ' ')} {name!r}, which the active stack {stack.name!r} does not "
            f"have; {f'{stacks} activates one that has it' if stacks else 'add it to the stack'}"
        )
    if ("orchestrator", FLAVOR) in available - used:
        raise ConfigError(
            f"the active stack {stack.name!r} runs every step in a container, but {source} does not configure one; use "
            "configs/docker.yaml, or `make stack-local` to run steps without containers"
        )
    used_flavors = {flavors.get(component, component[1]) for component in used}
    if FLAVOR in used_flavors:
        _check_images(config, source)
    if "kubeflow_gpu" in used_flavors and find_spec("kfp") is None:
        raise ConfigError(f"{source} runs on Kubeflow, which needs kfp: install the extra kubeflow (docs/kubeflow.md)")
    if used_flavors & {"kubernetes", "kubeflow_gpu"} and not is_reachable_by_pods():
        raise ConfigError(
            f"{source} runs steps as pods, which cannot reach ZenML's store on this machine; `zenml login` to a server "
            "that they can reach (docs/kubernetes.md)"
        )
    _check_secrets(config, source)
    [orchestrator] = [flavor for (kind, _), flavor in flavors.items() if kind == "orchestrator"]
    _check_deploy_target(config, orchestrator, source)


def is_reachable_by_pods() -> bool:
    """Whether ZenML's store is a server instead of a database on this machine."""
    return not Client().zen_store.is_local_store()


def _check_images(config: Mapping[str, Any], source: str) -> None:
    """Check that the container engine has the images that ZenML does not build (`skip_build`)."""
    try:
        with connect() as client:
            for part in _parts(config):
                docker = (part.get("settings") or {}).get("docker") or {}
                if docker.get("skip_build"):
                    require_image(client, docker["parent_image"])
    except EngineError as error:
        raise ConfigError(f"{source}: {error}") from None


def _check_deploy_target(config: Mapping[str, Any], orchestrator: str, source: str) -> None:
    """Run the preflight of the deploy target, unless the step `deploy` runs elsewhere, with another environment."""
    deploy = DeployConfig(**((config.get("parameters") or {}).get("deploy") or {}))
    step = (config.get("steps") or {}).get("deploy") or {}
    if orchestrator == "local" and not step.get("step_operator"):
        try:
            if deploy.target == "docker":  # on Kubernetes, the settings are those of a Secret
                Settings.from_environment(service_environment())
            target = open_target(deploy)
            if target is not None:
                target.preflight()
        except (DeployError, ValueError) as error:
            raise ConfigError(f"{source}: {error}") from None
    elif deploy.target == "docker" and orchestrator == FLAVOR:
        raise ConfigError(
            f"{source}: deploy.target is docker, but the active stack runs this step in a container, which cannot "
            "use the engine; `make stack-local` activates a stack that does not"
        )


def _check_secrets(config: Mapping[str, Any], source: str) -> None:
    for secret in sorted({secret for part in _parts(config) for secret in part.get("secrets") or []}):
        try:
            Client().get_secret(secret, allow_partial_name_match=False)
        except KeyError:
            raise ConfigError(
                f"{source} uses the secret {secret!r}, which ZenML's secret store does not have; "
                f"`zenml secret create {secret} --NAME=…` creates it"
            ) from None


def _components(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield (type, name or flavor) of each component in settings and steps."""
    for part in _parts(config):
        for key in part.get("settings") or {}:
            kind, dot, flavor = key.partition(".")
            if dot:
                yield kind, flavor
        if isinstance(part.get("step_operator"), str):  # the value true means the only step operator of the stack
            yield "step_operator", part["step_operator"]


def _parts(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the mapping of the run, and the mapping of each configured step."""
    return [config, *(step for step in (config.get("steps") or {}).values() if step)]
