"""The protocol of deploy targets, and the outcome of a deployment.

To add a target: add its name to `DeployConfig.target`, implement `Target`, and return it in `deploy/targets.py`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from gpt2core.types import JsonDataclass, Lineage, Sample


class DeployError(RuntimeError):
    """A deployment or rollback that failed; the message says what to do. The previous version keeps serving."""


@dataclass(frozen=True)
class Version(JsonDataclass):
    """A deployed version of the service."""

    bento: str  # tag; "" if it is unknown
    image: str
    revision: int | None = None  # revision of the Kubernetes Deployment


@dataclass(frozen=True)
class Deployment(JsonDataclass):
    """The outcome of a deployment or a rollback.

    outcome: "none" (the Bento stays in the Bento store), "deployed", "unchanged" (the Bento already ran), "rolled_back"
        (to `previous`, or to no version after a first deployment), or "failed" (the previous version could not be
        restored, or there was nothing to roll back).
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


class DeployInterrupted(DeployError):
    """A deployment that was interrupted and, if possible, undone. Its cause is the interrupt.

    Attributes:
        deployment: the outcome, which the caller records before it re-raises the cause.
    """

    def __init__(self, deployment: Deployment) -> None:
        super().__init__(deployment.reason)
        self.deployment = deployment


class Target(Protocol):
    """Where a Bento is deployed to. Implementations verify a new version, and keep the previous one if it fails."""

    def deploy(self, lineage: Lineage, samples: Sequence[Sample], max_new_tokens: int) -> Deployment:
        """Serve the Bento that the lineage names; safe to repeat.

        Args:
            samples: test records whose `tuned` answers the service must reproduce (`deploy.verify`).

        Raises:
            DeployError: nothing was changed.
            DeployInterrupted: the deployment was interrupted. Its outcome says whether the previous version serves.
        """

    def rollback(self) -> Deployment:
        """Serve the previous version again.

        Raises:
            DeployError: there is no such version, or it did not become ready.
        """

    def describe(self) -> Version | None:
        """Return the version that currently serves users; None if there is none."""
