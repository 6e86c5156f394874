"""The Kubernetes deploy target: apply k8s/, wait for the rollout, verify the answers, roll back on failure."""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from deploy.config import DeployConfig
from deploy.containers.images import pinned
from deploy.kubernetes import wait
from deploy.kubernetes.client import OUTAGE_TIMEOUT, Cluster, Manifest, revision
from deploy.kubernetes.errors import ConflictError, KubeError, SupersededError, UnavailableError
from deploy.kubernetes.lock import namespace_lock
from deploy.kubernetes.render import (
    VERIFIED,
    bento_of,
    container_of,
    is_version,
    placeholder_image,
    render,
    rollback_patch,
    verified_patch,
    version_of,
    was_left_unverified,
)
from deploy.kubernetes.wait import check_not_paused, check_version, wait_for_rollout
from deploy.target import DeployError, DeployFailed, DeployOutcome, Version
from deploy.verify import verify_answers
from gpt2core.types import NAME, Lineage, Sample

logger = logging.getLogger(__name__)

CHANGE_ATTEMPTS = 10  # attempts to change the Deployment, while controllers change it too
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
        self.cluster.check_permissions()
        self._replaceable()

    def deploy(self, lineage: Lineage, samples: Sequence[Sample], max_new_tokens: int) -> DeployOutcome:
        """Roll out the configured image, which must contain the Bento of the lineage.

        Raises:
            KubeError: nothing was changed, except that the namespace may have been created.
            DeployFailed: the rollout failed or was interrupted, and was undone if possible.
        """
        self.preflight()
        namespace, *manifests = render(pinned(self.config.image), lineage, self.cluster.namespace, self.config.memory)
        # An existing namespace is not changed: it may be shared, and its labels belong to its owner.
        if self.cluster.get("Namespace", self.cluster.namespace) is None:
            self.cluster.apply(namespace)
        with namespace_lock(self.cluster):
            return self._deploy(manifests, lineage.bento, samples, max_new_tokens)

    def _deploy(
        self, manifests: list[Manifest], bento: str, samples: Sequence[Sample], max_new_tokens: int
    ) -> DeployOutcome:
        """Apply the manifests, of which the Deployment is the last; wait for the rollout, verify it, or undo it."""
        cluster, live = self.cluster, self._replaceable()
        # After `kubectl apply -f k8s`, kubectl owns the placeholder, and no model would be replaced by mistake.
        force = self.config.force or (live is not None and version_of(live).image == placeholder_image())
        *_, planned = [cluster.dry_run(manifest, force) for manifest in manifests]
        is_unchanged = live is not None and live["spec"]["template"] == planned["spec"]["template"]
        version = version_of(planned)
        before = live
        if live is not None and was_left_unverified(live):
            before = _find_previous(cluster, live) or live
        elif is_unchanged:
            manifests[-1]["metadata"]["annotations"].pop(VERIFIED)  # it stays verified
        outcome = DeployOutcome(
            target="kubernetes",
            outcome="unchanged" if is_unchanged else "deployed",
            bento=bento,
            namespace=cluster.namespace,
            image=version.image,
            previous=_previous_version(cluster, before, version),
        )
        interrupt = None
        cluster.outage_timeout = OUTAGE_TIMEOUT
        try:
            for manifest in manifests:
                cluster.apply(manifest, force)
            deployment = wait_for_rollout(cluster, version)
            _verify_service(cluster, bento, samples, max_new_tokens)
            _mark_verified(cluster, version)
            reason = f"{len(samples)} answers were verified against those of the evaluated model"
            image_id = _running_image(cluster, deployment)
            return replace(outcome, reason=reason, image_id=image_id, revision=revision(deployment))
        except UnavailableError as error:
            reason, cluster.outage_timeout = str(error), 0.0  # the outage has lasted long enough
        except DeployError as error:
            reason = str(error)
        # An interrupt (ZenML raises its own exception for Ctrl-C and SIGTERM) or a bug. The apply may have taken effect
        # although its response was not read.
        except BaseException as error:
            reason, interrupt = f"interrupted ({type(error).__name__})", error
        logger.warning("rolling back: %s", reason)
        undone = _undo_rollout(cluster, before, version, outcome)
        logger.warning("%s", undone.reason)
        if undone.reason != reason:  # else it was superseded, which the wait has noticed
            undone = replace(undone, reason=f"{reason}; {undone.reason}")
        raise DeployFailed(undone, interrupt)

    def rollback(self) -> DeployOutcome:
        """Restore the pod template of the newest earlier revision with another Bento or image, as `kubectl rollout
        undo` does; twice restores the current one. If that fails or is interrupted, the current one is restored.

        Raises:
            KubeError: nothing is deployed, no such revision is kept, or it does not become ready.
        """
        self.cluster.check_permissions()
        self._current()
        with namespace_lock(self.cluster):
            return self._rollback()

    def _rollback(self) -> DeployOutcome:
        cluster, current = self.cluster, self._current()
        earlier = _find_previous(cluster, current)
        if earlier is None:
            raise KubeError(
                f"{cluster} has no revision of {NAME} before {revision(current)} with another Bento or image to roll "
                "back to"
            )
        cluster.outage_timeout = OUTAGE_TIMEOUT
        try:
            now = version_of(_roll_back_to(cluster, earlier, version_of(current)))
        except BaseException as error:  # also Ctrl-C
            logger.warning("the rollback failed, restoring revision %s", revision(current))
            if isinstance(error, UnavailableError):
                cluster.outage_timeout = 0.0  # the outage has lasted long enough
            state = _undo_rollback(cluster, current, version_of(earlier))
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

    def _replaceable(self) -> Manifest | None:
        """Return the Deployment that a deployment would change, if there is one."""
        deployment = self.cluster.get("Deployment")
        if deployment is not None:
            _check_scale(self.cluster, deployment)
            check_not_paused(self.cluster, deployment)
            container_of(deployment)  # raises for a Deployment of another tool
        return deployment

    def _current(self) -> Manifest:
        """Return the Deployment that a rollback would change."""
        current = self.cluster.get("Deployment")
        if current is None:
            raise KubeError(f"{self.cluster} has no Deployment {NAME}; there is nothing to roll back")
        check_not_paused(self.cluster, current)
        container_of(current)  # raises for a Deployment of another tool
        return current


