"""Register a stack of this directory with ZenML and make it the active one: `python -m stacks.register docker`."""

import os
import sys
from importlib.util import find_spec
from pathlib import Path
from string import Template
from typing import Any

import yaml

FOLDER = Path(__file__).parent


class StackError(Exception):
    """A stack that cannot be registered; the message says what to do."""


def main() -> None:
    try:
        name = sys.argv[1] if len(sys.argv) == 2 else ""
        print(f"the stack {register(name)} is registered and active")
    except StackError as error:
        sys.exit(f"Error: {error}")


def names() -> list[str]:
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def has(name: str, kind: str, component: str) -> bool:
    """Whether the stack file has a component of this type with this name or flavor."""
    declared = yaml.safe_load(_text(name))["components"].get(kind, {})
    return component in (declared.get("name"), declared.get("flavor"))


def read(name: str) -> dict[str, Any]:
    """Read a stack's file, in the format of `zenml stack export`. $NAME is replaced by the environment variable NAME.

    Raises:
        StackError: there is no such stack, or a variable is not set.
    """
    if name not in names():
        raise StackError(f"there is no stack {name!r}; available are {', '.join(names())}")
    try:
        stack: dict[str, Any] = yaml.safe_load(Template(_text(name)).substitute(os.environ))
    except KeyError as error:
        missing = error.args[0]
        raise StackError(f"stacks/{name}.yaml requires the variable {missing}: make stack-{name} {missing}=…") from None
    return stack


def register(name: str) -> str:
    """Create or update the stack in ZenML's store from its file, and activate it. Return its name. Safe to repeat.

    Raises:
        StackError: see `read`; or ZenML rejects a component.
    """
    from zenml.client import Client  # takes seconds to import

    stack, client = read(name), Client()
    _register_flavors(client, {declared["flavor"] for declared in stack["components"].values()})
    components = {kind: _register_component(client, kind, **declared) for kind, declared in stack["components"].items()}
    try:
        client.get_stack(name, allow_name_prefix_match=False)
    except KeyError:
        client.create_stack(name, components)
    else:
        client.update_stack(name, component_updates=components)
    client.activate_stack(name)
    return name


def _text(name: str) -> str:
    return (FOLDER / f"{name}.yaml").read_text(encoding="utf-8")


def _register_flavors(client: Any, used: set[str]) -> None:
    from stacks.containers import ContainerOrchestratorFlavor, ContainerStepOperatorFlavor

    flavors: list[Any] = [ContainerOrchestratorFlavor, ContainerStepOperatorFlavor]
    if "kubeflow_gpu" in used:
        if find_spec("kfp") is None:
            raise StackError("the stack kubeflow needs kfp: install the extra kubeflow, as docs/kubeflow.md says")
        from stacks.kubeflow import KubeflowGpuOrchestratorFlavor  # imports the whole Kubernetes client

        flavors.append(KubeflowGpuOrchestratorFlavor)
    for flavor in flavors:
        name, kind = flavor().name, flavor().type
        try:
            client.get_flavor_by_name_and_type(name, kind)
        except KeyError:
            client.create_flavor(f"{flavor.__module__}.{flavor.__name__}", kind)


def _register_component(client: Any, kind: str, name: str, flavor: str, configuration: dict[str, Any]) -> Any:
    """Create or update a component from the stack's file, and return its ID.

    Raises:
        StackError: ZenML rejects the component, or a component of another flavor has the same name.
    """
    from zenml.enums import StackComponentType
    from zenml.exceptions import ZenMLBaseException

    component_type = StackComponentType(kind)
    try:
        existing = client.get_stack_component(component_type, name, allow_name_prefix_match=False)
    except KeyError:
        existing = None
    if existing is not None and existing.flavor_name != flavor:
        raise StackError(f"the {kind} {name} of flavor {existing.flavor_name} exists already; rename or delete it")
    try:
        if existing is None:
            existing = client.create_stack_component(name, flavor, component_type, configuration)
        elif name != "default" and existing.configuration != configuration:  # "default" is ZenML's own
            client.update_stack_component(existing.id, component_type, configuration=configuration)
    except (ZenMLBaseException, ValueError, ImportError) as error:
        raise StackError(f"the {kind} {name} cannot be registered: {error}") from None
    return existing.id


if __name__ == "__main__":
    main()
