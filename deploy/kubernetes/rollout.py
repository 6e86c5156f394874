"""The Kubernetes deploy target: apply k8s/, wait for the rollout, verify the answers, roll back on failure."""

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from deploy.bento import NAME
from deploy.config import DeployConfig
from deploy.containers.images import pinned
from deploy.kubernetes import wait
from deploy.kubernetes.client import Cluster, Manifest, revision
from deploy.kubernetes.errors import KubeError
from deploy.kubernetes.render import bento_of, container_of, placeholder_image, render, rollback_patch, version_of
from deploy.kubernetes.wait import check_not_paused, wait_for_rollout
from deploy.target import DeployError, DeployFailed, DeployOutcome
from deploy.verify import verify_answers
from gpt2core.types import Lineage, Sample

logger = logging.getLogger(__name__)

SETTLE_TIMEOUT = 30.0  # seconds in which the Service may still route to pods of the previous version


class KubernetesTarget:
    """The service in one namespace of a cluster."""

    def __init__(self, config: DeployConfig) -> None:
        self.config = config
        self.cluster = Cluster(config)

    def preflight(self) -> None:
        """Check connection, permissions, and that a Deployment that exists can be rolled out.

        Raises:
            KubeError: a deployment would be refused.
        """
        self._check()

    def deploy(self, lineage: Lineage, samples: Sequence[Sample], max_new_tokens: int) -> DeployOutcome:
        """Roll out the configured image, which must contain the Bento of the lineage.

        Raises:
            KubeError: nothing was rolled out.
            DeployFailed: the rollout failed or was interrupted, and was undone if possible.
        """
        cluster, before = self.cluster, self._check()
        image = pinned(self.config.image)
        outcome = DeployOutcome(
            target="kubernetes",
            outcome="deployed",
            bento=lineage.bento,
            namespace=cluster.namespace,
            image=image,
            previous=None if before is None else version_of(before),
        )
        is_applied, interrupt = False, None
        try:
            self._apply(render(image, lineage, cluster.namespace, self.config.memory), before)
            is_applied = True
            deployment = wait_for_rollout(cluster)
            _verify_service(cluster, lineage.bento, samples, max_new_tokens)
            reason = f"{len(samples)} answers were verified against those of the evaluated model"
            image_id = _running_image(cluster, deployment)
            return replace(outcome, reason=reason, image_id=image_id, revision=revision(deployment))
        except DeployError as error:
            if not is_applied:
                raise
            reason = str(error)
        # An interrupt (ZenML raises its own exception for Ctrl-C and SIGTERM) or a bug. The apply may have taken effect
        # although its response was not read.
        except BaseException as error:
            reason, interrupt = f"interrupted ({type(error).__name__})", error
        logger.warning("rolling back: %s", reason)
        undone = _undo_rollout(cluster, before, outcome)
        logger.warning("%s", undone.reason)
        raise DeployFailed(replace(undone, reason=f"{reason}; {undone.reason}"), interrupt)

    def rollback(self) -> DeployOutcome:
        """Restore the pod template of the newest earlier revision with another Bento or image, as `kubectl rollout
        undo` does; twice restores the current one. If that fails or is interrupted, the current one is restored.

        Raises:
            KubeError: nothing is deployed, no such revision is kept, or it does not become ready.
        """
        cluster = self.cluster
        cluster.check_permissions()
        current = cluster.get("Deployment")
        if current is None:
            raise KubeError(f"{cluster} has no Deployment {NAME}; there is nothing to roll back")
        check_not_paused(cluster, current)
        earlier = _find_previous(cluster, current)
        try:
            now = version_of(_roll_back_to(cluster, earlier))
        except BaseException as error:  # also Ctrl-C
            logger.warning("the rollback failed, restoring revision %s", revision(current))
            state = _undo_rollback(cluster, current)
            if isinstance(error, DeployError):
                raise KubeError(f"{version_of(earlier).image} could not be rolled back to: {error}; {state}") from None
            logger.warning("the rollback was interrupted; %s", state)
            raise
        return DeployOutcome(
            target="kubernetes",
            outcome="rolled_back",
            bento=now.bento,
            reason=f"revision {revision(current)} was rolled back on request",
            namespace=cluster.namespace,
            image=now.image,
            revision=now.revision,
            previous=version_of(current),
        )

    def _check(self) -> Manifest | None:
        """Return the Deployment that a deployment would change, if there is one."""
        self.cluster.check_permissions()
        deployment = self.cluster.get("Deployment")
        if deployment is not None:
            _check_scale(self.cluster, deployment)
            check_not_paused(self.cluster, deployment)
            container_of(deployment)  # raises for a Deployment of another tool
        return deployment

    def _apply(self, manifests: list[Manifest], before: Manifest | None) -> None:
        # After `kubectl apply -f k8s`, kubectl owns the placeholder, and no model would be replaced by mistake.
        force = self.config.force or (before is not None and version_of(before).image == placeholder_image())
        for manifest in manifests:
            # An existing namespace is not changed: it may be shared, and its labels belong to its owner.
            if manifest["kind"] != "Namespace" or self.cluster.get("Namespace", self.cluster.namespace) is None:
                self.cluster.apply(manifest, force)


