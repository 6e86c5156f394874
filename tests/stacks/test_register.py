"""Registration of stack files in a real ZenML store."""

from importlib.util import find_spec

import pytest
from zenml.client import Client
from zenml.enums import StackComponentType

from stacks import register
from stacks.register import StackError

CLUSTER = {
    "ARTIFACT_STORE": "s3://bucket/zenml",
    "REGISTRY": "registry.example.com/team",
    "KUBERNETES_CONTEXT": "gpus",
    "KUBEFLOW_HOST": "http://kubeflow.example.com",
}


@pytest.fixture(autouse=True)
def restore_active_stack():
    before = Client().active_stack_model.id
    yield
    Client().activate_stack(before)


def components(name: str) -> dict[str, tuple[str, str]]:
    stack = Client().get_stack(name, allow_name_prefix_match=False)
    return {kind.value: (found.name, found.flavor_name) for kind, [found] in stack.components.items()}


needs_kfp = pytest.mark.skipif(find_spec("kfp") is None, reason="needs kfp (docs/kubeflow.md)")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[needs_kfp] * (name == "kubeflow")) for name in register.names()]
)
def test_a_registered_stack_equals_its_file_and_is_active(name, monkeypatch):
    for variable, value in CLUSTER.items():
        monkeypatch.setenv(variable, value)
    register.register(name)
    assert Client().active_stack_model.name == name
    declared = {kind: (it["name"], it["flavor"]) for kind, it in register.read(name)["components"].items()}
    assert components(name) == declared


def test_registering_again_changes_nothing():
    register.register("docker")
    before = Client().get_stack("docker")
    register.register("docker")
    after = Client().get_stack("docker")
    assert after.id == before.id
    assert {k: [c.id for c in v] for k, v in after.components.items()} == {
        k: [c.id for c in v] for k, v in before.components.items()
    }


def test_a_changed_value_updates_the_existing_component(monkeypatch):
    for variable, value in CLUSTER.items():
        monkeypatch.setenv(variable, value)
    register.register("kubernetes")
    monkeypatch.setenv("REGISTRY", "elsewhere.example.com")
    register.register("kubernetes")
    found = Client().get_stack_component(StackComponentType.CONTAINER_REGISTRY, "kubernetes")
    assert found.configuration["uri"] == "elsewhere.example.com"


def test_a_component_of_another_flavor_with_the_same_name_is_not_changed():
    client = Client()
    taken = client.create_stack_component("taken", "local", StackComponentType.IMAGE_BUILDER, {})
    with pytest.raises(StackError, match="the image_builder taken of flavor local exists already; rename or delete it"):
        register._register_component(client, "image_builder", "taken", "kaniko", {})
    assert client.get_stack_component(StackComponentType.IMAGE_BUILDER, "taken").id == taken.id


@pytest.mark.skipif(find_spec("kfp") is not None, reason="kfp is installed")
def test_a_stack_on_kubeflow_names_the_extra_that_it_needs(monkeypatch):
    for variable, value in CLUSTER.items():
        monkeypatch.setenv(variable, value)
    with pytest.raises(StackError, match=r"the stack kubeflow needs kfp: install the extra kubeflow"):
        register.register("kubeflow")


def test_an_unknown_stack_is_named_with_the_available_ones():
    with pytest.raises(StackError, match="no stack 'dockr'; available are docker, kubeflow, kubernetes, local"):
        register.register("dockr")


def test_a_missing_variable_is_named_with_the_command_that_sets_it(monkeypatch):
    for variable in CLUSTER:
        monkeypatch.delenv(variable, raising=False)
    with pytest.raises(StackError, match="make stack-kubernetes ARTIFACT_STORE="):
        register.register("kubernetes")


def test_a_configuration_that_zenml_refuses_is_one_error_and_changes_nothing(monkeypatch):
    for variable, value in (CLUSTER | {"ARTIFACT_STORE": "/a/folder"}).items():
        monkeypatch.setenv(variable, value)
    before = Client().get_stack_component(StackComponentType.ARTIFACT_STORE, "kubernetes").configuration
    with pytest.raises(StackError, match="the artifact_store kubernetes cannot be registered"):
        register.register("kubernetes")
    assert Client().get_stack_component(StackComponentType.ARTIFACT_STORE, "kubernetes").configuration == before
