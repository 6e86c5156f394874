"""Registers a stack of this folder with ZenML and makes it the active one: `python -m stacks.register docker`."""

import os
import sys
from pathlib import Path
from string import Template
from typing import Any

import yaml

FOLDER = Path(__file__).parent


class StackError(Exception):
    """A stack that cannot be registered; the message has the way out."""


def main() -> None:
    try:
        name = sys.argv[1] if len(sys.argv) == 2 else ""
        print(f"the stack {register(name)} is registered and active")
    except StackError as error:
        sys.exit(f"Error: {error}")


def names() -> list[str]:
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def has(name: str, kind: str, component: str) -> bool:
    """Whether the stack's file has a component of this type with this name or flavor."""
    about = yaml.safe_load(_text(name))["components"].get(kind, {})
    return component in (about.get("name"), about.get("flavor"))


def read(name: str) -> dict[str, Any]:
    """A stack's file, in the form that `zenml stack export` writes, with $NAME from the environment.

    Raises:
        StackError: no such stack, or a variable is not set.
    """
    if name not in names():
        raise StackError(f"there is no stack {name!r}; there are {', '.join(names())}")
    try:
        stack: dict[str, Any] = yaml.safe_load(Template(_text(name)).substitute(os.environ))
    except KeyError as error:
        missing = error.args[0]
        raise StackError(f"stacks/{name}.yaml needs the variable {missing}: make stack-{name} {missing}=…") from None
    return stack


def register(name: str) -> str:
    """Bring ZenML's store to what the file says; safe to repeat. The stack's name.

    Raises:
        StackError: as `read`, or a component that ZenML refuses.
    """
    from zenml.client import Client  # here, since zenml takes seconds to import

    stack, client = read(name), Client()
    _register_flavors(client)
    components = {kind: _register_component(client, kind, **about) for kind, about in stack["components"].items()}
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


def _register_flavors(client: Any) -> None:
    from stacks.containers import FLAVOR, ContainerOrchestratorFlavor, ContainerStepOperatorFlavor

    for flavor in (ContainerOrchestratorFlavor, ContainerStepOperatorFlavor):
        kind = flavor().type
        try:
            client.get_flavor_by_name_and_type(FLAVOR, kind)
        except KeyError:
            client.create_flavor(f"{flavor.__module__}.{flavor.__name__}", kind)


def _register_component(client: Any, kind: str, name: str, flavor: str, configuration: dict[str, Any]) -> Any:
    """The id of a component as the file says it; one of another flavor under its name is not touched."""
    from zenml.enums import StackComponentType
    from zenml.exceptions import ZenMLBaseException

    of_kind = StackComponentType(kind)
    try:
        there = client.get_stack_component(of_kind, name, allow_name_prefix_match=False)
    except KeyError:
        there = None
    if there is not None and there.flavor_name != flavor:
        raise StackError(f"there is another {kind} {name}, of flavor {there.flavor_name}; rename or delete that one")
    try:
        if there is None:
            there = client.create_stack_component(name, flavor, of_kind, configuration)
        elif name != "default" and there.configuration != configuration:  # ZenML's own are the user's to configure
            client.update_stack_component(there.id, of_kind, configuration=configuration)
    except (ZenMLBaseException, ValueError, ImportError) as error:
        raise StackError(f"the {kind} {name} cannot be registered: {error}") from None
    return there.id


if __name__ == "__main__":
    main()
