"""Artifact metadata, which ZenML's dashboard shows."""

from collections.abc import Mapping
from typing import Any

from zenml import log_metadata, save_artifact


def attach_metadata(artifact: str, about: Mapping[str, Any]) -> None:
    """Attach the values that are not None to the output `artifact` of the running step."""
    known = {key: value for key, value in about.items() if value is not None}
    log_metadata(metadata=known, artifact_name=artifact, infer_artifact=True)


def save_extra_artifact(artifact: str, content: dict[str, Any]) -> None:
    """Save an artifact that is no output, such as one of a failed step. Its content is also its metadata."""
    save_artifact(content, artifact, user_metadata={key: value for key, value in content.items() if value is not None})
