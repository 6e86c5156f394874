"""Deploying to Kubernetes: the real client, over HTTPS, against a double of the API server (kube_api.py)."""

import json
import logging
from dataclasses import replace

import pytest
import yaml

from deploy import bento
from deploy.config import DeployConfig
from deploy.kubernetes import rollout as kube
from deploy.kubernetes.rollout import KubeError
from tests.deploy.kube_api import TOKEN, KubeApi

LINEAGE = {
    "run": {"id": "0c1d2e3f-0000-4000-8000-0123456789ab", "name": "finetune_pipeline-2026_11_25-01_02_03"},
    "model_version": "gpt2-instruct/3",
    "commit": {"sha": "5" * 40, "dirty": False},
    "data": {"train": "a" * 64, "val": "b" * 64, "test": "c" * 64},
    "base": {"name": "gpt2-nano", "revision": "", "sha256": "d" * 64},
    "adapter": {"sha256": "e" * 64, "rank": 8},
    "bento": "gpt2-instruct:1111111111111111",
}
NEXT = LINEAGE | {"bento": "gpt2-instruct:2222222222222222", "adapter": {"sha256": "f" * 64}}
OLD, NEW = "registry.example/gpt2-instruct:1", "registry.example/gpt2-instruct@sha256:" + "2" * 64
EXPECTED = [{"instruction": "What is the capital?", "input": "Canada", "tuned": "Ottawa"}]
DEPLOYMENT = ("deployments", "gpt2-instruct")


@pytest.fixture(autouse=True)
def _quickly(monkeypatch):
    monkeypatch.setattr(kube, "POLL", 0.01)
    monkeypatch.setattr(kube, "SETTLE", 0.1)
    monkeypatch.delenv("KUBECONFIG", raising=False)


@pytest.fixture
def api(tmp_path):
    api = KubeApi(tmp_path)
    for image, lineage in ((OLD, LINEAGE), (NEW, NEXT)):
        api.answers[image] = answering("Ottawa", lineage["bento"])
    yield api
    api.close()


def answering(answer: str, bento: str):
    return lambda body: {"answer": answer, "model": bento}


@pytest.fixture
def kubeconfig(api, tmp_path):
    return written(tmp_path, api.kubeconfig())


def written(tmp_path, content) -> str:
    file = tmp_path / "kubeconfig"
    file.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return str(file)


@pytest.fixture
def cluster(kubeconfig):
    """The configuration that leads to it."""
    return DeployConfig(target="kubernetes", image=OLD, kubeconfig=kubeconfig)


@pytest.fixture
def first(cluster):
    """A namespace with a deployment in it."""
    return deploy(cluster)


def deploy(cluster, **values):
    return kube.deploy(LINEAGE, replace(cluster, **values), EXPECTED, 8)


def deploy_next(cluster, **values):
    return kube.deploy(NEXT, replace(cluster, image=NEW, **values), EXPECTED, 8)


def test_a_first_deployment_applies_all_of_k8s_and_says_what_runs(api, first):
    assert first == {
        "namespace": "gpt2-instruct",
        "image": OLD,
        "image_id": "registry.example/gpt2-instruct@sha256:" + "1" * 64,
        "bento": LINEAGE["bento"],
        "revision": 1,
        "previous": None,
        "outcome": "deployed",
        "reason": "1 prompts were answered as the model did when it was evaluated",
    }
    kinds = {yaml.safe_load(file.read_text())["kind"] for file in kube.MANIFESTS.glob("*.yaml")}
    assert {api.object(plural)["kind"] for plural, _ in api.objects} | {"Namespace"} == kinds
    assert api.running() == [OLD, OLD]  # the HPA's two


