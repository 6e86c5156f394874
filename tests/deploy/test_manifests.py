"""The manifests of k8s/: valid, and consistent with each other and with the service."""

import copy
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import kubernetes_validate
import pytest
import yaml
from kubeflow_trainer_api import models as trainer
from kubernetes_validate.utils import latest_version

from bentos.app import app
from bentos.limits import DEADLINE, DRAIN_MAX, LAST_REQUESTS
from bentos.settings import Settings
from deploy import bento
from gpt2core.config import LoraConfig, TrainConfig
from gpt2core.train_job import Job

ROOT = Path(__file__).parent.parent.parent
MANIFESTS = {path.name: yaml.safe_load(path.read_text()) for path in sorted((ROOT / "k8s").glob("*.yaml"))}
OVERLAYS = ROOT / "k8s-overlays"
OVERLAY_NAMES = sorted(path.name for path in OVERLAYS.iterdir())
CRDS = {  # API group -> npm package with types and validators generated from the CRDs of that project
    "gateway.networking.k8s.io": "gateway-api@0.5.1",
    "keda.sh": "keda@0.4.2",
    "argoproj.io": "argo-rollouts@0.3.2",
    "monitoring.coreos.com": "prometheus-operator@6.0.0",
}
TRAINER = "trainer.kubeflow.org"  # its types are in kubeflow-trainer-api
OPTIONAL = {
    path.stem: list(yaml.safe_load_all(path.read_text())) for path in (ROOT / "k8s" / "optional").glob("*.yaml")
}
POD_LABELS = MANIFESTS["30-deployment.yaml"]["spec"]["template"]["metadata"]["labels"]
ROUTES = {"/", *app.openapi()["paths"]}


def read_all(file):
    return list(yaml.safe_load_all(file.read_text()))


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


@pytest.mark.parametrize("version", ["1.27", latest_version()])
@pytest.mark.parametrize("name", MANIFESTS)
def test_each_manifest_is_strictly_valid(name, version):
    kubernetes_validate.validate(MANIFESTS[name], version, strict=True)


def test_the_namespace_is_the_first_file():
    assert next(iter(MANIFESTS.values()))["kind"] == "Namespace"


def test_all_objects_share_one_name_and_namespace():
    for manifest in MANIFESTS.values():
        assert manifest["metadata"]["name"] == bento.NAME
        assert manifest["metadata"].get("namespace", bento.NAME) == bento.NAME
        assert manifest["kind"] == "Namespace" or "namespace" in manifest["metadata"]


@pytest.mark.parametrize("version", ["1.27", latest_version()])
@pytest.mark.parametrize("name", OPTIONAL)
def test_each_optional_manifest_of_a_builtin_kind_is_strictly_valid(name, version):
    for manifest in OPTIONAL[name]:
        if manifest["apiVersion"].partition("/")[0] not in (*CRDS, TRAINER):
            kubernetes_validate.validate(manifest, version, strict=True)


@pytest.mark.parametrize("version", ["1.27", latest_version()])
def test_the_pods_of_the_train_job_are_strictly_valid_and_read_a_valid_job(version):
    claim, config, runtime, job = OPTIONAL["trainjob"]
    [node] = runtime["spec"]["template"]["spec"]["replicatedJobs"]
    template = copy.deepcopy(node["template"]["spec"]["template"])
    [container] = template["spec"]["containers"]
    container |= {"resources": job["spec"]["trainer"]["resourcesPerNode"], "command": job["spec"]["trainer"]["command"]}
    template["spec"]["restartPolicy"] = "Never"  # JobSet's default
    metadata = {"name": "gpt2-instruct-node-0"}
    pods = {"apiVersion": "batch/v1", "kind": "Job", "metadata": metadata, "spec": {"template": template}}
    kubernetes_validate.validate(pods, version, strict=True)
    assert (node["name"], container["name"]) == ("node", "node")  # the names that Trainer knows
    assert job["spec"]["runtimeRef"]["name"] == runtime["metadata"]["name"]
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in template["spec"]["volumes"]}
    assert volumes["training"]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
    assert volumes["job"]["configMap"]["name"] == config["metadata"]["name"]
    file = Path(container["command"][-1])
    content = Job(**json.loads(config["data"][file.name]))
    assert str(file.parent) == mounts["job"]
    assert all(path.startswith(f"{mounts['training']}/") for path in (content.base, content.records, content.out))
    assert LoraConfig(**content.lora)
    assert TrainConfig(**content.train, seed=content.seed)


