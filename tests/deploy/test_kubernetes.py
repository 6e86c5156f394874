"""Rollout and rollback on Kubernetes: the real client, over HTTPS, against a double of the API server (kube_api.py)."""

import json
import logging
import re
import time
from concurrent.futures import Future
from dataclasses import replace
from threading import Thread

import pytest
import yaml
from zenml.exceptions import RunInterruptedException

from deploy.kubernetes import lock, rollout, wait
from deploy.kubernetes.client import DEPLOYER, Cluster
from deploy.kubernetes.errors import KubeError
from deploy.kubernetes.render import MANIFESTS, render, version_of
from deploy.kubernetes.rollout import KubernetesTarget
from deploy.server import serve
from deploy.target import DeployFailed, DeployOutcome, Version
from deploy.verify import request_answer
from gpt2core.metrics import RecordScores
from gpt2core.types import Sample
from tests.deploy.conftest import LINEAGE, NEW, NEXT_LINEAGE, OLD, constant_response
from tests.deploy.kube_api import TOKEN, Stored, _error
from tests.helpers import build_bento, make_lineage

SCORES = RecordScores(exact_match=1.0, token_f1=1.0, rouge_l=1.0, nll=0.0)
SAMPLE = Sample("What is the capital?", "Canada", "Ottawa", "", "Ottawa", True, "", SCORES, SCORES)
DEPLOYMENT = ("deployments", "gpt2-instruct")
CONTAINER = ("spec", "template", "spec", "containers", (("name", "gpt2-instruct"),))
RESTARTED = ("spec", "template", "metadata", "annotations", "kubectl.kubernetes.io/restartedAt")
BAD = (*CONTAINER, "env", (("name", "BAD"),))


def deploy(config, **values) -> DeployOutcome:
    return KubernetesTarget(replace(config, **values)).deploy(LINEAGE, [SAMPLE], 8)


def deploy_next(config, **values) -> DeployOutcome:
    return KubernetesTarget(replace(config, image=NEW, **values)).deploy(NEXT_LINEAGE, [SAMPLE], 8)


def preflight(config) -> None:
    KubernetesTarget(config).preflight()


def failed(action, config) -> DeployFailed:
    with pytest.raises(DeployFailed) as error:
        action(config)
    return error.value


def rollback(config) -> DeployOutcome:
    return KubernetesTarget(config).rollback()


def change(api, config, fields, manager="kubectl-edit") -> None:
    """Change fields by hand, and wait for the rollout."""
    for field, value in fields.items():
        api.objects[DEPLOYMENT].set(field, value, manager)
    wait.wait_for_rollout(KubernetesTarget(config).cluster, version_of(api.object("deployments")))


@pytest.fixture
def first(config):
    """A namespace with a deployment of OLD in it."""
    return deploy(config)


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


@pytest.fixture
def applied_by_kubectl(api):
    """What `kubectl apply -f k8s` leaves, with the image OLD."""
    kubectl_apply(api, OLD)


def kubectl_apply(api, image: str | None = None) -> None:
    api.namespaces["gpt2-instruct"] = {}
    for file in MANIFESTS.glob("*.yaml"):
        manifest = yaml.safe_load(file.read_text())
        if manifest["kind"] == "Deployment" and image is not None:
            manifest["spec"]["template"]["spec"]["containers"][0]["image"] = image
        if manifest["kind"] != "Namespace":
            plural = {"NetworkPolicy": "networkpolicies"}.get(manifest["kind"], f"{manifest['kind'].lower()}s")
            api.objects[plural, "gpt2-instruct"] = stored = Stored()
            assert stored.apply(manifest, "kubectl-client-side-apply", force=False) == []


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
        samples = [replace(SAMPLE, instruction="Hello.", input="", tuned=request_answer(url, "Hello.", "", 8))]
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


def test_a_failed_version_is_no_target_of_a_later_rollback(api, config, first):
    before = api.object("deployments")["spec"]
    api.pod_states[NEW] = "InvalidImageName"
    failed(deploy_next, config)
    assert api.object("deployments")["spec"] == before
    assert [each["image"] for each in api.replica_sets.values()] == [OLD]
    with pytest.raises(KubeError, match="has no revision of gpt2-instruct before"):
        rollback(config)


