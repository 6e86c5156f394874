"""The manifests: valid, in agreement with each other and with the service."""

import re
from pathlib import Path

import kubernetes_validate
import pytest
import yaml
from kubernetes_validate.utils import latest_version

from steps.adapters import bento

ROOT = Path(__file__).parent.parent
MANIFESTS = {path.name: yaml.safe_load(path.read_text()) for path in sorted((ROOT / "k8s").glob("*.yaml"))}
SERVICE = (ROOT / "bentos" / "service.py").read_text()


@pytest.fixture
def deployment():
    return MANIFESTS["30-deployment.yaml"]


@pytest.fixture
def pod(deployment):
    return deployment["spec"]["template"]["spec"]


@pytest.fixture
def container(pod):
    [container] = pod["containers"]
    return container


@pytest.mark.parametrize("version", ["1.25", latest_version()])
@pytest.mark.parametrize("name", MANIFESTS)
def test_each_manifest_is_valid_to_the_letter(name, version):
    kubernetes_validate.validate(MANIFESTS[name], version, strict=True)


def test_the_namespace_is_applied_first():
    assert next(iter(MANIFESTS.values()))["kind"] == "Namespace"


def test_everything_has_the_one_name_and_lives_in_the_one_namespace():
    for manifest in MANIFESTS.values():
        assert manifest["metadata"]["name"] == bento.NAME
        assert manifest["metadata"].get("namespace", bento.NAME) == bento.NAME
        assert manifest["kind"] == "Namespace" or "namespace" in manifest["metadata"]


def test_deployment_and_service_select_the_pods_there_are(deployment):
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    assert deployment["spec"]["selector"]["matchLabels"].items() <= labels.items()
    assert MANIFESTS["40-service.yaml"]["spec"]["selector"].items() <= labels.items()
    for spread in deployment["spec"]["template"]["spec"]["topologySpreadConstraints"]:
        assert spread["labelSelector"]["matchLabels"].items() <= labels.items()


def test_the_service_sends_to_the_port_of_the_container(container):
    [port], [target] = container["ports"], MANIFESTS["40-service.yaml"]["spec"]["ports"]
    assert port["containerPort"] == target["port"] == 3000
    assert target["targetPort"] == port["name"]


def test_probes_ask_bentomls_own_routes_on_the_named_port(container):
    paths = {kind: container[f"{kind}Probe"]["httpGet"] for kind in ("startup", "readiness", "liveness")}
    assert {kind: get["path"] for kind, get in paths.items()} == {
        "startup": "/readyz",
        "readiness": "/readyz",
        "liveness": "/livez",
    }
    assert {get["port"] for get in paths.values()} == {container["ports"][0]["name"]}


def test_a_pod_that_ends_has_time_for_the_longest_answer(pod, container):
    deadline = float(re.search(r"^DEADLINE = ([\d.]+)", SERVICE, re.MULTILINE)[1])
    pause = int(container["lifecycle"]["preStop"]["exec"]["command"][1])
    assert pod["terminationGracePeriodSeconds"] > pause + deadline


def test_the_pod_runs_as_nobody_in_particular_on_a_root_it_cannot_write_to(pod, container):
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["runAsUser"] > 10000
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }


def test_what_the_server_writes_goes_to_a_volume_of_limited_size(pod, container):
    home = next(variable["value"] for variable in container["env"] if variable["name"] == "BENTOML_HOME")
    [mount], [volume] = container["volumeMounts"], pod["volumes"]
    assert home.startswith(mount["mountPath"])
    assert mount["name"] == volume["name"]
    assert "sizeLimit" in volume["emptyDir"]


def test_no_token_of_the_cluster_is_mounted(pod):
    assert pod["automountServiceAccountToken"] is False
    assert MANIFESTS["10-serviceaccount.yaml"]["automountServiceAccountToken"] is False
    assert pod["serviceAccountName"] == MANIFESTS["10-serviceaccount.yaml"]["metadata"]["name"]


def test_requests_and_limits_are_set_for_all_that_a_node_can_run_out_of(container):
    for kind in ("requests", "limits"):
        assert container["resources"][kind].keys() == {"cpu", "memory", "ephemeral-storage"}
    threads = next(variable["value"] for variable in container["env"] if variable["name"] == "OMP_NUM_THREADS")
    assert threads == container["resources"]["limits"]["cpu"]


def test_the_image_has_a_tag_that_stays(container):
    name, _, tag = container["image"].partition(":")
    assert name == bento.NAME
    assert tag not in ("", "latest")


def test_no_environment_of_other_services_reaches_the_pod(pod):
    assert pod["enableServiceLinks"] is False


def test_the_manifests_hold_no_secrets():
    assert not {manifest["kind"] for manifest in MANIFESTS.values()} & {"Secret"}
