"""Rollbacks on Kubernetes: of a version that fails or is interrupted, and on request."""

import logging

import pytest
from zenml.exceptions import RunInterruptedException

from deploy.kubernetes import wait
from deploy.kubernetes.client import Cluster
from deploy.kubernetes.errors import KubeError
from deploy.kubernetes.render import version_of
from deploy.kubernetes.rollout import KubernetesTarget
from deploy.target import Version
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
    interrupt_first_wait,
    rollback,
)

RESTARTED = ("spec", "template", "metadata", "annotations", "kubectl.kubernetes.io/restartedAt")
BAD = (*CONTAINER, "env", (("name", "BAD"),))


def change(api, config, fields, manager="kubectl-edit") -> None:
    """Change fields by hand, and wait for the rollout."""
    for field, value in fields.items():
        api.objects[DEPLOYMENT].set(field, value, manager)
    wait.wait_for_rollout(KubernetesTarget(config).cluster, version_of(api.object("deployments")))


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


def test_a_rollback_without_a_deployment_is_an_error(api, config):
    api.namespaces["gpt2-instruct"] = {}
    with pytest.raises(KubeError, match="there is nothing to roll back"):
        rollback(config)