def as_trainer_reads(manifest: dict) -> dict:
    """What is left of a manifest in Trainer's models, which refuse values of another type and drop unknown fields."""
    return getattr(trainer, f"TrainerV1alpha1{manifest['kind']}").from_dict(manifest).to_dict()


@pytest.mark.parametrize("kind", ["TrainingRuntime", "TrainJob"])
def test_trainer_knows_each_field_of_its_manifests(kind):
    [manifest] = [each for each in OPTIONAL["trainjob"] if each["kind"] == kind]
    assert as_trainer_reads(manifest) == manifest


def test_a_field_that_trainer_does_not_know_or_of_another_type_is_noticed():
    _, _, runtime, job = copy.deepcopy(OPTIONAL["trainjob"])
    runtime["spec"]["mlPolicy"]["torch"]["numProcPerNode"] = 1  # a field in Trainer 2.0 and 2.1
    assert as_trainer_reads(runtime) == OPTIONAL["trainjob"][2]
    job["spec"]["trainer"]["numNodes"] = "2"
    with pytest.raises(ValueError, match="numNodes"):
        as_trainer_reads(job)


def merged(value, patch):
    """A strategic merge patch: maps are merged, and lists of objects by their mount path or name."""
    if isinstance(value, dict) and isinstance(patch, dict):
        return value | {key: merged(value.get(key), each) for key, each in patch.items()}
    for key in ("mountPath", "name"):
        if isinstance(value, list) and all(isinstance(each, dict) and key in each for each in (*value, *patch)):
            items = {each[key]: each for each in value}
            return list((items | {each[key]: merged(items.get(each[key]), each) for each in patch}).values())
    return patch


@pytest.mark.parametrize("version", ["1.27", latest_version()])
@pytest.mark.parametrize("name", ["gpu", "adapters"])
def test_the_deployment_with_a_patch_is_strictly_valid_and_has_all_its_fields(deployment, name, version):
    patched = merged(deployment, *read_all(OVERLAYS / name / "deployment.yaml"))
    kubernetes_validate.validate(patched, version, strict=True)
    assert merged(patched, deployment) == patched  # the patch changes no field of the file: deployments do not conflict


def test_the_adapters_patch_mounts_the_volume_that_the_service_follows(deployment):
    [patch], [claim, writer] = (read_all(OVERLAYS / "adapters" / f"{name}.yaml") for name in ("deployment", "volume"))
    pod = merged(deployment, patch)["spec"]["template"]["spec"]
    [container] = pod["containers"]
    settings = Settings.from_environment({each["name"]: each.get("value", "") for each in container["env"]})
    assert settings.follow_adapters
    mounts = [each for each in container["volumeMounts"] if each["name"] == "adapters"]
    assert mounts == [{"name": "adapters", "mountPath": settings.adapters_dir, "readOnly": True}]
    for volume in (pod["volumes"][-1], writer["spec"]["volumes"][0]):
        assert volume["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
    assert writer["spec"]["containers"][0]["volumeMounts"][0]["mountPath"] == settings.adapters_dir
    assert writer["metadata"]["labels"].items().isdisjoint(POD_LABELS.items())  # the Service selects no pod to fill it


@pytest.fixture
def nightly_command():
    [_, job] = OPTIONAL["retrain"]
    [container] = job["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"]
    return container["command"]


def test_the_nightly_job_ends_well_before_the_first_traffic(nightly_command, tmp_path):
    paths = {"LOGS": tmp_path / "none", "ZENML_REPOSITORY_PATH": tmp_path}
    environment = {name: str(path) for name, path in paths.items()} | {"PATH": "/usr/bin:/bin"}
    done = subprocess.run(nightly_command, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "there are no request logs yet\n")


def test_the_nightly_job_drops_corrections_longer_than_the_context(nightly_command):
    script = nightly_command[-1].replace("\\\n", "")
    [finetune] = [line for line in script.splitlines() if "run.py finetune" in line]
    assert "--set data.too_long=drop" in finetune


def test_optional_manifests_are_outside_the_applied_folder():
    # no recursion in kubectl, and no file without an extension
    assert {path.name for path in (ROOT / "k8s").iterdir()} == {*MANIFESTS, "optional", "Kustomization"}


def kustomize(overlay: str):
    command = ["kubectl", "kustomize", str(OVERLAYS / overlay)]
    return list(yaml.safe_load_all(subprocess.run(command, capture_output=True, text=True, check=True).stdout))


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="needs kubectl")
@pytest.mark.parametrize("overlay", OVERLAY_NAMES)
def test_an_overlay_is_k8s_with_changes_that_are_strictly_valid(overlay):
    objects = kustomize(overlay)
    removed = {"HorizontalPodAutoscaler"} if overlay == "keda" else set()
    assert {each["kind"] for each in objects} >= {each["kind"] for each in MANIFESTS.values()} - removed
    for each in objects:
        if each["apiVersion"].partition("/")[0] not in CRDS:
            for version in ("1.27", latest_version()):
                kubernetes_validate.validate(each, version, strict=True)
    assert objects != list(MANIFESTS.values())


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="needs kubectl")
def test_only_one_autoscaler_scales_the_pods():
    [rollout] = [each for each in kustomize("rollout") if each["kind"] == "Rollout"]
    [hpa] = [each for each in kustomize("rollout") if each["kind"] == "HorizontalPodAutoscaler"]
    target = {key: rollout[key] for key in ("apiVersion", "kind")} | {"name": rollout["metadata"]["name"]}
    assert hpa["spec"]["scaleTargetRef"] == target
    assert "HorizontalPodAutoscaler" not in {each["kind"] for each in kustomize("keda")}