def test_a_deployment_after_a_rollback_does_not_conflict_with_it(api, config, first):
    api.pod_states[NEW] = "InvalidImageName"
    failed(deploy_next, config)
    api.pod_states[NEW] = "ready"
    assert deploy_next(config).outcome == "deployed"
    owners = api.objects[DEPLOYMENT].owners
    assert {owner for field in owners for owner in owners[field]} == {"gpt2-instruct", "kube-controller-manager"}


def interrupt_first_wait(monkeypatch, interrupt: type[BaseException]) -> None:
    interrupts = iter([interrupt])

    def sleep(_: float) -> None:
        for each in interrupts:
            raise each

    monkeypatch.setattr(wait.time, "sleep", sleep)


@pytest.mark.parametrize("interrupt", [KeyboardInterrupt, RunInterruptedException])
def test_an_interrupted_rollout_is_rolled_back(api, config, first, monkeypatch, interrupt):
    api.pod_states[NEW] = "unready"
    interrupt_first_wait(monkeypatch, interrupt)
    interrupted = failed(deploy_next, config)
    assert isinstance(interrupted.interrupt, interrupt)
    assert interrupted.outcome.outcome == "rolled_back"
    assert interrupted.outcome.reason.startswith(f"interrupted ({interrupt.__name__}); rolled back to {OLD}")
    assert api.image() == OLD


@pytest.fixture
def interrupted_after_apply(monkeypatch):
    """An interrupt after the server has applied the Deployment, before the client has read the response."""
    apply, interrupts = Cluster.apply, iter([KeyboardInterrupt])

    def interrupted(cluster, manifest, force=False):
        apply(cluster, manifest, force)
        if manifest["kind"] == "Deployment":
            for each in interrupts:
                raise each

    monkeypatch.setattr(Cluster, "apply", interrupted)


def test_a_rollout_interrupted_in_its_apply_is_rolled_back(api, config, first, interrupted_after_apply):
    failed(deploy_next, config)
    assert api.image() == OLD
    assert api.running() == [OLD, OLD]


def test_a_first_rollout_interrupted_in_its_apply_is_deleted(api, config, interrupted_after_apply):
    failed(deploy, config)
    assert DEPLOYMENT not in api.objects


def test_a_failed_first_version_is_deleted(api, config):
    api.pod_states[OLD] = "InvalidImageName"
    outcome = failed(deploy, config).outcome
    assert (outcome.outcome, outcome.previous, outcome.revision) == ("rolled_back", None, None)
    assert "nothing was deployed before" in outcome.reason
    assert DEPLOYMENT not in api.objects


def test_a_running_version_that_fails_verification_is_reported_as_failed(config, api, first):
    api.responses[OLD] = constant_response("Toronto", LINEAGE.bento)
    outcome = failed(deploy, config).outcome
    assert outcome.outcome == "failed"
    assert "revision 1 already ran before" in outcome.reason


def test_a_rollback_to_a_broken_version_is_reported_as_failed(api, config, first):
    api.pod_states |= {NEW: "InvalidImageName", OLD: "CrashLoopBackOff"}
    for each in api.replica_sets.values():
        each["ready"] = 0
    outcome = failed(deploy_next, config).outcome
    assert outcome.outcome == "failed"
    assert "could not be rolled back" in outcome.reason
    assert "CrashLoopBackOff" in outcome.reason


def test_two_rollbacks_on_request_restore_the_current_version(api, config, first):
    deploy_next(config)
    outcome = rollback(config)
    assert (outcome.outcome, outcome.image, outcome.revision) == ("rolled_back", OLD, 3)
    assert outcome.bento == LINEAGE.bento
    assert outcome.previous == Version(NEXT_LINEAGE.bento, NEW, 2)
    assert api.running() == [OLD, OLD]
    assert rollback(config).image == NEW
    assert api.running() == [NEW, NEW]


@pytest.mark.parametrize(
    "fields",
    [
        {RESTARTED: "2026-11-28T16:00:00Z"},  # kubectl rollout restart
        {(*BAD, "name"): "BAD", (*BAD, "value"): "1"},
        {(*CONTAINER, "command"): ["false"]},
    ],
)
def test_a_rollback_restores_the_earlier_template_exactly_after_a_change_by_hand(api, config, first, fields):
    wanted = api.object("deployments")
    deploy_next(config)
    change(api, config, fields)
    outcome = rollback(config)
    assert (outcome.image, outcome.revision) == (OLD, 4)
    assert outcome.previous == Version(NEXT_LINEAGE.bento, NEW, 3)
    restored = api.object("deployments")
    assert restored["spec"]["template"] == wanted["spec"]["template"]
    assert restored["metadata"]["labels"] == wanted["metadata"]["labels"]
    assert restored["metadata"]["annotations"]["gpt2-instruct/bento"] == LINEAGE.bento
    assert api.running() == [OLD, OLD]
    assert rollback(config).image == NEW
    assert api.objects[DEPLOYMENT].fields.items() >= fields.items()


