"""Versions of a service with their answer, and what is done with them on the double of the API server."""

from dataclasses import replace

import pytest
import yaml

from deploy.kubernetes import wait
from deploy.kubernetes.render import MANIFESTS
from deploy.kubernetes.rollout import KubernetesTarget
from deploy.target import DeployFailed, DeployOutcome
from tests.deploy.kube_api import Stored
from tests.helpers import make_lineage, make_sample

LINEAGE = make_lineage(bento="gpt2-instruct:1111111111111111")
NEXT_LINEAGE = make_lineage("run-18", bento="gpt2-instruct:2222222222222222")
OLD, NEW = "registry.example/gpt2-instruct:1", "registry.example/gpt2-instruct@sha256:" + "2" * 64
THIRD, THIRD_LINEAGE = "registry.example/gpt2-instruct:3", make_lineage("run-19", bento="gpt2-instruct:" + "3" * 16)
SAMPLE = make_sample("What is the capital?", "Canada", "Ottawa", tuned="Ottawa")
DEPLOYMENT = ("deployments", "gpt2-instruct")
CONTAINER = ("spec", "template", "spec", "containers", (("name", "gpt2-instruct"),))


def deploy(config, **values) -> DeployOutcome:
    return KubernetesTarget(replace(config, **values)).deploy(LINEAGE, [SAMPLE], 8)


def deploy_next(config, **values) -> DeployOutcome:
    return KubernetesTarget(replace(config, image=NEW, **values)).deploy(NEXT_LINEAGE, [SAMPLE], 8)


def rollback(config) -> DeployOutcome:
    return KubernetesTarget(config).rollback()


def preflight(config) -> None:
    KubernetesTarget(config).preflight()


def constant_response(answer: str, bento: str):
    return lambda body: {"answer": answer, "model": bento}


def failed(action, config) -> DeployFailed:
    with pytest.raises(DeployFailed) as error:
        action(config)
    return error.value


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


def interrupt_first_wait(monkeypatch, interrupt: type[BaseException]) -> None:
    interrupts = iter([interrupt])

    def sleep(_: float) -> None:
        for each in interrupts:
            raise each

    monkeypatch.setattr(wait.time, "sleep", sleep)
