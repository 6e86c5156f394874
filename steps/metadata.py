"""Metadata of artifacts, as the dashboard shows it."""

from collections.abc import Mapping
from typing import Any

from zenml import log_metadata


def describe(artifact: str, about: Mapping[str, Any]) -> None:
    """Attach what is known (values that are not None) to the running step's output of this name."""
    known = {key: value for key, value in about.items() if value is not None}
    log_metadata(metadata=known, artifact_name=artifact, infer_artifact=True)
