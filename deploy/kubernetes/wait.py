"""Waits for a rollout, and diagnoses one that does not progress."""

import logging
import time
from collections.abc import Iterator

from deploy.kubernetes.client import Cluster, Manifest
from deploy.kubernetes.errors import KubeError, SupersededError
from deploy.kubernetes.render import is_version, version_of
from deploy.target import Version
from gpt2core.types import NAME

logger = logging.getLogger(__name__)

POLL = 1.0  # seconds
# Seconds for which a failed image pull is tolerated: the kubelet retries after 10, 20 and 40 seconds.
IMAGE_PULL_TIMEOUT = 60.0
CRASHED = "CrashLoopBackOff"
PULL_FAILURES = ("ErrImagePull", "ImagePullBackOff")
_CHECK_IMAGE = (
    "check that the image was pushed or loaded into the cluster's nodes, that deploy.image names it as they do, and "
    "that they may pull it"
)
_CHECK_CONTAINER = "check the container's command and security context"
# Waiting states of a container that do not recover by themselves, mapped to a hint for the user.
FATAL_STATES = {
    **dict.fromkeys(PULL_FAILURES, _CHECK_IMAGE),
    "ErrImageNeverPull": _CHECK_IMAGE,
    "InvalidImageName": "deploy.image is not a valid image reference",
    "CreateContainerConfigError": "check the pod's environment and volumes",
    "CreateContainerError": _CHECK_CONTAINER,
    "RunContainerError": _CHECK_CONTAINER,
    CRASHED: "its last log lines:",
}


def wait_for_rollout(cluster: Cluster, version: Version) -> Manifest:
    """Wait until all pods of the Deployment have its newest template and are available; return the Deployment.

    Raises:
        SupersededError: the Deployment has another version.
        KubeError: the rollout cannot succeed, or did not succeed in time.
    """
    return _Rollout(cluster, version).wait()


def check_version(deployment: Manifest, *versions: Version) -> None:
    """Raise SupersededError unless the Deployment has one of these versions."""
    if not any(is_version(deployment, version) for version in versions):
        other = version_of(deployment)
        raise SupersededError(
            f"superseded by {other.bento or 'a version of another origin'}, image {other.image}, which is left as it is"
        )


def check_not_paused(cluster: Cluster, deployment: Manifest) -> None:
    """Raise KubeError if the Deployment is paused: its pods keep their template."""
    if deployment["spec"].get("paused"):
        raise KubeError(
            f"the Deployment in {cluster} is paused; run `kubectl rollout resume deployment {NAME} "
            f"-n {cluster.namespace}` first"
        )


