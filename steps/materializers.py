"""Materializers: how typed lists and directories are stored as artifacts.

ZenML 0.98 stores a dataclass as JSON by itself (its `DataclassMaterializer`: JSON in the dashboard, cached by content),
but a `list` of dataclasses as one directory per element.
"""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from shutil import rmtree
from tempfile import gettempdir, mkdtemp
from typing import Any, ClassVar

from zenml.enums import ArtifactType
from zenml.materializers import PathMaterializer
from zenml.materializers.base_materializer import BaseMaterializer

from gpt2core.data import to_jsonl
from gpt2core.files import naming_file
from gpt2core.types import Sample


class SampleListMaterializer(BaseMaterializer):
    """`list[Sample]` as JSON lines, the content of samples.jsonl."""

    ASSOCIATED_TYPES: ClassVar[tuple[type, ...]] = (list,)
    ASSOCIATED_ARTIFACT_TYPE: ClassVar[ArtifactType] = ArtifactType.DATA
    SKIP_REGISTRATION: ClassVar[bool] = True  # other lists use ZenML's materializer; steps must name this one

    def save(self, data: list[Sample]) -> None:
        with self.artifact_store.open(self._file, "wb") as stream:
            stream.write(_to_jsonl(data))

    def load(self, data_type: type[Any]) -> list[Sample]:
        with self.artifact_store.open(self._file, "rb") as stream:
            return [Sample.from_json(json.loads(line)) for line in stream]

    def compute_content_hash(self, data: list[Sample]) -> str:
        """Return the sha256 of the content, which ZenML then uses in cache keys instead of the artifact id."""
        return hashlib.sha256(_to_jsonl(data)).hexdigest()

    @property
    def _file(self) -> str:
        return f"{self.uri}/samples.jsonl"


@contextmanager
def output_directory(prefix: str) -> Iterator[Path]:
    """Context manager: create a temporary directory that a step returns. Deletes it if the block fails.

    The step's output must use `DirectoryMaterializer`, which stores the directory and then deletes it.
    """
    directory = Path(mkdtemp(prefix=prefix))
    try:
        yield directory
    except BaseException:
        rmtree(directory, ignore_errors=True)
        raise


class DirectoryMaterializer(PathMaterializer):
    """Stores a directory of `output_directory` as an archive, and deletes the directory."""

    SKIP_REGISTRATION: ClassVar[bool] = True

    def save(self, data: Path) -> None:
        try:
            super().save(data)
        finally:
            rmtree(data, ignore_errors=True)

    def load(self, data_type: type[Any]) -> Path:
        """
        Raises:
            ValueError: the stored archive differs from the one that was written.
            OSError: the temporary directory is full; names it and its free space.
        """
        actual = self.compute_content_hash(None)
        if self.expected_content_hash not in (None, actual):  # None: stored by an older version
            raise ValueError(
                f"{self._archive} is damaged: sha256 {actual}, but {self.expected_content_hash} was recorded; "
                "start the run again, which repeats the step that wrote it"
            )
        with naming_file(Path(gettempdir(), self.ARCHIVE_NAME)):  # where ZenML unpacks it
            return Path(super().load(data_type))

    def compute_content_hash(self, data: Path | None) -> str:
        """Return the sha256 of the archive. ZenML calls this after `save`, when the directory is deleted."""
        with self.artifact_store.open(self._archive, "rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()

    @property
    def _archive(self) -> str:
        return f"{self.uri}/{self.ARCHIVE_NAME}"


def _to_jsonl(samples: list[Sample]) -> bytes:
    return to_jsonl([sample.to_json() for sample in samples])
