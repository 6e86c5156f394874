"""Rollout on Kubernetes: the real client, over HTTPS, against a double of the API server (kube_api.py)."""

import json
import logging
import re

import pytest
import yaml

from deploy.kubernetes import wait
from deploy.kubernetes.errors import KubeError
from deploy.kubernetes.render import MANIFESTS
from deploy.kubernetes.rollout import KubernetesTarget
from deploy.server import serve
from deploy.target import DeployFailed, DeployOutcome, Version
from deploy.verify import request_answer
from tests.deploy.kube_api import TOKEN
from tests.deploy.kube_target import (
    CONTAINER,
    DEPLOYMENT,
    LINEAGE,
    NEW,
    NEXT_LINEAGE,
    OLD,
    constant_response,
    deploy,
    deploy_next,
    failed,
    kubectl_apply,
    preflight,
)
from tests.helpers import build_bento, make_lineage, make_sample


def test_a_first_deployment_applies_all_of_k8s_and_reports_what_runs(api, first):
    assert first == DeployOutcome(
        target="kubernetes",
        outcome="deployed",
        bento=LINEAGE.bento,
        reason="1 answers were verified against those of the evaluated model",
        namespace="gpt2-instruct",
        image=OLD,
        image_id="registry.example/gpt2-instruct@sha256:" + "1" * 64,
        revision=1,
    )
    kinds = {yaml.safe_load(file.read_text())["kind"] for file in MANIFESTS.glob("*.yaml")}
    assert {api.object(plural)["kind"] for plural, _ in api.objects} | {"Namespace"} == kinds
    assert api.running() == [OLD, OLD]  # the HPA's two


def test_pods_carry_the_ids_of_the_lineage(api, first):
    template = api.object("deployments")["spec"]["template"]["metadata"]
    ids = {key.removeprefix("gpt2-instruct/"): value for key, value in template["annotations"].items()}
    assert ids["run-id"] == LINEAGE.run.id
    assert ids["model-version"] == LINEAGE.model_version
    assert ids["commit"] == LINEAGE.commit.sha
    assert ids["adapter-sha256"] == LINEAGE.adapter.sha256
    assert {split: ids[f"data-{split}-sha256"] for split in ("train", "val", "test")} == LINEAGE.data
    assert ids["bento"] == LINEAGE.bento
    assert template["labels"]["gpt2-instruct/adapter-sha256"] == LINEAGE.adapter.sha256[:63]
    assert all(len(label) <= 63 for label in template["labels"].values())


def test_a_preflight_accepts_an_empty_cluster_and_a_deployment_and_changes_nothing(api, config):
    preflight(config)
    assert not api.objects
    deploy(config)
    preflight(config)  # the controller observes the last generation
    before = api.object("deployments")
    preflight(config)
    assert api.object("deployments") == before


def test_the_selector_is_that_of_the_file(api, first):
    assert api.object("deployments")["spec"]["selector"] == {"matchLabels": {"app.kubernetes.io/name": "gpt2-instruct"}}


def test_the_next_version_replaces_the_first_and_names_it_as_previous(api, config, first):
    outcome = deploy_next(config)
    assert (outcome.outcome, outcome.revision) == ("deployed", 2)
    assert outcome.previous == Version(LINEAGE.bento, OLD, 1)
    assert api.running() == [NEW, NEW]


def test_the_memory_of_a_pod_can_be_configured_and_is_as_in_the_file_otherwise(api, config, first):
    def memory():
        [container] = api.object("deployments")["spec"]["template"]["spec"]["containers"]
        return {kind: amounts["memory"] for kind, amounts in container["resources"].items()}

    assert memory() == {"requests": "512Mi", "limits": "1536Mi"}
    deploy(config, memory="4g")
    assert memory() == {"requests": "4Gi", "limits": "4Gi"}
    deploy(config)
    assert memory() == {"requests": "512Mi", "limits": "1536Mi"}