def test_a_rollback_without_a_revision_of_another_version_is_an_error(api, config, first):
    change(api, config, {RESTARTED: "2026-11-28T16:00:00Z"})
    with pytest.raises(KubeError, match="no revision of gpt2-instruct before 2 with another Bento or image"):
        rollback(config)


def test_fields_set_by_hand_survive_deployments_after_a_rollback(api, config, first):
    pool = ("spec", "template", "spec", "nodeSelector", "pool")
    change(api, config, {pool: "a"})
    deploy_next(config)
    change(api, config, {pool: "b"})
    rollback(config)
    assert api.objects[DEPLOYMENT].fields[pool] == "a"
    assert deploy_next(config).outcome == "deployed"
    assert api.objects[DEPLOYMENT].fields[pool] == "a"


def test_a_rollback_skips_revisions_that_were_not_deployed_from_here(api, config, applied_by_kubectl):
    api.objects[DEPLOYMENT].set((*CONTAINER, "image"), "gpt2-instruct:0.1.0", "kubectl-client-side-apply")
    wait.wait_for_rollout(KubernetesTarget(config).cluster, version_of(api.object("deployments")))
    deploy_next(config, force=True)
    with pytest.raises(KubeError, match="no revision of gpt2-instruct before 2"):
        rollback(config)


def test_a_rollback_that_fails_restores_the_version_that_ran(api, config, first):
    deploy_next(config)
    ran = api.object("deployments")["spec"]
    api.pod_states[OLD] = "ImagePullBackOff"
    with pytest.raises(KubeError, match=rf"ImagePullBackOff.*; {NEW} runs again, as revision 4"):
        rollback(config)
    assert api.object("deployments")["spec"] == ran
    assert api.running() == [NEW, NEW]
    api.pod_states[OLD] = "ready"
    assert rollback(config).image == OLD


def test_a_failed_rollback_that_cannot_be_undone_says_so(api, config, first):
    deploy_next(config)
    api.pod_states |= {OLD: "InvalidImageName", NEW: "CrashLoopBackOff"}
    for each in api.replica_sets.values():
        each["ready"] = 0
    with pytest.raises(KubeError, match=rf"InvalidImageName.*; and {NEW} could not be restored: .*CrashLoopBackOff"):
        rollback(config)
    assert api.image() == NEW


