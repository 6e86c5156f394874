"""Renders the manifests of k8s/ for an image and a lineage, with the lineage's ids as labels and annotations."""

from typing import Any

import yaml

from deploy.kubernetes.client import Manifest, revision
from deploy.kubernetes.errors import KubeError
from deploy.source import ROOT
from deploy.target import Version
from gpt2core.types import NAME, Lineage

MANIFESTS = ROOT / "k8s"
PREFIX = f"{NAME}/"  # prefix of the keys of labels and annotations with ids of the lineage
SEARCHABLE = ("run-id", "commit", "adapter-sha256", "data-train-sha256")  # ids that are labels too, for selectors
VERSION = "app.kubernetes.io/version"  # label
# Annotation of the Deployment: "false" from its apply until it is verified. The controller copies it to the newest
# ReplicaSet, so it tells which revisions a killed run left behind.
VERIFIED = f"{PREFIX}verified"
LABEL_LENGTH = 63  # Kubernetes' limit; one character less than a sha256


def render(image: str, lineage: Lineage, namespace: str, memory: str = "") -> list[Manifest]:
    """Return the manifests of k8s/. The Deployment comes last because its pods need the other objects.

    Args:
        memory: memory request and limit of a pod, like 2g; "": as in k8s/.
    """
    manifests: list[Manifest] = [
        yaml.safe_load(file.read_text(encoding="utf-8")) for file in sorted(MANIFESTS.glob("*.yaml"))
    ]
    for manifest in manifests:
        manifest["metadata"]["name" if manifest["kind"] == "Namespace" else "namespace"] = namespace
    manifests.sort(key=lambda manifest: manifest["kind"] == "Deployment")
    deployment = manifests[-1]
    template = deployment["spec"]["template"]
    container = container_of(deployment)
    container["image"] = image
    if memory:
        for amounts in container["resources"].values():
            amounts["memory"] = f"{memory.upper()}i"  # for docker, 2g means 2 GiB, in Kubernetes 2Gi
    for metadata in (deployment["metadata"], template["metadata"]):
        metadata["labels"] = metadata["labels"] | labels(lineage)
        metadata["annotations"] = metadata.get("annotations", {}) | annotations(lineage)
    deployment["metadata"]["annotations"][VERIFIED] = "false"
    return manifests


def placeholder_image() -> str:
    """The image in k8s/, which no registry has: `kubectl apply -f k8s` alone deploys no model."""
    deployment = yaml.safe_load((MANIFESTS / "30-deployment.yaml").read_text(encoding="utf-8"))
    return str(container_of(deployment)["image"])


def rollback_patch(live: Manifest, earlier: Manifest) -> list[Manifest]:
    """The JSON patch that gives the live Deployment the pod template and ids of an earlier revision.

    Not an apply, which would keep the fields that other managers have added since.

    Args:
        earlier: a Deployment as it was, or a ReplicaSet.
    """
    template = earlier["spec"]["template"]
    labels = {key: value for key, value in template["metadata"]["labels"].items() if key != "pod-template-hash"}
    template = template | {"metadata": template["metadata"] | {"labels": labels}}
    patch: list[Manifest] = [{"op": "replace", "path": "/spec/template", "value": template}]
    for part in ("labels", "annotations"):
        others = {key: value for key, value in live["metadata"].get(part, {}).items() if not _is_id(key)}
        ids = {key: value for key, value in template["metadata"].get(part, {}).items() if _is_id(key)}
        patch.append({"op": "add", "path": f"/metadata/{part}", "value": others | ids})
    if VERIFIED in earlier["metadata"].get("annotations", {}):
        patch[-1]["value"][VERIFIED] = earlier["metadata"]["annotations"][VERIFIED]
    return patch


def verified_patch(live: Manifest) -> list[Manifest]:
    """The JSON patch that marks the version of the live Deployment as verified."""
    marked = live["metadata"].get("annotations", {}) | {VERIFIED: "true"}
    return [{"op": "add", "path": "/metadata/annotations", "value": marked}]


def was_left_unverified(manifest: Manifest) -> bool:
    """Whether a killed run left this Deployment or ReplicaSet unverified; False if no annotation says so."""
    return bool(manifest["metadata"].get("annotations", {}).get(VERIFIED) == "false")


def _is_id(key: str) -> bool:
    return key.startswith(PREFIX) or key == VERSION


def annotations(lineage: Lineage) -> dict[str, str]:
    """Return the ids of the lineage, with the values of the pod's /metadata."""
    ids = {
        "run-id": lineage.run.id,
        "run-name": lineage.run.name,
        "model-version": lineage.model_version,
        "bento": lineage.bento,
        "commit": lineage.commit.sha,
        "commit-dirty": str(lineage.commit.dirty).lower(),
        "base-name": lineage.base.name,
        "base-revision": lineage.base.revision,
        "base-sha256": lineage.base.sha256,
        "adapter-sha256": lineage.adapter.sha256,
        **{f"data-{split}-sha256": digest for split, digest in lineage.data.items()},
    }
    return {PREFIX + key: value for key, value in ids.items()}


def labels(lineage: Lineage) -> dict[str, str]:
    """Return the ids for label selectors, cut to the maximum length of a label."""
    ids = annotations(lineage)
    searchable = {PREFIX + key: ids[PREFIX + key][:LABEL_LENGTH] for key in SEARCHABLE}
    return searchable | {VERSION: lineage.bento.partition(":")[2]}


def version_of(deployment: Manifest) -> Version:
    """The version in the annotations of a live Deployment or ReplicaSet."""
    return Version(bento_of(deployment), container_of(deployment)["image"], revision(deployment))


def is_version(deployment: Manifest, version: Version) -> bool:
    """Whether the Deployment or ReplicaSet has the version's Bento and image, in any revision."""
    running = version_of(deployment)
    return (running.bento, running.image) == (version.bento, version.image)


def bento_of(deployment: Manifest) -> str:
    """The tag of the Bento that this project deployed; "" for a Deployment or ReplicaSet of another origin."""
    return str(deployment["spec"]["template"]["metadata"].get("annotations", {}).get(f"{PREFIX}bento", ""))


def container_of(deployment: Manifest) -> dict[str, Any]:
    """The service's container; sidecars may have been injected.

    Raises:
        KubeError: there is none.
    """
    containers: list[dict[str, Any]] = deployment["spec"]["template"]["spec"]["containers"]
    for container in containers:
        if container["name"] == NAME:
            return container
    raise KubeError(
        f"the Deployment {NAME} in namespace {deployment['metadata'].get('namespace')} has no container {NAME}, only "
        f"{', '.join(container['name'] for container in containers)}: it was not made by this project; choose another "
        "deploy.namespace"
    )