def _check_scale(cluster: Cluster, deployment: Manifest) -> None:
    if deployment["spec"].get("replicas") == 0:
        raise KubeError(
            f"the Deployment in {cluster} is scaled to 0 replicas; run `kubectl scale deployment {NAME} "
            f"-n {cluster.namespace} --replicas=2` first"
        )


def _verify_service(cluster: Cluster, bento: str, samples: Sequence[Sample], max_new_tokens: int) -> None:
    """Raise DeployError if the service is another Bento or its answers do not pass `verify_answers`."""
    deadline = time.monotonic() + SETTLE_TIMEOUT

    def generate(instruction: str, input: str) -> str:
        body = {"instruction": instruction, "input": input, "max_new_tokens": max_new_tokens}
        return _generate(cluster, bento, body, deadline)

    verify_answers(bento, generate, samples)


def _generate(cluster: Cluster, bento: str, body: Mapping[str, Any], deadline: float) -> str:
    """Request an answer of this Bento. Repeats requests that reach other pods until the deadline (`time.monotonic`)."""
    while True:
        try:
            response = cluster.predict(body)
            if response.get("model") == bento:
                return str(response.get("answer"))
            model = response.get("model")
            error = KubeError(f"the service is {model}, not {bento}: deploy.image contains another Bento")
        except KubeError as failure:
            error = failure
        if time.monotonic() > deadline:
            raise error
        time.sleep(wait.POLL)


def _find_previous(cluster: Cluster, current: Manifest) -> Manifest:
    """The newest ReplicaSet of this project before the current revision that has another Bento or image."""
    running = version_of(current)
    for replica_set in reversed(cluster.replica_sets(current)):
        if bento_of(replica_set) and revision(replica_set) < revision(current):
            version = version_of(replica_set)
            if (version.bento, version.image) != (running.bento, running.image):
                return replica_set
    raise KubeError(
        f"{cluster} has no revision of {NAME} before {revision(current)} with another Bento or image to roll back to"
    )


def _roll_back_to(cluster: Cluster, earlier: Manifest) -> Manifest:
    """Roll out the pod template of an earlier Deployment or of a ReplicaSet; return the resulting Deployment."""
    live = cluster.get("Deployment")
    if live is None:
        raise KubeError(f"the Deployment in {cluster} was deleted")
    cluster.patch_deployment(rollback_patch(live, earlier))
    return wait_for_rollout(cluster)


def _undo_rollback(cluster: Cluster, current: Manifest) -> str:
    """Undo a rollback; return the resulting state in words."""
    image = version_of(current).image
    try:
        return f"{image} runs again, as revision {revision(_roll_back_to(cluster, current))}"
    except KubeError as error:
        return f"and {image} could not be restored: {error}"


def _running_image(cluster: Cluster, deployment: Manifest) -> str:
    """Return the digest of the running image as a node reports it; "" if no node reports it."""
    [newest] = cluster.replica_sets(deployment)[-1:]
    statuses = [status for pod in cluster.pods(newest) for status in pod["status"].get("containerStatuses", ())]
    return next((status["imageID"] for status in statuses if status["name"] == NAME and status.get("imageID")), "")


def _undo_rollout(cluster: Cluster, before: Manifest | None, attempted: DeployOutcome) -> DeployOutcome:
    """Undo a rollout, which may not have started; return the outcome, whose reason is the resulting state."""
    try:
        live = cluster.get("Deployment")
        if before is None:
            if live is not None:
                cluster.delete("Deployment")
            state = "nothing was deployed before, and the Deployment was deleted"
            return replace(attempted, outcome="rolled_back", reason=state)
        number = revision(before)
        if live is not None and live["spec"]["template"] == before["spec"]["template"]:
            state = f"revision {number} already ran before, so there is nothing to roll back to"
            return replace(attempted, outcome="failed", reason=state, revision=number)
        restored = _roll_back_to(cluster, before)
        for replica_set in cluster.replica_sets(restored):
            if number < revision(replica_set) < revision(restored):
                cluster.delete("ReplicaSet", replica_set["metadata"]["name"])  # so that no rollback selects it
        now = version_of(restored)
        state = f"rolled back to {now.image}, now revision {now.revision}"
        return replace(attempted, outcome="rolled_back", reason=state, revision=now.revision)
    except KubeError as error:
        return replace(attempted, outcome="failed", reason=f"and it could not be rolled back: {error}")
