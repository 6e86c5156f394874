"""Checks that the artifacts of cached steps are still stored and unchanged."""

from zenml.io import fileio
from zenml.models import ArtifactVersionResponse
from zenml.utils import source_utils

from deploy import bento
from steps.materializers import DirectoryMaterializer


def is_intact(name: str, artifact: ArtifactVersionResponse) -> bool:
    """Whether the store has the artifact as it was written, and for a Bento, whether BentoML's store has it intact."""
    if name == "bento" and not bento.is_intact(str(artifact.run_metadata.get("tag"))):
        return False
    written = artifact.run_metadata.get("storage_size")
    if written is not None and _size(artifact.uri) != written:
        return False
    return artifact.content_hash in (None, _content_hash(artifact))


def _content_hash(artifact: ArtifactVersionResponse) -> str | None:
    """Compute the digest of the stored artifact in the way in which ZenML did; "" if it cannot be read."""
    materializer = source_utils.load(artifact.materializer)(uri=artifact.uri)
    try:
        # the digest of a directory is that of its archive, so the archive is not unpacked
        value = None if isinstance(materializer, DirectoryMaterializer) else artifact.load()
        found: str | None = materializer.compute_content_hash(value)
    except Exception:  # decoders raise various exceptions for damaged bytes
        return ""
    return found


def _size(uri: str) -> int:
    """Return the size of all files below the directory, like ZenML's `storage_size`; 0 if it does not exist."""
    if not fileio.exists(uri):
        return 0
    if not fileio.isdir(uri):
        return int(fileio.size(uri) or 0)
    return sum(_size(f"{uri}/{name}") for name in fileio.listdir(uri))