def test_deploying_the_same_version_again_starts_no_pod(api, config, first):
    again = deploy(config)
    assert (again.outcome, again.revision, again.previous) == ("unchanged", 1, None)
    assert len(api.replica_sets) == 1


def test_deploying_the_same_version_again_names_the_version_before_as_previous(api, config, first):
    deploy_next(config)
    assert deploy_next(config).previous == Version(LINEAGE.bento, OLD, 1)
    assert deploy_next(config, memory="4g").previous == Version(LINEAGE.bento, OLD, 1)


@pytest.mark.parametrize(
    ("state", "parts"),
    [
        ("ErrImagePull", [NEW, "ErrImagePull (about", "was pushed or loaded"]),
        ("ImagePullBackOff", [NEW, "ImagePullBackOff"]),
        ("InvalidImageName", ["not a valid image reference"]),
        ("CreateContainerConfigError", ["environment and volumes"]),
        ("CrashLoopBackOff", ["CrashLoopBackOff", "exit code 3", "it crashed: no such model"]),
        ("OOMKilled", ["OOMKilled, exit code 137, memory limit 1536Mi", "raise deploy.memory"]),
        ("unschedulable", ["no progress within its deadline", "Insufficient cpu"]),
        ("quota", ["no pod could be created", "exceeded quota: small, requested: cpu=1"]),
        ("unready", ["no progress within its deadline", "unready status: [gpt2-instruct]"]),
    ],
)
def test_a_version_that_does_not_become_ready_is_rolled_back_with_the_reason(api, config, first, state, parts):
    api.pod_states[NEW] = state
    outcome = failed(deploy_next, config).outcome
    assert outcome.outcome == "rolled_back"
    assert [part for part in [*parts, f"rolled back to {OLD}"] if part not in outcome.reason] == []
    assert api.image() == OLD
    assert api.running() == [OLD, OLD]


CRASHED = {"waiting": {"reason": "CrashLoopBackOff", "message": "back-off"}}
PROXY = {"name": "istio-proxy", "image": "istio:1", "state": CRASHED}
INIT = {"name": "istio-init", "image": "istio:1", "state": CRASHED}


@pytest.mark.parametrize(
    ("statuses", "parts"),
    [
        (
            {"containerStatuses": [PROXY | {"lastState": {"terminated": {"exitCode": 137, "reason": "OOMKilled"}}}]},
            ["container istio-proxy", "OOMKilled, exit code 137, memory limit 64Mi; raise the limit of this container"],
        ),
        (
            {"containerStatuses": [PROXY | {"lastState": {"terminated": {"exitCode": 1, "reason": "Error"}}}]},
            ["container istio-proxy", "its last log lines:\nlog of istio-proxy"],
        ),
        (
            {"initContainerStatuses": [INIT | {"lastState": {"terminated": {"exitCode": 137, "reason": "OOMKilled"}}}]},
            ["container istio-init", "memory limit of its node; raise the limit of this container"],
        ),
        (
            {"initContainerStatuses": [INIT | {"lastState": {"terminated": {"exitCode": 2, "reason": "Error"}}}]},
            ["container istio-init", "exit code 2", "log of istio-init"],
        ),
    ],
)
def test_a_crashing_container_that_was_injected_is_named(api, config, first, monkeypatch, statuses, parts):
    api.pod_states[NEW] = "unready"
    pod = api.pod

    def injected(replica_set):
        manifest = pod(replica_set)
        if replica_set["image"] != NEW:
            return manifest
        proxy = {"name": "istio-proxy", "resources": {"limits": {"memory": "64Mi"}}}
        containers = [*manifest["spec"]["containers"], proxy]
        spec = manifest["spec"] | {"containers": containers, "initContainers": [{"name": "istio-init"}]}
        return manifest | {"spec": spec, "status": manifest["status"] | statuses}

    monkeypatch.setattr(api, "pod", injected)
    reason = failed(deploy_next, config).outcome.reason
    assert [part for part in parts if part not in reason] == []
    assert "deploy.memory" not in reason


