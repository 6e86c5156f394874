"""The choice of a deploy target, and the form of its outcomes."""

import socket
import subprocess
import sys
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
from docker.errors import NotFound

from deploy.config import DeployConfig
from deploy.containers import rollout
from deploy.containers.rollout import DockerTarget
from deploy.kubernetes.rollout import KubernetesTarget
from deploy.open_target import open_target
from deploy.target import DeployError, DeployOutcome, Version
from tests.helpers import free_port


def test_none_opens_no_target():
    assert open_target(DeployConfig()) is None


def test_kubernetes_opens_the_cluster(config):
    target = open_target(config)
    assert isinstance(target, KubernetesTarget)
    assert target.cluster.namespace == "gpt2-instruct"


@pytest.fixture
def no_proxy(monkeypatch):
    """An engine of this machine without containers."""
    api = SimpleNamespace(base_url="http+docker://localhost")  # docker's client has it for every Unix socket

    @contextmanager
    def connect():
        yield SimpleNamespace(api=api, containers=SimpleNamespace(get=get, list=lambda **_: []))

    def get(name):
        raise NotFound(name)

    monkeypatch.setattr(rollout, "connect", connect)
    return api


@pytest.mark.parametrize("url", ["https://192.0.2.1:2376", "http://[2001:db8::1]:2375", "http+docker://ssh"])
def test_an_engine_of_another_machine_is_refused(no_proxy, url):
    no_proxy.base_url = url
    target = DockerTarget(DeployConfig(target="docker", port=free_port()))
    for refused in (target.preflight, target.rollback):
        with pytest.raises(DeployError, match="the container engine is on another machine"):
            refused()


@pytest.mark.parametrize("url", ["http://127.0.0.1:2375", "https://localhost:2376"])
def test_an_engine_of_this_machine_may_have_a_tcp_address(no_proxy, url):
    no_proxy.base_url = url
    DockerTarget(DeployConfig(target="docker", port=free_port())).preflight()


def test_a_preflight_of_docker_names_a_port_in_use_and_an_address_of_another_machine(no_proxy):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        target = DockerTarget(DeployConfig(target="docker", port=listener.getsockname()[1]))
        with pytest.raises(DeployError, match=r"port \d+ of 127\.0\.0\.1 is in use by another program"):
            target.preflight()
    target.preflight()
    with pytest.raises(DeployError, match=r"deploy\.host is 192\.0\.2\.1, no address of this machine"):
        DockerTarget(DeployConfig(target="docker", host="192.0.2.1")).preflight()


def test_a_service_with_the_same_image_is_no_version_to_roll_back_to():
    """Its proxy was removed, and the same version was deployed again: the earlier version must be kept."""

    def container(name, image, started):
        host = {"RestartPolicy": {"Name": "unless-stopped"}}
        attrs = {"Image": image, "State": {"StartedAt": started}, "HostConfig": host}
        return SimpleNamespace(id=name, attrs=attrs)

    first, second, again = container("1", "a", "07:00"), container("2", "b", "08:00"), container("3", "b", "09:00")
    client = SimpleNamespace(containers=SimpleNamespace(list=lambda **_: [first, second, again]))
    deployment = rollout._Deployment(client, DeployConfig(target="docker"))
    assert deployment.previous(again, None) is first
    assert deployment.previous(again, second) is first
    assert deployment.previous(second, first) is first


def test_an_outcome_survives_json():
    outcome = DeployOutcome(
        "kubernetes", "deployed", "gpt2-instruct:2", previous=Version("gpt2-instruct:1", "image:1", 1)
    )
    assert DeployOutcome.from_json(outcome.to_json()) == outcome


def test_the_protocol_imports_no_client_library():
    code = "import deploy.target, sys; print(*{'docker', 'kubernetes', 'bentoml', 'torch'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
