"""Deployments on Kubernetes that are refused, and the permissions that they need."""

import pytest
import yaml

from deploy.kubernetes import lock
from deploy.kubernetes.client import DEPLOYER
from deploy.kubernetes.errors import KubeError
from tests.deploy.kube_api import _error
from tests.deploy.kube_target import CONTAINER, DEPLOYMENT, NEW, OLD, deploy, deploy_next, failed, preflight, rollback


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