def test_the_recorded_digest_is_not_that_of_an_injected_container(api, config, monkeypatch):
    pod = api.pod

    def injected(replica_set):
        manifest = pod(replica_set)
        proxy = {"name": "istio-proxy", "imageID": "istio@sha256:" + "9" * 64}
        statuses = [proxy, *manifest["status"]["containerStatuses"]]
        return manifest | {"status": manifest["status"] | {"containerStatuses": statuses}}

    monkeypatch.setattr(api, "pod", injected)
    assert deploy(config).image_id == "registry.example/gpt2-instruct@sha256:" + "1" * 64


def test_a_transient_image_pull_failure_is_waited_out(api, config, first, monkeypatch):
    monkeypatch.setattr(wait, "IMAGE_PULL_TIMEOUT", 60.0)
    api.pod_states[NEW], api.recoveries[NEW] = "ErrImagePull", 2
    assert deploy_next(config).outcome == "deployed"


def test_an_image_pull_that_fails_until_the_deadline_is_named(api, config, first, monkeypatch):
    monkeypatch.setattr(wait, "IMAGE_PULL_TIMEOUT", 60.0)
    api.pod_states[NEW] = "ImagePullBackOff"
    assert "ImagePullBackOff (about" in str(failed(deploy_next, config))


def test_the_reason_for_waiting_is_logged_once(api, config, first, caplog):
    caplog.set_level(logging.INFO, "deploy")
    api.pod_states[NEW], api.recoveries[NEW] = "unschedulable", 3
    assert deploy_next(config).outcome == "deployed"
    lines = [line for line in caplog.messages if "Insufficient cpu" in line]
    assert len(lines) == 1
    assert "0 of 2 pods available" in lines[0]


def test_a_deployment_after_kubectl_apply_does_not_conflict(api, config, applied_by_kubectl):
    assert deploy(config).outcome == "deployed"


def test_a_deployment_takes_the_placeholder_image_over_from_kubectl(api, config):
    kubectl_apply(api)
    assert deploy(config).outcome == "deployed"
    assert deploy_next(config).outcome == "deployed"


def test_one_forced_deployment_ends_the_conflicts_with_kubectl_apply(api, config, applied_by_kubectl):
    with pytest.raises(KubeError, match='conflict with "kubectl-client-side-apply"'):
        deploy_next(config)
    api.status_updates = 2  # the Deployment controller writes the status in between
    assert deploy(config, force=True).outcome == "deployed"
    assert deploy_next(config).outcome == "deployed"
    assert "kubectl-client-side-apply" not in {
        owner for owners in api.objects[DEPLOYMENT].owners.values() for owner in owners
    }


def test_an_object_that_never_settles_keeps_kubectls_share(api, config, applied_by_kubectl, caplog):
    caplog.set_level(logging.WARNING, "deploy")
    api.status_updates = 1000
    assert deploy(config, force=True).outcome == "deployed"
    assert "is still an owner of fields of" in caplog.text


def test_a_version_with_other_answers_is_rolled_back(api, config, first):
    api.responses[NEW] = constant_response("Toronto", NEXT_LINEAGE.bento)
    outcome = failed(deploy_next, config).outcome
    assert outcome.outcome == "rolled_back"
    assert re.search(r"0 of 1 answers of .* but 50% must", outcome.reason)
    assert "'What is the capital?' and input 'Canada': expected 'Ottawa', got 'Toronto'" in outcome.reason
    assert api.running() == [OLD, OLD]


