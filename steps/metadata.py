"""Metadata of artifacts, as the dashboard shows it."""

from collections.abc import Mapping
from typing import Any

from zenml import log_metadata, save_artifact


def describe(artifact: str, about: Mapping[str, Any]) -> None:
    """Attach what is known (values that are not None) to the running step's output of this name."""
    known = {key: value for key, value in about.items() if value is not None}
    log_metadata(metadata=known, artifact_name=artifact, infer_artifact=True)


def keep(artifact: str, content: dict[str, Any]) -> None:
    """Save an artifact whose metadata is its content, where there is no step to return it: one that fails, or none."""
    save_artifact(content, artifact, user_metadata={key: value for key, value in content.items() if value is not None})
