"""Renders the manifests of k8s/ for an image and a lineage, with the lineage's ids as labels and annotations."""

from typing import Any

import yaml

from deploy.bento import NAME, ROOT
from deploy.kubernetes.client import Manifest, revision
from deploy.target import Version
from gpt2core.types import Lineage

MANIFESTS = ROOT / "k8s"
PREFIX = f"{NAME}/"  # prefix of the keys of labels and annotations with ids of the lineage
SEARCHABLE = ("run-id", "commit", "adapter-sha256", "data-train-sha256")  # ids that are labels too, for selectors
LABEL_LENGTH = 63  # Kubernetes' limit; one character less than a sha256


def render(image: str, lineage: Lineage, namespace: str, memory: str = "") -> list[Manifest]:
    """Return the manifests of k8s/. The Deployment comes last because its pods need the other objects.

    Args:
        memory: memory request and limit of a pod, like 2g; "": as in k8s/.
    """
    manifests: list[Manifest] = [yaml.safe_load(file.read_text()) for file in sorted(MANIFESTS.glob("*.yaml"))]
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
    return manifests


def render_revision(replica_set: Manifest, namespace: str) -> Manifest:
    """Return the Deployment with the pod template of an earlier revision, for a server-side apply.

    A JSON patch would add a second field manager as an owner of the fields, and the next deployment would conflict.
    """
    template = replica_set["spec"]["template"]
    labels = {key: value for key, value in template["metadata"]["labels"].items() if key != "pod-template-hash"}
    annotations = template["metadata"].get("annotations", {})
    deployment: Manifest = yaml.safe_load((MANIFESTS / "30-deployment.yaml").read_text())
    deployment["metadata"] |= {
        "namespace": namespace,
        "labels": labels,
        "annotations": {key: value for key, value in annotations.items() if key.startswith(PREFIX)},
    }
    deployment["spec"]["template"] = template | {"metadata": {"labels": labels, "annotations": annotations}}
    return deployment


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
    return searchable | {"app.kubernetes.io/version": lineage.bento.partition(":")[2]}


def version_of(deployment: Manifest) -> Version:
    """Return the version that a live Deployment's annotations name."""
    annotations = deployment["spec"]["template"]["metadata"].get("annotations", {})
    image = container_of(deployment)["image"]
    return Version(annotations.get(f"{PREFIX}bento", ""), image, revision(deployment))


def container_of(deployment: Manifest) -> dict[str, Any]:
    """Return the service's container, which injected sidecars may precede."""
    containers = deployment["spec"]["template"]["spec"]["containers"]
    container: dict[str, Any] = next(each for each in containers if each["name"] == NAME)
    return container