def test_requests_carry_the_token_of_the_environment(api, config, base_dir, adapter_dir, monkeypatch):
    monkeypatch.setenv("GPT2_API_TOKEN", "s3cret-token")
    tag = build_bento(base_dir, adapter_dir)
    lineage = make_lineage(bento=tag)
    with serve(tag) as url:
        samples = [make_sample("Hello.", tuned=request_answer(url, "Hello.", "", 8))]
        api.responses[OLD] = url
        outcome = KubernetesTarget(config).deploy(lineage, samples, 8)
        assert (outcome.outcome, outcome.bento) == ("deployed", tag)
        monkeypatch.setenv("GPT2_API_TOKEN", "another")
        with pytest.raises(DeployFailed, match="set GPT2_API_TOKEN in the environment of this run") as error:
            KubernetesTarget(config).deploy(lineage, samples, 8)
    assert "s3cret-token" not in str(outcome) + str(error.value)


def test_an_image_with_another_bento_is_rolled_back(api, config, first):
    api.responses[NEW] = constant_response("Ottawa", "gpt2-instruct:9999999999999999")
    outcome = failed(deploy_next, config).outcome
    assert outcome.outcome == "rolled_back"
    assert "the service is gpt2-instruct:9999999999999999, not" in outcome.reason


def test_a_response_of_a_terminating_pod_is_requested_again(api, config, first):
    models = iter([LINEAGE.bento, NEXT_LINEAGE.bento])
    api.responses[NEW] = lambda body: {"answer": "Ottawa", "model": next(models)}
    assert deploy_next(config).outcome == "deployed"


def test_fields_of_other_managers_are_kept(api, config, first):
    stored = api.objects[DEPLOYMENT]
    stored.set(("spec", "replicas"), 5, "hpa")
    gpu = (*CONTAINER, "resources", "limits", "nvidia.com/gpu")
    stored.set(gpu, "1", "gpt2-instruct-gpu")
    assert deploy_next(config).outcome == "deployed"
    assert api.object("deployments")["spec"]["replicas"] == 5
    assert api.objects[DEPLOYMENT].fields[gpu] == "1"
    assert api.running() == [NEW] * 5


def test_a_changed_field_is_a_conflict_unless_forced(api, config, first):
    grace = ("spec", "template", "spec", "terminationGracePeriodSeconds")
    api.objects[DEPLOYMENT].set(grace, 5, "kubectl-edit")
    with pytest.raises(KubeError) as error:
        deploy_next(config)
    for part in ('conflict with "kubectl-edit"', "terminationGracePeriodSeconds", "deploy.force=true"):
        assert part in str(error.value)
    assert api.image() == OLD
    assert deploy_next(config, force=True).outcome == "deployed"
    assert api.objects[DEPLOYMENT].fields[grace] == 80


def test_a_conflict_in_one_object_leaves_all_others_as_they_are(api, config, first):
    data = ("data", "bentoml.yaml")
    api.objects[DEPLOYMENT].set(("spec", "progressDeadlineSeconds"), 99, "kubectl-edit")
    api.objects["configmaps", "gpt2-instruct"].set(data, "older", "gpt2-instruct")
    with pytest.raises(KubeError, match="progressDeadlineSeconds"):
        deploy_next(config)
    assert api.objects["configmaps", "gpt2-instruct"].fields[data] == "older"


def test_an_existing_namespace_keeps_its_labels(api, config):
    api.namespaces["shared"] = {"metadata": {"name": "shared", "labels": {}}}
    assert deploy(config, namespace="shared").namespace == "shared"
    assert api.namespaces["shared"]["metadata"]["labels"] == {}
    assert api.object("services")["metadata"]["namespace"] == "shared"


def test_the_token_of_the_cluster_is_in_no_log_outcome_or_error(api, config, caplog, capfd):
    caplog.set_level(logging.DEBUG)
    outcomes = [deploy(config)]
    api.pod_states[NEW] = "CrashLoopBackOff"
    outcomes.append(failed(deploy_next, config).outcome)
    api.forbidden = {("patch", "deployments")}
    with pytest.raises(KubeError) as error:
        deploy_next(config)
    output = capfd.readouterr()
    assert "rolling back" in caplog.text
    reported = json.dumps([outcome.to_json() for outcome in outcomes]) + str(error.value)
    assert TOKEN not in caplog.text + reported + output.out + output.err
