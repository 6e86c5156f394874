"""The requirements of a configuration on stack and machine are checked before anything runs."""

import pytest
import yaml
from click.testing import CliRunner
from zenml.client import Client

from pipelines.errors import ConfigError
from pipelines.stack import check_stack
from run import main
from stacks import register
from tests.copies import ROOT


@pytest.fixture(autouse=True)
def active_stack_is_kept():
    before = Client().active_stack_model.id
    yield
    Client().activate_stack(before)


def config(name: str) -> dict:
    return yaml.safe_load((ROOT / "configs" / name).read_text())


@pytest.mark.parametrize(
    ("name", "component", "verb"),
    [
        ("docker.yaml", "orchestrator 'container'", "`make stack-docker`"),
        ("docker_gpu_step.yaml", "step operator 'container'", "`make stack-local`"),
        ("kubernetes.yaml", "step operator 'kubernetes'", "`make stack-kubernetes`"),
        ("kubeflow.yaml", "orchestrator 'kubeflow_gpu'", "`make stack-kubeflow`"),
    ],
)
def test_a_component_missing_in_the_active_stack_is_reported_with_the_command_that_registers_it(name, component, verb):
    result = CliRunner().invoke(main, ["finetune", "--config", f"configs/{name}"])
    assert result.exit_code == 1
    [line] = result.output.strip().splitlines()
    for part in (f"configs/{name}", component, "'default'", verb):
        assert part in line


def test_a_config_without_containers_is_not_run_in_containers():
    register.register("docker")
    with pytest.raises(
        ConfigError, match=r"'docker' runs every step in a container, .*local\.yaml.*`make stack-local`"
    ):
        check_stack(config("local.yaml"), "local.yaml")


def test_a_component_of_no_known_stack_is_reported_too():
    with pytest.raises(ConfigError, match=r"step operator 'mine', which .* does not have; add it to the stack"):
        check_stack({"steps": {"finetune": {"step_operator": "mine"}}}, "mine.yaml")


def test_a_store_that_pods_cannot_reach_is_reported(monkeypatch):
    for variable in ("ARTIFACT_STORE", "REGISTRY", "KUBERNETES_CONTEXT"):
        monkeypatch.setenv(variable, "s3://bucket/zenml")
    register.register("kubernetes")
    with pytest.raises(ConfigError, match=r"kubernetes\.yaml runs steps as pods, .*`zenml login`"):
        check_stack(config("kubernetes.yaml"), "kubernetes.yaml")


def test_a_missing_secret_is_reported_with_the_command_that_creates_it():
    with pytest.raises(ConfigError, match=r"secret 'nobodys', .*`zenml secret create nobodys --NAME=…`"):
        check_stack({"steps": {"finetune": {"secrets": ["nobodys"]}}}, "mine.yaml")


def test_an_existing_secret_is_accepted():
    Client().create_secret("somebodys", {"HF_TOKEN": "x"})
    check_stack({"secrets": ["somebodys"]}, "mine.yaml")


@pytest.mark.parametrize("name", ["local.yaml", "dev.yaml", "random_base.yaml", "gpt2_medium.yaml"])
def test_a_config_without_containers_needs_nothing(name):
    check_stack(config(name), name)


@pytest.mark.parametrize(("stack", "name"), [("docker", "docker.yaml"), ("local", "docker_gpu_step.yaml")])
def test_a_missing_container_engine_is_reported(stack, name, monkeypatch):
    register.register(stack)
    monkeypatch.setenv("DOCKER_HOST", "unix:///nowhere/docker.sock")
    with pytest.raises(ConfigError, match=rf"{name}: no container engine responds at unix:///nowhere/docker.sock"):
        check_stack(config(name), name)


def deploy_to(target: str, **values) -> dict:
    return {"parameters": {"deploy": {"target": target, **values}}}


def test_a_deploy_target_that_cannot_be_reached_is_reported(tmp_path, monkeypatch):
    monkeypatch.setenv("DOCKER_HOST", "unix:///nowhere/docker.sock")
    with pytest.raises(ConfigError, match=r"mine\.yaml: no container engine responds at unix:///nowhere/docker\.sock"):
        check_stack(deploy_to("docker"), "mine.yaml")
    monkeypatch.setenv("GPT2_REQUEST_LOG", "requests.jsonl")
    with pytest.raises(ConfigError, match=r"mine\.yaml: GPT2_REQUEST_LOG is"):
        check_stack(deploy_to("docker"), "mine.yaml")
    monkeypatch.setenv("GPT2_WEIGHT", "int8")
    with pytest.raises(ConfigError, match=r"mine\.yaml: GPT2_WEIGHT is not a setting; did you mean GPT2_WEIGHTS\?"):
        check_stack(deploy_to("docker"), "mine.yaml")
    kubernetes = deploy_to("kubernetes", image="a:1", kubeconfig=str(tmp_path / "missing"))
    with pytest.raises(ConfigError, match=r"mine\.yaml: the kubeconfig .*missing cannot be used"):
        check_stack(kubernetes, "mine.yaml")
    check_stack(deploy_to("none"), "mine.yaml")


def test_a_deploy_target_of_a_step_that_runs_elsewhere_is_not_reached_from_here(tmp_path, monkeypatch):
    register.register("local")
    monkeypatch.setattr("pipelines.stack._check_images", lambda *_: None)
    elsewhere = deploy_to("kubernetes", image="a:1", kubeconfig=str(tmp_path / "missing"))
    check_stack(elsewhere | {"steps": {"deploy": {"step_operator": "docker"}}}, "mine.yaml")


def test_a_local_container_is_no_deploy_target_of_a_step_that_runs_in_one(monkeypatch):
    register.register("docker")
    monkeypatch.setattr("pipelines.stack._check_images", lambda *_: None)
    with pytest.raises(ConfigError, match=r"deploy\.target is docker, but .*`make stack-local`"):
        check_stack(config("docker.yaml") | deploy_to("docker"), "docker.yaml")