def _check_scale(cluster: Cluster, deployment: Manifest) -> None:
    if deployment["spec"].get("replicas") == 0:
        raise KubeError(
            f"the Deployment in {cluster} is scaled to 0 replicas; run `kubectl scale deployment {NAME} "
            f"-n {cluster.namespace} --replicas=2` first"
        )


def _mark_verified(cluster: Cluster, version: Version) -> None:
    """Mark the Deployment as verified; raises SupersededError if it has another version."""

    def mark(live: Manifest) -> None:
        check_version(live, version)
        cluster.patch_deployment(verified_patch(live), live["metadata"]["resourceVersion"])

    _change_deployment(cluster, mark)


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
            error: KubeError = KubeError(f"the service is {model}, not {bento}: deploy.image contains another Bento")
        except UnavailableError as failure:
            error, start = failure, time.monotonic()
            cluster.get("Deployment")  # waits for the end of an outage, if it is the API server that is unavailable
            deadline += time.monotonic() - start
        except KubeError as failure:
            error = failure
        if time.monotonic() > deadline:
            raise error
        time.sleep(wait.POLL)


def _previous_version(cluster: Cluster, before: Manifest | None, version: Version) -> Version | None:
    """The version to which a rollback would return after this version is deployed."""
    if before is not None and is_version(before, version):
        before = _find_previous(cluster, before)
    return None if before is None else version_of(before)