@pytest.mark.slow
@pytest.mark.skipif(None in map(shutil.which, ("npm", "node", "kubectl")), reason="needs npm, node and kubectl")
def test_custom_resources_match_their_crds(tmp_path):
    """By types and validators generated from the CRDs: the types refuse unknown fields, the validators wrong values."""
    packages = [f"@kubernetes-models/{package}" for package in CRDS.values()] + ["typescript@5.9.3"]
    install = ["npm", "install", "--ignore-scripts", "--no-audit", "--no-fund", *packages]
    done = subprocess.run(install, cwd=tmp_path, capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip(f"the types cannot be installed: {done.stderr[-300:]}")
    objects = [*(each for group in OPTIONAL.values() for each in group), *(kustomize("keda") + kustomize("rollout"))]
    custom = [each for each in objects if each["apiVersion"].partition("/")[0] in CRDS]
    assert {each["kind"] for each in custom} == {"HTTPRoute", "Rollout", "ScaledObject", "ServiceMonitor"}
    for each in custom:
        package = CRDS[each["apiVersion"].partition("/")[0]].partition("@")[0]
        kind, content = each["kind"], json.dumps(each)
        source = f'"@kubernetes-models/{package}/{each["apiVersion"]}/{kind}"'
        (tmp_path / f"{kind}.ts").write_text(
            f"import {{ I{kind} }} from {source};\nexport const it: I{kind} = {content};"
        )
        (tmp_path / f"{kind}.mjs").write_text(f"import {{ {kind} }} from {source};\nnew {kind}({content}).validate();")
        done = subprocess.run(["node", f"{kind}.mjs"], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    files = [f"{each['kind']}.ts" for each in custom]
    tsc = ["node_modules/.bin/tsc", "--noEmit", "--skipLibCheck", *files]
    done = subprocess.run(tsc, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_autoscaler_owns_the_replicas(deployment):
    hpa = MANIFESTS["50-hpa.yaml"]["spec"]
    assert hpa["scaleTargetRef"] == {"apiVersion": "apps/v1", "kind": "Deployment", "name": bento.NAME}
    assert "replicas" not in deployment["spec"]
    assert 2 <= hpa["minReplicas"] <= hpa["maxReplicas"]


def test_the_cpu_target_is_between_idle_use_and_the_limit(container):
    [metric] = MANIFESTS["50-hpa.yaml"]["spec"]["metrics"]
    target = int(metric["resource"]["target"]["averageValue"].removesuffix("m"))
    assert metric["resource"]["name"] == "cpu"
    assert 300 < target < 1150  # a nano pod uses 1.15 cores under constant load
    assert target < int(container["resources"]["limits"]["cpu"]) * 1000


@pytest.mark.parametrize(
    "selector",
    [
        MANIFESTS["30-deployment.yaml"]["spec"]["selector"]["matchLabels"],
        MANIFESTS["40-service.yaml"]["spec"]["selector"],
        MANIFESTS["60-pdb.yaml"]["spec"]["selector"]["matchLabels"],
        MANIFESTS["70-networkpolicy.yaml"]["spec"]["podSelector"]["matchLabels"],
    ],
)
def test_each_selector_matches_the_pod_labels(selector):
    assert selector
    assert selector.items() <= POD_LABELS.items()


def test_the_pods_of_each_version_spread_over_nodes(pod):
    [spread] = pod["topologySpreadConstraints"]
    assert spread["labelSelector"]["matchLabels"].items() <= POD_LABELS.items()
    assert (spread["topologyKey"], spread["matchLabelKeys"]) == ("kubernetes.io/hostname", ["pod-template-hash"])


def test_the_disruption_budget_allows_draining_a_node():
    budget = MANIFESTS["60-pdb.yaml"]["spec"]
    assert (budget["maxUnavailable"], budget["unhealthyPodEvictionPolicy"]) == (1, "AlwaysAllow")


def test_the_network_policy_allows_the_container_port_in_and_nothing_out(container):
    policy = MANIFESTS["70-networkpolicy.yaml"]["spec"]
    assert policy["policyTypes"] == ["Ingress", "Egress"]
    assert policy["ingress"] == [{"ports": [{"protocol": "TCP", "port": container["ports"][0]["name"]}]}]
    assert "egress" not in policy


def test_the_gateway_route_exposes_what_the_ingress_exposes():
    [route], [ingress] = OPTIONAL["httproute"], OPTIONAL["ingress"]
    rules = route["spec"]["rules"]
    matches = [match["path"] for rule in rules for match in rule["matches"]]
    types = {"Exact": "Exact", "Prefix": "PathPrefix"}
    paths = ingress["spec"]["rules"][0]["http"]["paths"]
    wanted = [{"type": types[path["pathType"]], "value": path["path"]} for path in paths]
    assert sorted(matches, key=str) == sorted(wanted, key=str)
    [port] = MANIFESTS["40-service.yaml"]["spec"]["ports"]
    for rule in rules:
        assert len(rule["matches"]) <= 8  # the limit before Gateway API 1.2
        assert rule["backendRefs"] == [{"name": bento.NAME, "port": port["port"]}]
    assert int(rules[0]["timeouts"]["request"].removesuffix("s")) > DEADLINE


def test_ingress_and_service_monitor_select_the_service_port_by_name():
    [port] = MANIFESTS["40-service.yaml"]["spec"]["ports"]
    [ingress], [monitor] = OPTIONAL["ingress"], OPTIONAL["servicemonitor"]
    [rule] = ingress["spec"]["rules"]
    backends = [path["backend"]["service"] for path in rule["http"]["paths"]]
    assert backends
    assert all(backend == {"name": bento.NAME, "port": {"name": port["name"]}} for backend in backends)
    assert [rule["host"]] == ingress["spec"]["tls"][0]["hosts"]
    [endpoint] = monitor["spec"]["endpoints"]
    assert endpoint["port"] == port["name"]
    labels = MANIFESTS["40-service.yaml"]["metadata"]["labels"]
    assert monitor["spec"]["selector"]["matchLabels"].items() <= labels.items()


def test_the_ingress_exposes_routes_of_the_service_only():
    [ingress] = OPTIONAL["ingress"]
    exact, prefix = (
        {path["path"] for path in ingress["spec"]["rules"][0]["http"]["paths"] if path["pathType"] == kind}
        for kind in ("Exact", "Prefix")
    )
    assert exact - ROUTES == {"/docs.json", "/openapi.json"}  # BentoML's; the page and generators of clients read it
    assert {"/", "/predict", "/feedback", "/v1/chat/completions"} <= exact
    assert prefix == {"/v1/models"}
    assert {route for route in ROUTES if route.startswith("/v1/models")} == {"/v1/models", "/v1/models/{model}"}


def test_the_role_binding_binds_the_role_to_its_service_account():
    account, role, binding = OPTIONAL["deployer"]
    assert binding["roleRef"]["name"] == role["metadata"]["name"]
    assert binding["subjects"] == [{"kind": account["kind"], **account["metadata"]}]


def test_the_service_targets_the_container_port(container):
    [port], [target] = container["ports"], MANIFESTS["40-service.yaml"]["spec"]["ports"]
    assert port["containerPort"] == target["port"] == 3000
    assert target["targetPort"] == port["name"]


def test_probes_request_bentoml_routes_on_the_named_port(container):
    paths = {kind: container[f"{kind}Probe"]["httpGet"] for kind in ("startup", "readiness", "liveness")}
    assert {kind: get["path"] for kind, get in paths.items()} == {
        "startup": "/readyz",
        "readiness": "/readyz",
        "liveness": "/livez",
    }
    assert {get["port"] for get in paths.values()} == {container["ports"][0]["name"]}


def test_the_grace_period_covers_the_longest_request(pod, container):
    pause = int(container["lifecycle"]["preStop"]["exec"]["command"][1])
    assert pod["terminationGracePeriodSeconds"] > pause + DRAIN_MAX + LAST_REQUESTS + DEADLINE


def test_the_pod_is_unprivileged_with_a_read_only_root(pod, container):
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["runAsUser"] > 10000
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }


def test_the_server_writes_to_a_volume_of_limited_size(pod, container):
    home = next(variable["value"] for variable in container["env"] if variable["name"] == "BENTOML_HOME")
    [mount] = [mount for mount in container["volumeMounts"] if not mount.get("readOnly")]
    [volume] = [volume for volume in pod["volumes"] if volume["name"] == mount["name"]]
    assert home.startswith(mount["mountPath"])
    assert "sizeLimit" in volume["emptyDir"]


def test_the_configuration_is_mounted_where_bentoml_reads_it(pod, container):
    config = MANIFESTS["20-configmap.yaml"]
    file = Path(next(variable["value"] for variable in container["env"] if variable["name"] == "BENTOML_CONFIG"))
    [mount] = [mount for mount in container["volumeMounts"] if mount.get("readOnly")]
    [volume] = [volume for volume in pod["volumes"] if volume["name"] == mount["name"]]
    assert (mount["mountPath"], volume["configMap"]["name"]) == (str(file.parent), config["metadata"]["name"])
    assert file.name in config["data"]


def test_bentoml_accepts_the_configuration(tmp_path, monkeypatch):
    """A value of the wrong type would fail every pod at its start."""
    file = tmp_path / "bentoml.yaml"
    file.write_text(MANIFESTS["20-configmap.yaml"]["data"][file.name])
    code = (
        "import json, sys\n"
        "from bentoml._internal.configuration.containers import BentoMLConfiguration\n"
        "config = BentoMLConfiguration(override_config_file=sys.argv[1], use_version=2).to_dict()\n"
        "print(json.dumps(config['services']['gpt2-instruct']))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(file)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    service = json.loads(done.stdout.splitlines()[-1])
    assert service["metrics"]["duration"]["buckets"][-1] >= 55
    assert yaml.safe_load(file.read_text())["services"].keys() == {bento.NAME}


def test_no_service_account_token_is_mounted(pod):
    assert pod["automountServiceAccountToken"] is False
    assert MANIFESTS["10-serviceaccount.yaml"]["automountServiceAccountToken"] is False
    assert pod["serviceAccountName"] == MANIFESTS["10-serviceaccount.yaml"]["metadata"]["name"]


def test_requests_and_limits_cover_cpu_memory_and_storage(container):
    for kind in ("requests", "limits"):
        assert container["resources"][kind].keys() == {"cpu", "memory", "ephemeral-storage"}
    threads = next(variable["valueFrom"] for variable in container["env"] if variable["name"] == "OMP_NUM_THREADS")
    assert threads == {"resourceFieldRef": {"resource": "limits.cpu", "divisor": "0"}}


def test_a_rollout_fits_a_node_with_two_cpus(deployment, container):
    pods = MANIFESTS["50-hpa.yaml"]["spec"]["minReplicas"] + deployment["spec"]["strategy"]["rollingUpdate"]["maxSurge"]
    request = int(re.fullmatch(r"(\d+)m", container["resources"]["requests"]["cpu"])[1])
    assert pods * request + 950 <= 2000  # 950m: the control plane of a single kind node


def test_probes_state_their_timeouts(container):
    assert all(container[f"{kind}Probe"]["timeoutSeconds"] > 1 for kind in ("startup", "readiness", "liveness"))


def test_the_documented_kubectl_commands_name_the_objects_of_the_manifests(deployment, container):
    text = (ROOT / "docs" / "kubernetes.md").read_text()
    [command] = re.findall(r"^kubectl set image .*", text, re.MULTILINE)
    assert command.split()[3:5] == [f"deployment/{deployment['metadata']['name']}", f"{container['name']}=$IMAGE"]
    assert command.endswith(f"-n {deployment['metadata']['namespace']}")


DOCUMENTED = sorted(
    {
        line.strip().partition("#")[0].strip()
        for page in ("kubernetes", "kubeflow", "serving", "monitoring")
        for line in (ROOT / "docs" / f"{page}.md").read_text().replace("\\\n", "").splitlines()
        if re.match(r"\s*kubectl (apply|create secret) ", line)
    }
)


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="needs kubectl")
@pytest.mark.parametrize("command", DOCUMENTED)
def test_a_documented_command_that_needs_no_cluster_to_be_checked_is_right(command):
    words = shlex.split(command)
    if words[1] == "create":
        subprocess.run([*words, "--dry-run=client", "--output=yaml"], check=True, stdout=subprocess.DEVNULL)
    elif "-k" in words:
        assert kustomize(Path(words[-1]).name)
    else:
        path = ROOT / words[words.index("-f") + 1]
        files = sorted(path.glob("*.yaml")) if path.is_dir() else [path]  # as kubectl reads a folder
        assert all(each["apiVersion"] and each["metadata"]["name"] for file in files for each in read_all(file))
        assert files


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="needs kubectl")
def test_kubectl_set_image_changes_the_image_of_the_manifest():
    command = ["kubectl", "set", "image", "--local", "-f", str(ROOT / "k8s" / "30-deployment.yaml"), "-o", "yaml"]
    done = subprocess.run([*command, "gpt2-instruct=gpt2-instruct:0123"], capture_output=True, text=True, check=True)
    [container] = yaml.safe_load(done.stdout)["spec"]["template"]["spec"]["containers"]
    assert container["image"] == "gpt2-instruct:0123"


def test_the_image_has_a_fixed_tag(container):
    name, _, tag = container["image"].partition(":")
    assert name == bento.NAME
    assert tag not in ("", "latest")


def test_no_service_links_are_injected(pod):
    assert pod["enableServiceLinks"] is False


def test_no_manifest_is_a_secret():
    manifests = [*MANIFESTS.values(), *(manifest for group in OPTIONAL.values() for manifest in group)]
    assert not {manifest["kind"] for manifest in manifests} & {"Secret"}


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("kubectl") is None, reason="needs kubectl")
def test_checkov_reports_only_the_explained_skips(tmp_path):
    """In an environment of its own: 290 MB, with version bounds that conflict with this project's."""
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "checkov"], check=True)
    install = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "checkov==3.3.30"]
    done = subprocess.run([tmp_path / "checkov" / "bin" / "python", *install], capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip(f"checkov cannot be installed: {done.stderr[-300:]}")
    rendered = tmp_path / "rendered"
    rendered.mkdir()
    for overlay in OVERLAY_NAMES:
        (rendered / f"{overlay}.yaml").write_text(yaml.safe_dump_all(kustomize(overlay)))
    command = [tmp_path / "checkov" / "bin" / "checkov", "--skip-download", "--compact", "--quiet", "--output", "json"]
    for folder in (ROOT / "k8s", rendered):  # with k8s/optional
        done = subprocess.run([*command, "--directory", folder], cwd=ROOT, capture_output=True, text=True)
        summary = json.loads(done.stdout)["summary"]
        assert summary["passed"] > 100
        assert summary["failed"] == 0, done.stdout
        assert done.returncode == 0
