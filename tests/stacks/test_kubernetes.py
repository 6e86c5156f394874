"""The job that ZenML's Kubernetes step operator submits for configs/kubernetes.yaml, to a server that records it."""

import json
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from types import SimpleNamespace
from typing import Any
from uuid import uuid4

import kubernetes_validate
import pytest
import yaml
from kubernetes import client
from kubernetes_validate.utils import latest_version
from zenml.config.step_configurations import StepConfiguration
from zenml.config.step_run_info import StepRunInfo
from zenml.enums import StackComponentType
from zenml.integrations.kubernetes.flavors import KubernetesStepOperatorFlavor
from zenml.integrations.kubernetes.flavors.kubernetes_step_operator_flavor import KubernetesStepOperatorSettings

ROOT = Path(__file__).parent.parent.parent
CONFIG = yaml.safe_load((ROOT / "configs" / "kubernetes.yaml").read_text())
STACK = yaml.safe_load((ROOT / "stacks" / "kubernetes.yaml").read_text())
CLUSTER = list(yaml.safe_load_all((ROOT / "stacks" / "cluster" / "steps.yaml").read_text()))
NAMESPACE = STACK["components"]["step_operator"]["configuration"]["kubernetes_namespace"]
VERSIONS = ["1.27", latest_version()]


@pytest.fixture(scope="module", params=["finetune", "evaluate"])
def job(request) -> dict[str, Any]:
    """The submitted job without nulls: ZenML writes the container's security context under two spellings, and the one
    that Kubernetes does not know holds nulls only."""
    step = CONFIG["steps"][request.param]
    operator_settings = KubernetesStepOperatorSettings(**step["settings"]["step_operator.kubernetes"])
    image = step["settings"]["docker"]["parent_image"]
    info = StepRunInfo.model_construct(
        config=StepConfiguration(name=request.param, settings={"step_operator:kubernetes": operator_settings}),
        snapshot=SimpleNamespace(
            is_dynamic=False, project_id=uuid4(), build=SimpleNamespace(get_image=lambda **_: image)
        ),
        pipeline=SimpleNamespace(name="finetune_pipeline"),
        pipeline_step_name=request.param,
        run_id=uuid4(),
        run_name="a run",
        step_run_id=uuid4(),
    )
    flavor = KubernetesStepOperatorFlavor()
    operator = flavor.implementation_class(
        name="kubernetes",
        id=uuid4(),
        flavor=flavor.name,
        type=StackComponentType.STEP_OPERATOR,
        config=flavor.config_class(kubernetes_namespace=NAMESPACE),
        user=uuid4(),
        created=datetime.now(UTC),
        updated=datetime.now(UTC),
    )
    received: dict[str, Any] = {}
    server = HTTPServer(("127.0.0.1", 0), recorder(received))
    Thread(target=server.serve_forever, daemon=True).start()
    operator._k8s_client = client.ApiClient(client.Configuration(host=f"http://127.0.0.1:{server.server_port}"))
    operator.submit_with_allocation(info, ["python", "-m", "zenml.entrypoints.entrypoint", "--step"], {}, None)
    server.shutdown()
    assert received["path"] == f"/apis/batch/v1/namespaces/{NAMESPACE}/jobs"
    return {"apiVersion": "batch/v1", "kind": "Job", **without_nulls(received["body"])}


def recorder(received: dict[str, Any]) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            received.update(path=self.path, body=json.loads(body))
            self.send_response(201)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    return Handler


def without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [without_nulls(inner) for inner in value] if isinstance(value, list) else value


@pytest.fixture
def pod(job):
    return job["spec"]["template"]["spec"]


@pytest.fixture
def container(pod):
    [container] = pod["containers"]
    return container


@pytest.mark.parametrize("version", VERSIONS)
def test_the_job_passes_strict_validation(job, version):
    kubernetes_validate.validate(job, version, strict=True)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("manifest", CLUSTER, ids=lambda manifest: manifest["kind"])
def test_the_required_cluster_objects_pass_strict_validation(manifest, version):
    kubernetes_validate.validate(manifest, version, strict=True)


def test_the_pod_requests_one_gpu_and_a_node_with_gpus(pod, container):
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert pod["nodeSelector"] == {"nvidia.com/gpu.present": "true"}
    assert pod["tolerations"] == [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]


def test_requests_and_limits_cover_cpu_memory_disk_and_gpu(container):
    assert container["resources"]["requests"].keys() == {"cpu", "memory", "ephemeral-storage"}
    assert container["resources"]["limits"].keys() == {"memory", "ephemeral-storage", "nvidia.com/gpu"}


def test_the_pod_meets_the_restricted_pod_security_standard(pod, container):
    assert CLUSTER[0]["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "capabilities": {"drop": ["ALL"]},
        "privileged": False,
        "readOnlyRootFilesystem": True,
    }


def test_the_user_is_that_of_the_image_and_owns_the_mounted_volumes(pod):
    dockerfile = (ROOT / "Dockerfile").read_text()
    context = pod["securityContext"]
    assert f"USER {context['runAsUser']}:{context['runAsGroup']}\n" in dockerfile
    assert context["fsGroup"] == context["runAsGroup"]


def test_the_root_is_read_only_and_every_writable_path_is_a_volume(pod, container):
    mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    assert mounts.keys() == {"/cache", "/dev/shm", "/app", "/tmp"}
    volumes = {volume.pop("name"): volume for volume in map(dict, pod["volumes"])}
    assert volumes.keys() == set(mounts.values())
    assert volumes[mounts["/dev/shm"]]["emptyDir"]["medium"] == "Memory"
    assert all("sizeLimit" in volume["emptyDir"] for volume in volumes.values() if "emptyDir" in volume)


def test_weights_of_the_hub_are_stored_on_the_persistent_volume(pod, container):
    [home] = [variable["value"] for variable in container["env"] if variable["name"] == "HF_HOME"]
    assert home.startswith("/cache/")
    [claim] = [v["persistentVolumeClaim"]["claimName"] for v in pod["volumes"] if "persistentVolumeClaim" in v]
    assert claim == CLUSTER[2]["metadata"]["name"]


def test_service_account_and_namespace_exist_and_no_token_is_mounted(pod):
    assert pod["serviceAccountName"] == CLUSTER[1]["metadata"]["name"]
    assert {manifest["metadata"].get("namespace", NAMESPACE) for manifest in CLUSTER} == {NAMESPACE}
    assert CLUSTER[0]["metadata"]["name"] == NAMESPACE
    assert pod["automountServiceAccountToken"] is False


def test_secrets_come_from_zenmls_store_and_are_not_in_the_job(job):
    assert all(CONFIG["steps"][step]["secrets"] == ["gpt2-instruct"] for step in ("finetune", "evaluate"))
    assert not any(word in json.dumps(job) for word in ("HF_TOKEN", "WANDB_API_KEY", "secretKeyRef"))


def test_zenml_and_not_the_cluster_retries_a_failed_pod(job, pod):
    assert job["spec"]["backoffLimit"] == 0
    assert pod["restartPolicy"] == "Never"
    assert all(CONFIG["steps"][step]["retry"]["max_retries"] >= 1 for step in ("finetune", "evaluate"))
