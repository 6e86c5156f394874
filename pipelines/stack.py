"""Whether the active stack and this machine have what a run configuration asks for: known before anything runs."""

from collections.abc import Iterator, Mapping
from typing import Any

from zenml.client import Client

from deploy.containers.client import EngineError, connect, require_image
from pipelines.config import ConfigError
from stacks import register
from stacks.containers import FLAVOR


def check_stack(config: Mapping[str, Any], source: str) -> None:
    """Raise ConfigError if the active stack lacks a component that the configuration names, or it could not start."""
    client = Client()
    stack = client.active_stack_model
    flavors = {
        (kind.value, component.name): component.flavor_name
        for kind, components in stack.components.items()
        for component in components
    }
    there = {*flavors, *((kind, flavor) for (kind, _), flavor in flavors.items())}
    wanted = set(_components(config))
    for kind, name in sorted(wanted - there):
        stacks = " or ".join(f"`make stack-{other}`" for other in register.names() if register.has(other, kind, name))
        raise ConfigError(
            f"{source} asks for the {kind.replace('_', ' ')} {name!r}, which the active stack {stack.name!r} does not "
            f"have; {f'{stacks} makes one active that has it' if stacks else 'add it to the stack'}"
        )
    if ("orchestrator", FLAVOR) in there - wanted:
        raise ConfigError(
            f"the active stack {stack.name!r} runs every step in a container, of which {source} says nothing; take "
            "configs/docker.yaml, or `make stack-local` to run steps here again"
        )
    used = {flavors.get(component, component[1]) for component in wanted}
    if FLAVOR in used:
        try:
            with connect() as client:
                for image in _images(config):
                    require_image(client, image)
        except EngineError as error:
            raise ConfigError(f"{source}: {error}") from None
    if "kubernetes" in used and client.zen_store.is_local_store():
        raise ConfigError(
            f"{source} runs steps as pods, which cannot reach ZenML's store on this machine; `zenml login` a server "
            "that they can reach (docs/kubernetes.md)"
        )
    for secret in sorted({secret for part in _parts(config) for secret in part.get("secrets") or []}):
        try:
            client.get_secret(secret, allow_partial_name_match=False)
        except KeyError:
            raise ConfigError(
                f"{source} asks for the secret {secret!r}, which ZenML's secret store does not have; "
                f"`zenml secret create {secret} --NAME=…` makes it"
            ) from None


def _components(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(type, name or flavor) of each component that settings or steps name."""
    for part in _parts(config):
        for key in part.get("settings") or {}:
            kind, dot, flavor = key.partition(".")
            if dot:
                yield kind, flavor
        if isinstance(part.get("step_operator"), str):  # true: whichever the stack has
            yield "step_operator", part["step_operator"]


def _images(config: Mapping[str, Any]) -> Iterator[str]:
    """Images that are taken as they are."""
    for part in _parts(config):
        docker = (part.get("settings") or {}).get("docker") or {}
        if docker.get("skip_build"):
            yield docker["parent_image"]


def _parts(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The run, and each step that the configuration has something to say of."""
    return [config, *(step for step in (config.get("steps") or {}).values() if step)]