def test_the_pods_name_what_they_are_made_of_as_their_metadata_does(api, first):
    template = api.object("deployments")["spec"]["template"]["metadata"]
    named = {key.removeprefix("gpt2-instruct/"): value for key, value in template["annotations"].items()}
    assert named["run-id"] == LINEAGE["run"]["id"]
    assert named["model-version"] == LINEAGE["model_version"]
    assert named["commit"] == LINEAGE["commit"]["sha"]
    assert named["adapter-sha256"] == LINEAGE["adapter"]["sha256"]
    assert {split: named[f"data-{split}-sha256"] for split in ("train", "val", "test")} == LINEAGE["data"]
    assert named["bento"] == LINEAGE["bento"]
    assert template["labels"]["gpt2-instruct/adapter-sha256"] == "e" * 63
    assert all(len(label) <= 63 for label in template["labels"].values())


def test_the_selector_stays_as_it_is_in_the_file(api, first):
    assert api.object("deployments")["spec"]["selector"] == {"matchLabels": {"app.kubernetes.io/name": "gpt2-instruct"}}


def test_another_version_replaces_it_and_names_the_one_before(api, cluster, first):
    outcome = deploy_next(cluster)
    assert (outcome["outcome"], outcome["revision"]) == ("deployed", 2)
    assert outcome["previous"] == {
        "image": OLD,
        "revision": 1,
        "bento": LINEAGE["bento"],
        "run-id": LINEAGE["run"]["id"],
    }
    assert api.running() == [NEW, NEW]


def test_deploying_the_same_again_starts_no_pod(api, cluster, first):
    again = deploy(cluster)
    assert (again["outcome"], again["revision"]) == ("deployed", 1)
    assert len(api.replica_sets) == 1


@pytest.mark.parametrize(
    ("fate", "said"),
    [
        ("ErrImagePull", [NEW, "ErrImagePull (about", "is it pushed, or loaded"]),
        ("ImagePullBackOff", [NEW, "ImagePullBackOff"]),
        ("InvalidImageName", ["no valid reference"]),
        ("CreateContainerConfigError", ["environment and volumes"]),
        ("CrashLoopBackOff", ["CrashLoopBackOff", "it crashed: no such model"]),
        ("quota", ["no pod could be made", "exceeded quota: small, requested: cpu=1"]),
        ("unready", ["came no further in its deadline", "unready status: [gpt2-instruct]"]),
    ],
)
def test_a_version_that_does_not_become_ready_is_rolled_back_with_the_reason(api, cluster, first, fate, said):
    api.pods[NEW] = fate
    outcome = deploy_next(cluster)
    assert outcome["outcome"] == "rolled_back"
    assert [part for part in [*said, f"rolled back to {OLD}"] if part not in outcome["reason"]] == []
    assert api.image() == OLD
    assert api.running() == [OLD, OLD]


def test_a_version_that_answers_otherwise_is_rolled_back(api, cluster, first):
    api.answers[NEW] = answering("Toronto", NEXT["bento"])
    outcome = deploy_next(cluster)
    assert outcome["outcome"] == "rolled_back"
    assert "'Toronto' to 'What is the capital?' with input 'Canada'" in outcome["reason"]
    assert "the model it was built from answered 'Ottawa'" in outcome["reason"]
    assert api.running() == [OLD, OLD]


def test_a_service_that_asks_for_a_token_is_given_the_environments(api, cluster, base_dir, adapter_dir, monkeypatch):
    monkeypatch.setenv("GPT2_API_TOKEN", "s3cret-token")
    tag = bento.build(base_dir, adapter_dir, {"run": LINEAGE["run"]})
    with bento.serve(tag) as url:
        samples = [{"instruction": "Hello.", "input": "", "tuned": bento.ask(url, "Hello.", "", 8)}]
        api.answers[OLD] = url
        outcome = kube.deploy({**LINEAGE, "bento": tag}, cluster, samples, 8)
        assert (outcome["outcome"], outcome["bento"]) == ("deployed", tag)
        monkeypatch.setenv("GPT2_API_TOKEN", "another")
        outcome = kube.deploy({**LINEAGE, "bento": tag}, cluster, samples, 8)
        assert "set GPT2_API_TOKEN, as the Secret gpt2-instruct in namespace gpt2-instruct" in outcome["reason"]
    assert "s3cret-token" not in str(outcome)