class _Rollout:
    def __init__(self, cluster: Cluster, version: Version) -> None:
        self.cluster, self.version = cluster, version
        self.pull_failing_since: float | None = None  # time.monotonic()
        self.logged = ""

    def wait(self) -> Manifest:
        start = time.monotonic()
        while True:
            deployment = self.cluster.get("Deployment")
            if deployment is None:
                raise KubeError(f"the Deployment in {self.cluster} was deleted during its rollout")
            check_version(deployment, self.version)
            status, replicas = deployment.get("status", {}), deployment["spec"].get("replicas", 1)
            if status.get("observedGeneration", 0) >= deployment["metadata"]["generation"]:
                counts = ("replicas", "updatedReplicas", "availableReplicas")
                if all(status.get(count, 0) == replicas for count in counts):
                    return deployment
                self._check_progress(deployment)
            # The controller reports a rollout as failed after progressDeadlineSeconds without progress. This limit
            # ends the wait in a cluster without a running controller.
            limit = deployment["spec"].get("progressDeadlineSeconds", 600) * (replicas + 1)
            if time.monotonic() > start + limit:
                raise KubeError(f"the rollout in {self.cluster} did not finish within {limit} seconds")
            time.sleep(POLL)

    def _check_progress(self, deployment: Manifest) -> None:
        """Raise KubeError if the rollout cannot succeed; log the reason for waiting when it changes."""
        check_not_paused(self.cluster, deployment)
        conditions = {condition["type"]: condition for condition in deployment["status"].get("conditions", ())}
        failure = conditions.get("ReplicaFailure", {})
        if failure.get("status") == "True":
            raise KubeError(f"no pod could be created in {self.cluster}: {failure['message']}")
        newest = self.cluster.replica_sets(deployment)[-1:]
        pods = [pod for replica_set in newest for pod in self.cluster.pods(replica_set)]
        exceeded = conditions.get("Progressing", {}).get("reason") == "ProgressDeadlineExceeded"
        for pod in pods:
            self._check_containers(pod, may_pull_again=not exceeded)
        reason = next(_unmet_conditions(pods), "")
        if exceeded:
            reason = reason or "its pods did not become ready"
            raise KubeError(f"the rollout in {self.cluster} made no progress within its deadline: {reason}")
        self._log(deployment, newest, reason)

    def _check_containers(self, pod: Manifest, may_pull_again: bool) -> None:
        status = pod.get("status", {})
        for container in (*status.get("initContainerStatuses", ()), *status.get("containerStatuses", ())):
            waiting = container.get("state", {}).get("waiting", {})
            state = waiting.get("reason", "")
            if state in PULL_FAILURES and may_pull_again and self._is_pull_retried():
                continue
            if state in FATAL_STATES:
                message = f" ({waiting['message']})" if waiting.get("message") else ""
                diagnosis = f"{state}{message}; {FATAL_STATES[state]}"
                if state == CRASHED:
                    diagnosis = self._diagnose_crash(pod, container, f"{state}{message}")
                name, image = container["name"], container["image"]
                raise KubeError(f"pod {pod['metadata']['name']}, container {name}, image {image}: {diagnosis}")

    def _is_pull_retried(self) -> bool:
        if self.pull_failing_since is None:
            self.pull_failing_since = time.monotonic()
        return time.monotonic() < self.pull_failing_since + IMAGE_PULL_TIMEOUT

    def _diagnose_crash(self, pod: Manifest, container: Manifest, state: str) -> str:
        """Describe how a container crashed, from its last state; its current state is always CrashLoopBackOff."""
        ended = container.get("lastState", {}).get("terminated", {})
        code = f"exit code {ended['exitCode']}" if "exitCode" in ended else "exit code unknown"
        if ended.get("reason") == "OOMKilled":
            limit = _memory_limit(pod, container["name"])
            hint = "raise deploy.memory" if container["name"] == NAME else "raise the limit of this container"
            return f"OOMKilled, {code}, memory limit {limit}; {hint}"
        log = self._crash_log(pod["metadata"]["name"], container["name"])
        return f"{state}, {code}; {FATAL_STATES[CRASHED]}\n{log}"

    def _crash_log(self, pod: str, container: str) -> str:
        try:
            return self.cluster.crash_log(pod, container)
        except KubeError as error:
            return f"(the log cannot be read: {error})"

    def _log(self, deployment: Manifest, newest: list[Manifest], reason: str) -> None:
        ready = sum(replica_set.get("status", {}).get("availableReplicas", 0) for replica_set in newest)
        replicas = deployment["spec"].get("replicas", 1)
        line = f"waiting for the rollout: {ready} of {replicas} pods available" + (f"; {reason}" if reason else "")
        if line != self.logged:
            logger.info(line)
            self.logged = line


def _unmet_conditions(pods: list[Manifest]) -> Iterator[str]:
    """Yield the messages of unmet conditions, such as "0/1 nodes are available: 1 Insufficient cpu"."""
    for pod in pods:
        for condition in pod.get("status", {}).get("conditions", ()):
            if condition["status"] == "False" and condition.get("message"):
                yield condition["message"]


def _memory_limit(pod: Manifest, container: str) -> str:
    containers = pod["spec"]["containers"] + pod["spec"].get("initContainers", [])
    [spec] = [spec for spec in containers if spec["name"] == container]
    return str(spec.get("resources", {}).get("limits", {}).get("memory", "of its node"))
