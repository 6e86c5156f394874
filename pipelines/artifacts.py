"""Whether what earlier runs stored is still there."""

from zenml.io import fileio
from zenml.models import ArtifactVersionResponse

from deploy import bento


def is_intact(name: str, artifact: ArtifactVersionResponse) -> bool:
    """Whether the store has as many bytes of the artifact as were written; for a Bento, whether its store has it."""
    if name == "bento" and not bento.exists(str(artifact.run_metadata.get("tag"))):
        return False
    written = artifact.run_metadata.get("storage_size")
    return written is None or _size(artifact.uri) == written


def _size(uri: str) -> int:
    """Bytes of all files below the directory, like ZenML's `storage_size`; 0 if it does not exist."""
    if not fileio.exists(uri):
        return 0
    if not fileio.isdir(uri):
        return int(fileio.size(uri) or 0)
    return sum(_size(f"{uri}/{name}") for name in fileio.listdir(uri))