def test_an_image_with_another_bento_in_it_is_rolled_back(api, cluster, first):
    api.answers[NEW] = answering("Ottawa", "gpt2-instruct:9999999999999999")
    outcome = deploy_next(cluster)
    assert outcome["outcome"] == "rolled_back"
    assert "the service is gpt2-instruct:9999999999999999, not" in outcome["reason"]


def test_an_answer_of_an_old_pod_that_is_just_going_is_not_held_against_the_new(api, cluster, first):
    answers = iter([LINEAGE["bento"], NEXT["bento"]])
    api.answers[NEW] = lambda body: {"answer": "Ottawa", "model": next(answers)}
    assert deploy_next(cluster)["outcome"] == "deployed"


def test_a_rolled_back_version_leaves_the_pods_as_they_were_and_can_not_be_rolled_back_to(api, cluster, first):
    before = api.object("deployments")["spec"]
    api.pods[NEW] = "ErrImagePull"
    deploy_next(cluster)
    assert api.object("deployments")["spec"] == before
    assert [each["image"] for each in api.replica_sets.values()] == [OLD]
    with pytest.raises(KubeError, match="keeps no revision of gpt2-instruct before"):
        kube.rollback(cluster)


def test_a_deployment_after_a_rollback_is_no_conflict_with_ourselves(api, cluster, first):
    api.pods[NEW] = "ErrImagePull"
    deploy_next(cluster)
    api.pods[NEW] = "ready"
    assert deploy_next(cluster)["outcome"] == "deployed"
    owners = api.objects[DEPLOYMENT].owners
    assert {owner for field in owners for owner in owners[field]} == {"gpt2-instruct", "kube-controller-manager"}


def test_an_interrupted_rollout_is_rolled_back(api, cluster, first, monkeypatch):
    api.pods[NEW] = "unready"
    pauses = iter([KeyboardInterrupt])

    def sleep(_):
        for interrupt in pauses:
            raise interrupt

    monkeypatch.setattr(kube.time, "sleep", sleep)
    with pytest.raises(KeyboardInterrupt):
        deploy_next(cluster)
    assert api.image() == OLD


def test_a_first_version_that_fails_is_removed_again(api, cluster):
    api.pods[OLD] = "ErrImagePull"
    outcome = deploy(cluster)
    assert (outcome["outcome"], outcome["previous"], outcome["revision"]) == ("rolled_back", None, None)
    assert "nothing was deployed before" in outcome["reason"]
    assert DEPLOYMENT not in api.objects


def test_a_version_that_begins_to_answer_wrongly_has_nothing_to_go_back_to_when_it_is_deployed_again(
    cluster, api, first
):
    api.answers[OLD] = answering("Toronto", LINEAGE["bento"])
    outcome = deploy(cluster)
    assert outcome["outcome"] == "failed"
    assert "revision 1 ran before as well" in outcome["reason"]


def test_a_version_before_that_is_broken_now_too_is_said_to_be(api, cluster, first):
    api.pods |= {NEW: "ErrImagePull", OLD: "CrashLoopBackOff"}
    for each in api.replica_sets.values():
        each["ready"] = 0
    outcome = deploy_next(cluster)
    assert outcome["outcome"] == "failed"
    assert "could not be rolled back" in outcome["reason"]
    assert "CrashLoopBackOff" in outcome["reason"]


def test_rolling_back_by_hand_brings_the_version_before_and_twice_is_there_and_back_again(api, cluster, first):
    deploy_next(cluster)
    outcome = kube.rollback(cluster)
    assert (outcome["outcome"], outcome["image"], outcome["revision"]) == ("rolled_back", OLD, 3)
    assert outcome["bento"] == LINEAGE["bento"]
    assert outcome["previous"]["image"] == NEW
    assert api.running() == [OLD, OLD]
    assert kube.rollback(cluster)["image"] == NEW
    assert api.running() == [NEW, NEW]


def test_there_is_nothing_to_roll_back_where_nothing_is_deployed(api, cluster):
    api.namespaces["gpt2-instruct"] = {}
    with pytest.raises(KubeError, match="there is nothing to roll back"):
        kube.rollback(cluster)


