"""The protocol of deploy targets, and the outcome of a deployment.

To add a target: add its name to `DeployConfig.target`, implement `Target`, and return it in `deploy/open_target.py`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from gpt2core.types import JsonDataclass, Lineage, Sample

LOCK_TIMEOUT = 900  # seconds in which another deployment or rollback of the same service must end


@dataclass(frozen=True)
class Version(JsonDataclass):
    """A deployed version of the service."""

    bento: str  # tag; "" if it is unknown
    image: str
    revision: int | None = None  # revision of the Kubernetes Deployment


@dataclass(frozen=True)
class DeployOutcome(JsonDataclass):
    """The outcome of a deployment or a rollback.

    outcome: "none" (the Bento stays in the Bento store), "deployed", "unchanged" (the Bento already ran), "rolled_back"
        (to `previous`, or to no version after a first deployment), or "failed" (the served version was not changed,
        or the previous one could not be restored).
    """

    target: str
    outcome: str
    bento: str
    reason: str = ""
    url: str = ""  # where users send requests, if the target knows it
    namespace: str = ""
    image: str = ""
    image_id: str = ""  # digest of the running image
    container: str = ""
    revision: int | None = None
    previous: Version | None = None


class DeployError(RuntimeError):
    """A deployment or rollback that failed; the message says what to do. The previous version keeps serving."""


class DeployFailed(DeployError):
    """A deployment that failed or was interrupted after the target had changed something, and was undone if possible.

    Attributes:
        outcome: "rolled_back" or "failed", for the record of deployments.
        interrupt: the exception that interrupted the deployment, which the caller raises again; None if it failed.
    """

    def __init__(self, outcome: DeployOutcome, interrupt: BaseException | None = None) -> None:
        super().__init__(f"{outcome.bento} was not deployed: {outcome.reason}")
        self.outcome = outcome
        self.interrupt = interrupt


class Target(Protocol):
    """Where a Bento is deployed to. Implementations verify a new version, and keep the previous one if it fails."""

    def preflight(self) -> None:
        """Check what can be known before a run: connection, permissions, settings. Changes nothing.

        Raises:
            DeployError: a deployment would be refused.
        """

    def deploy(self, lineage: Lineage, samples: Sequence[Sample], max_new_tokens: int) -> DeployOutcome:
        """Serve the Bento that the lineage names; safe to repeat. Returns only if it serves.

        Args:
            samples: test records whose `tuned` answers the service must reproduce (`deploy.verify`).

        Raises:
            DeployError: the served version was not changed.
            DeployFailed: the outcome says whether the previous version serves again.
        """

    def rollback(self) -> DeployOutcome:
        """Serve the previous version again.

        Raises:
            DeployError: there is no such version, or it did not become ready.
        """
