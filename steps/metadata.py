"""Artifact metadata, which ZenML's dashboard shows."""

from collections.abc import Mapping
from typing import Any

from zenml import log_metadata, save_artifact


def describe(artifact: str, about: Mapping[str, Any]) -> None:
    """Attach the values that are not None to the running step's output of this name."""
    known = {key: value for key, value in about.items() if value is not None}
    log_metadata(metadata=known, artifact_name=artifact, infer_artifact=True)


def keep(artifact: str, content: dict[str, Any]) -> None:
    """Save an artifact with its content as metadata from outside a step's outputs: a failing step returns none."""
    save_artifact(content, artifact, user_metadata={key: value for key, value in content.items() if value is not None})