def test_what_others_set_stays_theirs(api, cluster, first):
    stored = api.objects[DEPLOYMENT]
    stored.set(("spec", "replicas"), 5, "hpa")
    gpu = (
        "spec",
        "template",
        "spec",
        "containers",
        (("name", "gpt2-instruct"),),
        "resources",
        "limits",
        "nvidia.com/gpu",
    )
    stored.set(gpu, "1", "gpt2-instruct-gpu")
    assert deploy_next(cluster)["outcome"] == "deployed"
    assert api.object("deployments")["spec"]["replicas"] == 5
    assert api.objects[DEPLOYMENT].fields[gpu] == "1"
    assert api.running() == [NEW] * 5


def test_a_field_that_somebody_changed_is_a_conflict_that_is_explained_and_nothing_is_rolled_out(api, cluster, first):
    grace = ("spec", "template", "spec", "terminationGracePeriodSeconds")
    api.objects[DEPLOYMENT].set(grace, 5, "kubectl-edit")
    with pytest.raises(KubeError) as error:
        deploy_next(cluster)
    for part in ('conflict with "kubectl-edit"', "terminationGracePeriodSeconds", "deploy.force=true"):
        assert part in str(error.value)
    assert api.image() == OLD
    assert deploy_next(cluster, force=True)["outcome"] == "deployed"
    assert api.objects[DEPLOYMENT].fields[grace] == 80


def test_an_existing_namespace_is_left_as_its_owner_has_it(api, cluster):
    api.namespaces["shared"] = {"metadata": {"name": "shared", "labels": {}}}
    outcome = deploy(cluster, namespace="shared")
    assert outcome["namespace"] == "shared"
    assert api.namespaces["shared"]["metadata"]["labels"] == {}
    assert api.object("services")["metadata"]["namespace"] == "shared"


def test_a_deployment_scaled_to_nothing_is_not_deployed_to(api, cluster, first):
    api.objects[DEPLOYMENT].set(("spec", "replicas"), 0, "kubectl")
    with pytest.raises(KubeError, match=r"scaled to 0 replicas; `kubectl scale"):
        deploy_next(cluster)


def test_a_server_that_is_busy_for_a_moment_is_asked_again(api, cluster):
    api.failures = [503, 429, 500]
    assert deploy(cluster)["outcome"] == "deployed"


# Errors that come before anything is rolled out.


def test_all_missing_permissions_are_named_at_once_before_anything_changes(api, cluster):
    api.forbidden = {("create", "services/proxy"), ("patch", "deployments")}
    with pytest.raises(KubeError) as error:
        deploy(cluster)
    for part in ("may not patch deployments.apps, create services/proxy in namespace gpt2-instruct", "deployer.yaml"):
        assert part in str(error.value)
    assert not api.objects


def test_a_namespace_that_may_not_be_created_is_named(api, cluster):
    api.forbidden = {("patch", "namespaces")}
    with pytest.raises(KubeError, match=r'lacks a permission: namespaces "gpt2-instruct" is forbidden.*cannot patch'):
        deploy(cluster)


def test_the_role_in_optional_grants_what_is_asked_for_and_no_more(api, cluster):
    [role] = [each for each in yaml.safe_load_all(kube.DEPLOYER.read_text()) if each["kind"] == "Role"]
    granted = {(verb, name) for rule in role["rules"] for name in rule["resources"] for verb in rule["verbs"]}
    deploy(cluster)
    api.pods[NEW] = "CrashLoopBackOff"
    deploy_next(cluster)
    api.pods[NEW] = "ready"
    deploy_next(cluster)
    kube.rollback(cluster)
    api.objects.clear()
    api.replica_sets.clear()
    api.pods[OLD] = "CrashLoopBackOff"
    deploy(cluster)
    creating = {("create", resource) for verb, resource in api.asked if verb == "patch"}  # what applying may mean
    assert set(api.asked) | creating == granted | {("patch", "namespaces"), ("create", "namespaces")}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "is no kubeconfig: it must be YAML"),
        ("- a\n- b\n", "is no kubeconfig"),
        ("contexts: []\n", "cannot be used"),
        (None, "cannot be used"),
    ],
)
def test_a_kubeconfig_that_is_none_is_an_error_that_names_it(tmp_path, content, said):
    file = str(tmp_path / "missing") if content is None else written(tmp_path, content)
    with pytest.raises(KubeError) as error:
        kube.rollback(DeployConfig(kubeconfig=file))
    assert file in str(error.value)
    assert said in str(error.value)