def test_an_interrupted_rollback_restores_the_version_that_ran(api, config, first, monkeypatch, caplog):
    caplog.set_level(logging.WARNING, "deploy")
    deploy_next(config)
    api.pod_states[OLD] = "unready"
    interrupt_first_wait(monkeypatch, KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        rollback(config)
    assert f"the rollback was interrupted; {NEW} runs again, as revision 4" in caplog.messages
    assert api.running() == [NEW, NEW]


def during_first_wait(monkeypatch, action) -> None:
    """Run the action once, at the first pause of a wait."""
    sleep, actions = time.sleep, [action]

    def run(seconds: float) -> None:
        if actions:
            actions.pop()()
        sleep(seconds)

    monkeypatch.setattr(wait.time, "sleep", run)


THIRD, THIRD_LINEAGE = "registry.example/gpt2-instruct:3", make_lineage("run-19", bento="gpt2-instruct:" + "3" * 16)


def apply_third(config) -> None:
    """What a deployment without our lock does."""
    *_, deployment = render(THIRD, THIRD_LINEAGE, config.namespace)
    KubernetesTarget(config).cluster.apply(deployment, force=True)


def test_a_deployment_that_was_superseded_changes_nothing(api, config, first, monkeypatch):
    api.responses[THIRD] = constant_response("Ottawa", THIRD_LINEAGE.bento)
    api.pod_states[NEW] = "unready"
    during_first_wait(monkeypatch, lambda: apply_third(config))
    outcome = failed(deploy_next, config).outcome
    assert outcome.outcome == "failed"
    assert outcome.reason == f"superseded by {THIRD_LINEAGE.bento}, image {THIRD}, which is left as it is"
    assert api.image() == THIRD
    wait.wait_for_rollout(KubernetesTarget(config).cluster, version_of(api.object("deployments")))
    assert THIRD in [replica_set["image"] for replica_set in api.replica_sets.values()]


def test_a_first_deployment_that_was_superseded_deletes_nothing(api, config, monkeypatch):
    api.pod_states[OLD] = "unready"
    during_first_wait(monkeypatch, lambda: apply_third(config))
    assert "superseded" in failed(deploy, config).outcome.reason
    assert api.image() == THIRD


def test_a_rollback_that_was_superseded_changes_nothing(api, config, first, monkeypatch):
    deploy_next(config)
    api.pod_states[OLD] = "unready"
    during_first_wait(monkeypatch, lambda: apply_third(config))
    with pytest.raises(KubeError, match="superseded by gpt2-instruct:3333"):
        rollback(config)
    assert api.image() == THIRD


def test_an_undo_that_meets_a_status_update_is_repeated(api, config, first, monkeypatch):
    api.pod_states[NEW] = "InvalidImageName"
    patch, updates = api.json_patch, [1, 2]

    def updated(plural, name, query, values):
        if updates and "/metadata/managedFields" not in values:
            updates.pop()
            api.objects[DEPLOYMENT].version += 1
        return patch(plural, name, query, values)

    monkeypatch.setattr(api, "json_patch", updated)
    assert failed(deploy_next, config).outcome.outcome == "rolled_back"
    assert (api.image(), updates) == (OLD, [])


def start(action, *arguments) -> Future:
    future: Future = Future()

    def run() -> None:
        try:
            future.set_result(action(*arguments))
        except BaseException as error:
            future.set_exception(error)

    Thread(target=run, daemon=True).start()
    return future


def until(condition) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("action", [deploy, rollback])
def test_a_deployment_or_rollback_waits_for_the_deployment_before_it(api, config, first, monkeypatch, action, caplog):
    caplog.set_level(logging.INFO, "deploy")
    deploy_next(config)
    monkeypatch.setattr("tests.deploy.kube_api.DEADLINE", 10**6)
    api.pod_states[THIRD] = "unready"
    api.responses[THIRD] = constant_response("Ottawa", THIRD_LINEAGE.bento)
    third = start(KubernetesTarget(replace(config, image=THIRD)).deploy, THIRD_LINEAGE, [SAMPLE], 8)
    until(lambda: api.image() == THIRD)
    second = start(action, config)
    until(lambda: "waiting for another deployment in namespace gpt2-instruct" in caplog.text)
    assert api.image() == THIRD
    api.pod_states[THIRD] = "ready"
    assert third.result(120).outcome == "deployed"
    outcome = second.result(120)
    assert outcome.previous.image == THIRD
    assert outcome.image == (OLD if action == deploy else NEW)
    assert ("leases", "gpt2-instruct") not in api.objects


def test_two_deployments_that_start_at_once_are_both_verified(api, config, first):
    api.responses[THIRD] = constant_response("Ottawa", THIRD_LINEAGE.bento)
    runs = [
        start(deploy_next, config),
        start(KubernetesTarget(replace(config, image=THIRD)).deploy, THIRD_LINEAGE, [SAMPLE], 8),
    ]
    outcomes = sorted((run.result(120) for run in runs), key=lambda outcome: outcome.revision)
    assert [outcome.outcome for outcome in outcomes] == ["deployed", "deployed"]
    assert outcomes[1].previous.bento == outcomes[0].bento
    assert api.image() == outcomes[1].image


def hold_lock(config, holder="killed") -> None:
    spec = {"holderIdentity": holder}
    manifest = {"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": {"name": "gpt2-instruct"}}
    KubernetesTarget(config).cluster.create(manifest | {"spec": spec})


def test_the_lock_of_a_killed_process_is_taken_over(api, config, first, monkeypatch):
    monkeypatch.setattr(lock, "EXPIRY", 0.2)
    hold_lock(config)
    assert deploy_next(config).outcome == "deployed"


def killed(monkeypatch, action, *arguments) -> None:
    """Run the action until its first wait, and end it there without an undo, as SIGKILL does."""
    with monkeypatch.context() as patch:
        patch.setattr(rollout, "_undo_rollout", lambda *_: (_ for _ in ()).throw(SystemExit))
        interrupt_first_wait(patch, KeyboardInterrupt)
        with pytest.raises(SystemExit):
            action(*arguments)


def test_a_version_that_a_killed_run_left_is_no_target_of_an_undo(api, config, first, monkeypatch):
    api.pod_states[NEW] = "unready"
    killed(monkeypatch, deploy_next, config)
    assert api.image() == NEW
    api.responses[THIRD] = constant_response("wrong", THIRD_LINEAGE.bento)
    with pytest.raises(DeployFailed) as error:
        KubernetesTarget(replace(config, image=THIRD)).deploy(THIRD_LINEAGE, [SAMPLE], 8)
    assert error.value.outcome.outcome == "rolled_back"
    assert error.value.outcome.previous.image == OLD
    assert api.running() == [OLD, OLD]


def test_a_version_that_a_killed_run_left_is_undone_if_it_is_deployed_again_and_fails(api, config, first, monkeypatch):
    api.pod_states[NEW] = "unready"
    killed(monkeypatch, deploy_next, config)
    assert failed(deploy_next, config).outcome.outcome == "rolled_back"
    assert api.running() == [OLD, OLD]


def test_a_version_that_a_killed_run_left_is_no_target_of_a_rollback(api, config, first, monkeypatch):
    api.pod_states[NEW] = "unready"
    killed(monkeypatch, deploy_next, config)
    api.responses[THIRD] = constant_response("Ottawa", THIRD_LINEAGE.bento)
    KubernetesTarget(replace(config, image=THIRD)).deploy(THIRD_LINEAGE, [SAMPLE], 8)
    assert rollback(config).image == OLD
    assert rollback(config).image == THIRD


def test_a_lock_that_is_renewed_is_not_taken_over(api, config, first, monkeypatch):
    monkeypatch.setattr(lock, "LOCK_TIMEOUT", 1)
    monkeypatch.setattr(lock, "EXPIRY", 0.5)
    monkeypatch.setattr(lock, "RENEWAL", 0.01)
    with lock.namespace_lock(KubernetesTarget(config).cluster):
        with pytest.raises(KubeError, match=r"another deployment in namespace .* did not end within 1 seconds"):
            deploy_next(config)
        assert api.image() == OLD


def test_an_outage_of_the_api_server_does_not_end_a_deployment(api, config, first, monkeypatch, caplog):
    caplog.set_level(logging.WARNING, "deploy")
    api.pod_states[NEW], api.recoveries[NEW] = "unready", 3
    during_first_wait(monkeypatch, lambda: api.failures.extend([503] * 12))
    assert deploy_next(config).outcome == "deployed"
    assert api.running() == [NEW, NEW]
    assert len([line for line in caplog.messages if "retrying for 600 seconds" in line]) == 1


def test_an_outage_of_the_api_server_does_not_end_a_rollback(api, config, first, monkeypatch):
    deploy_next(config)
    api.pod_states[OLD], api.recoveries[OLD] = "unready", 3
    during_first_wait(monkeypatch, lambda: api.failures.extend([503] * 12))
    assert rollback(config).image == OLD
    assert api.running() == [OLD, OLD]


def test_a_log_that_the_node_does_not_send_is_no_outage(api, config, first, monkeypatch):
    monkeypatch.setattr(rollout, "OUTAGE_TIMEOUT", 0.1)
    api.pod_states[NEW] = "CrashLoopBackOff"
    handle = api.handle

    def without_logs(method, target, *request):
        return (
            _error(500, "InternalError", "no route to host") if "/log?" in target else handle(method, target, *request)
        )

    monkeypatch.setattr(api, "handle", without_logs)
    reason = failed(deploy_next, config).outcome.reason
    assert "(the log cannot be read: " in reason
    assert "repeated" not in reason


def test_a_deployment_whose_end_was_not_observed_says_so(api, config, first, monkeypatch):
    monkeypatch.setattr(rollout, "OUTAGE_TIMEOUT", 0.1)
    api.pod_states[NEW] = "unready"
    during_first_wait(monkeypatch, lambda: api.failures.extend([503] * 1000))
    outcome = failed(deploy_next, config).outcome
    assert outcome.outcome == "failed"
    assert "the outcome of the rollout is unknown: run the same command again when" in outcome.reason
    api.failures.clear()
    assert api.image() == NEW


def test_a_rollback_without_a_deployment_is_an_error(api, config):
    api.namespaces["gpt2-instruct"] = {}
    with pytest.raises(KubeError, match="there is nothing to roll back"):
        rollback(config)


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


@pytest.mark.parametrize("action", [preflight, deploy_next])
def test_a_deployment_scaled_to_zero_is_refused(api, config, first, action):
    api.objects[DEPLOYMENT].set(("spec", "replicas"), 0, "kubectl")
    with pytest.raises(KubeError, match=r"scaled to 0 replicas; run `kubectl scale"):
        action(config)


@pytest.mark.parametrize("action", [preflight, deploy_next, rollback])
def test_a_deployment_of_another_tool_is_refused(api, config, first, action):
    def renamed(field):
        return tuple((("name", "web"),) if key == (("name", "gpt2-instruct"),) else key for key in field)

    stored = api.objects[DEPLOYMENT]
    stored.fields = {renamed(field): value for field, value in stored.fields.items()}
    stored.fields[(*renamed(CONTAINER), "name")] = "web"
    with pytest.raises(KubeError, match="has no container gpt2-instruct, only web: it was not made by this project"):
        action(config)
    assert api.objects[DEPLOYMENT] is stored


@pytest.mark.parametrize("action", [preflight, deploy_next, rollback])
def test_a_paused_deployment_is_refused(api, config, first, action):
    deploy_next(config)
    api.objects[DEPLOYMENT].set(("spec", "paused"), True, "kubectl-rollout")
    with pytest.raises(KubeError, match="is paused; run `kubectl rollout resume deployment gpt2-instruct -n gpt2-inst"):
        action(config)


@pytest.mark.parametrize(
    ("message", "parts"),
    [
        (
            'deployments "gpt2-instruct" is forbidden: unable to create new content in namespace gpt2-instruct because '
            "it is being terminated",
            ["is being deleted; wait until it is gone, then run the same command again"],
        ),
        (
            'admission webhook "validation.gatekeeper.sh" denied the request: [allowed-repos] container '
            "<gpt2-instruct> has an invalid image repo",
            ["refused by a policy of the cluster: admission webhook", "invalid image repo"],
        ),
    ],
)
def test_only_a_missing_permission_is_reported_as_one(api, config, message, parts, monkeypatch):
    monkeypatch.setattr(api, "apply", lambda *_: _error(403, "Forbidden", message))
    with pytest.raises(KubeError) as error:
        deploy(config)
    assert [part for part in parts if part not in str(error.value)] == []
    assert "permission" not in str(error.value)


@pytest.mark.parametrize("action", [preflight, deploy])
def test_all_missing_permissions_are_named_before_anything_changes(api, config, action):
    api.forbidden = {("create", "services/proxy"), ("patch", "deployments")}
    with pytest.raises(KubeError) as error:
        action(config)
    for part in (
        "permissions in namespace gpt2-instruct",
        ": patch deployments.apps, create services/proxy",
        "deployer.yaml",
    ):
        assert part in str(error.value)
    assert not api.objects


def test_a_namespace_that_may_not_be_created_is_named(api, config):
    api.forbidden = {("patch", "namespaces")}
    with pytest.raises(KubeError, match=r'lacks a permission: namespaces "gpt2-instruct" is forbidden.*cannot patch'):
        deploy(config)


def test_the_deployer_role_grants_exactly_the_permissions_that_are_used(api, config, monkeypatch):
    monkeypatch.setattr(lock, "RENEWAL", 0.05)
    [role] = [each for each in yaml.safe_load_all(DEPLOYER.read_text()) if each["kind"] == "Role"]
    granted = {(verb, name) for rule in role["rules"] for name in rule["resources"] for verb in rule["verbs"]}
    deploy(config)
    api.pod_states[NEW] = "CrashLoopBackOff"
    failed(deploy_next, config)
    api.pod_states[NEW] = "ready"
    deploy_next(config)
    rollback(config)
    api.objects.clear()
    api.replica_sets.clear()
    api.pod_states[OLD] = "CrashLoopBackOff"
    failed(deploy, config)
    creations = {("create", resource) for verb, resource in api.requests if verb == "patch"}  # an apply may create
    assert set(api.requests) | creations == granted | {("patch", "namespaces"), ("create", "namespaces")}


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
