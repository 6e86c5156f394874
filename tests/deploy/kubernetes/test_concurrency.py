"""Deployments on Kubernetes beside another deployment, after a killed process, and during an outage of its API."""

import logging
import time
from concurrent.futures import Future
from dataclasses import replace
from threading import Thread

import pytest

from deploy.kubernetes import lock, rollout, wait
from deploy.kubernetes.errors import KubeError
from deploy.kubernetes.render import render, version_of
from deploy.kubernetes.rollout import KubernetesTarget
from deploy.target import DeployFailed
from tests.deploy.kube_api import _error
from tests.deploy.kube_target import (
    DEPLOYMENT,
    NEW,
    OLD,
    SAMPLE,
    THIRD,
    THIRD_LINEAGE,
    constant_response,
    deploy,
    deploy_next,
    failed,
    interrupt_first_wait,
    rollback,
)


def during_first_wait(monkeypatch, action) -> None:
    """Run the action once, at the first pause of a wait."""
    sleep, actions = time.sleep, [action]

    def run(seconds: float) -> None:
        if actions:
            actions.pop()()
        sleep(seconds)

    monkeypatch.setattr(wait.time, "sleep", run)


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