def test_a_malformed_kubeconfig_is_not_quoted(tmp_path, api):
    config = api.kubeconfig()
    config["users"][0]["user"] = {"client-certificate-data": TOKEN, "client-key-data": "!" + TOKEN}
    for content in (config, json.dumps(config)[:-2], yaml.safe_dump(config) + f"\n  {TOKEN}: ["):
        with pytest.raises(KubeError) as error:
            kube.rollback(DeployConfig(kubeconfig=written(tmp_path, content)))
        assert TOKEN not in str(error.value)
        assert error.value.__cause__ is None


def test_an_unknown_context_is_named_with_those_there_are(cluster):
    with pytest.raises(KubeError, match=r"deploy.context is 'prod'; .*kubeconfig has here, there"):
        deploy(cluster, context="prod")
    assert deploy(cluster, context="there")["outcome"] == "deployed"


def test_the_kubeconfig_of_the_environment_is_the_default(api, kubeconfig, monkeypatch):
    monkeypatch.setenv("KUBECONFIG", kubeconfig)
    assert deploy(DeployConfig(image=OLD))["outcome"] == "deployed"


def test_in_a_pod_its_service_account_is_used(api, tmp_path, monkeypatch):
    (tmp_path / "token").write_text(TOKEN)
    (tmp_path / "ca.crt").write_bytes(api.certificate.read_bytes())
    monkeypatch.setattr("kubernetes.config.incluster_config.SERVICE_TOKEN_FILENAME", str(tmp_path / "token"))
    monkeypatch.setattr("kubernetes.config.incluster_config.SERVICE_CERT_FILENAME", str(tmp_path / "ca.crt"))
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "127.0.0.1")
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", str(api.port))
    assert deploy(DeployConfig(image=OLD))["outcome"] == "deployed"


def test_credentials_that_are_not_accepted(api, tmp_path):
    cluster = DeployConfig(image=OLD, kubeconfig=written(tmp_path, api.kubeconfig(token="expired")))
    with pytest.raises(KubeError, match=r"does not accept the credentials of the kubeconfig .*log in again"):
        deploy(cluster)


def test_a_cluster_that_is_down(tmp_path, api):
    down = written(tmp_path, api.kubeconfig(server="https://127.0.0.1:1"))
    with pytest.raises(KubeError, match=r"https://127.0.0.1:1 cannot be reached .*is the cluster up"):
        deploy(DeployConfig(image=OLD, kubeconfig=down))


def test_a_cluster_whose_certificate_is_not_trusted(tmp_path, api):
    config = api.kubeconfig()
    del config["clusters"][0]["cluster"]["certificate-authority"]
    with pytest.raises(KubeError, match=r"the certificate of https://127.0.0.1:.* trusts"):
        deploy(DeployConfig(image=OLD, kubeconfig=written(tmp_path, config)))


def test_an_address_that_is_no_api_server(tmp_path, api):
    config = api.kubeconfig(server=f"https://127.0.0.1:{api.port}/elsewhere")
    with pytest.raises(KubeError, match=r"does not know /apis/.*Kubernetes 1.25 or later is needed"):
        deploy(DeployConfig(image=OLD, kubeconfig=written(tmp_path, config)))


def test_the_token_is_in_no_log_outcome_or_error(api, cluster, caplog, capfd):
    caplog.set_level(logging.DEBUG)
    outcomes = [deploy(cluster)]
    api.pods[NEW] = "CrashLoopBackOff"
    outcomes.append(deploy_next(cluster))
    api.forbidden = {("patch", "deployments")}
    with pytest.raises(KubeError) as error:
        deploy_next(cluster)
    said = capfd.readouterr()
    assert "going back" in caplog.text
    assert TOKEN not in caplog.text + json.dumps(outcomes) + str(error.value) + said.out + said.err
