"""Waiting for a rollout, and the diagnosis of one that does not progress."""

import time
from collections.abc import Iterator

from deploy.kubernetes.client import Cluster, Manifest
from deploy.kubernetes.errors import KubeError

POLL = 1.0  # seconds
CRASHED = "CrashLoopBackOff"
_CHECK_IMAGE = (
    "check that the image was pushed or loaded into the cluster's nodes, that deploy.image names it as they do, and "
    "that they may pull it"
)
_CHECK_CONTAINER = "check the container's command and security context"
# Waiting states of a container that do not recover by themselves, mapped to a hint for the user.
FATAL_STATES = {
    "ErrImagePull": _CHECK_IMAGE,
    "ImagePullBackOff": _CHECK_IMAGE,
    "ErrImageNeverPull": _CHECK_IMAGE,
    "InvalidImageName": "deploy.image is not a valid image reference",
    "CreateContainerConfigError": "check the pod's environment and volumes",
    "CreateContainerError": _CHECK_CONTAINER,
    "RunContainerError": _CHECK_CONTAINER,
    CRASHED: "its last log lines:",
}


def wait_for_rollout(cluster: Cluster) -> Manifest:
    """Wait until all pods of the Deployment have its newest template and are available; return the Deployment.

    Raises:
        KubeError: the rollout cannot succeed, or did not in time.
    """
    start = time.monotonic()
    while True:
        deployment = cluster.get("Deployment")
        if deployment is None:
            raise KubeError(f"the Deployment in {cluster} was deleted during its rollout")
        status, replicas = deployment.get("status", {}), deployment["spec"].get("replicas", 1)
        if status.get("observedGeneration", 0) >= deployment["metadata"]["generation"]:
            counts = ("replicas", "updatedReplicas", "availableReplicas")
            if all(status.get(count, 0) == replicas for count in counts):
                return deployment
            _check_progress(cluster, deployment)
        # The controller reports a rollout as failed after progressDeadlineSeconds without progress. This limit is for a
        # cluster without a running controller.
        limit = deployment["spec"].get("progressDeadlineSeconds", 600) * (replicas + 1)
        if time.monotonic() > start + limit:
            raise KubeError(f"the rollout in {cluster} did not finish within {limit} seconds")
        time.sleep(POLL)


def _check_progress(cluster: Cluster, deployment: Manifest) -> None:
    """Raise KubeError if waiting longer cannot help."""
    conditions = {each["type"]: each for each in deployment["status"].get("conditions", ())}
    failure = conditions.get("ReplicaFailure", {})
    if failure.get("status") == "True":
        raise KubeError(f"no pod could be created in {cluster}: {failure['message']}")
    pods = [pod for newest in cluster.replica_sets(deployment)[-1:] for pod in cluster.pods(newest)]
    for pod in pods:
        _check_containers(cluster, pod)
    if conditions.get("Progressing", {}).get("reason") == "ProgressDeadlineExceeded":
        reason = next(_unmet_conditions(pods), "its pods did not become ready")
        raise KubeError(f"the rollout in {cluster} made no progress within its deadline: {reason}")


def _check_containers(cluster: Cluster, pod: Manifest) -> None:
    name = pod["metadata"]["name"]
    for container in pod.get("status", {}).get("containerStatuses", ()):
        waiting = container.get("state", {}).get("waiting", {})
        state = waiting.get("reason", "")
        if state in FATAL_STATES:
            hint = FATAL_STATES[state] + (f"\n{_crash_log(cluster, name)}" if state == CRASHED else "")
            message = f" ({waiting['message']})" if waiting.get("message") else ""
            raise KubeError(f"pod {name}, image {container['image']}: {state}{message}; {hint}")


def _unmet_conditions(pods: list[Manifest]) -> Iterator[str]:
    for pod in pods:
        for condition in pod.get("status", {}).get("conditions", ()):
            if condition["status"] == "False" and condition.get("message"):
                yield condition["message"]


def _crash_log(cluster: Cluster, pod: str) -> str:
    try:
        return cluster.crash_log(pod)
    except KubeError as error:
        return f"(the log cannot be read: {error})"