def _find_previous(cluster: Cluster, current: Manifest) -> Manifest | None:
    """The newest verified ReplicaSet of this project before the current revision with another Bento or image."""
    running = version_of(current)
    for replica_set in reversed(cluster.replica_sets(current)):
        is_earlier = bool(bento_of(replica_set)) and revision(replica_set) < revision(current)
        if is_earlier and not is_version(replica_set, running) and not was_left_unverified(replica_set):
            return replica_set
    return None


def _running_image(cluster: Cluster, deployment: Manifest) -> str:
    """Return the digest of the running image as a node reports it; "" if no node reports it."""
    [newest] = cluster.replica_sets(deployment)[-1:]
    statuses = [status for pod in cluster.pods(newest) for status in pod["status"].get("containerStatuses", ())]
    return next((status["imageID"] for status in statuses if status["name"] == NAME and status.get("imageID")), "")


def _undo_rollout(
    cluster: Cluster, before: Manifest | None, version: Version, attempted: DeployOutcome
) -> DeployOutcome:
    """Undo the rollout of this version, which may not have started; return the outcome, whose reason is the state."""
    try:
        if before is None:
            _delete_deployment(cluster, version)
            state = "nothing was deployed before, and the Deployment was deleted"
            return replace(attempted, outcome="rolled_back", reason=state)
        number = revision(before)
        live = cluster.get("Deployment")
        if live is not None and live["spec"]["template"] == before["spec"]["template"]:
            state = f"revision {number} already ran before, so there is nothing to roll back to"
            return replace(attempted, outcome="failed", reason=state, revision=number)
        restored = _roll_back_to(cluster, before, version)
        for replica_set in cluster.replica_sets(restored):
            if number < revision(replica_set) < revision(restored) and is_version(replica_set, version):
                cluster.delete("ReplicaSet", replica_set["metadata"]["name"])  # so that no rollback selects it
        now = version_of(restored)
        state = f"rolled back to {now.image}, now revision {now.revision}"
        return replace(attempted, outcome="rolled_back", reason=state, revision=now.revision)
    except SupersededError as error:
        return replace(attempted, outcome="failed", reason=str(error))
    except KubeError as error:
        return replace(attempted, outcome="failed", reason=f"and it could not be rolled back: {error}")


def _undo_rollback(cluster: Cluster, current: Manifest, version: Version) -> str:
    """Undo a rollback to this version; return the resulting state in words."""
    image = version_of(current).image
    try:
        return f"{image} runs again, as revision {revision(_roll_back_to(cluster, current, version))}"
    except KubeError as error:
        return f"and {image} could not be restored: {error}"


def _roll_back_to(cluster: Cluster, earlier: Manifest, replaced: Version) -> Manifest:
    """Roll out the pod template of an earlier Deployment or of a ReplicaSet; return the resulting Deployment.

    Raises:
        SupersededError: the Deployment does not have the version to be replaced.
    """

    def patch(live: Manifest) -> None:
        check_version(live, replaced, version_of(earlier))  # the second if the response to the patch was lost
        cluster.patch_deployment(rollback_patch(live, earlier), live["metadata"]["resourceVersion"])

    if not _change_deployment(cluster, patch):
        raise KubeError(f"the Deployment in {cluster} was deleted")
    return wait_for_rollout(cluster, version_of(earlier))


def _delete_deployment(cluster: Cluster, version: Version) -> None:
    """Delete the Deployment if it exists; raises SupersededError if it has another version."""

    def delete(live: Manifest) -> None:
        check_version(live, version)
        cluster.delete("Deployment", version=live["metadata"]["resourceVersion"])

    _change_deployment(cluster, delete)


def _change_deployment(cluster: Cluster, change: Callable[[Manifest], None]) -> bool:
    """Apply a change that is refused if the Deployment is not as it was read; return False if there is none."""
    for _ in range(CHANGE_ATTEMPTS):
        live = cluster.get("Deployment")
        if live is None:
            return False
        try:
            change(live)
            return True
        except ConflictError:  # a controller wrote the status in between
            time.sleep(wait.POLL)
    raise KubeError(f"the Deployment in {cluster} changes too often to be changed")
