"""How typed lists are stored as artifacts.

ZenML 0.98 stores a dataclass as JSON by itself (its `DataclassMaterializer`: JSON in the dashboard, cached by content),
but a `list` of dataclasses as one directory per element.
"""

import hashlib
import json
from typing import Any, ClassVar

from zenml.enums import ArtifactType
from zenml.materializers.base_materializer import BaseMaterializer

from gpt2core.data import to_jsonl
from gpt2core.types import Sample


class SampleListMaterializer(BaseMaterializer):
    """`list[Sample]` as JSON lines, the content of samples.jsonl."""

    ASSOCIATED_TYPES: ClassVar[tuple[type, ...]] = (list,)
    ASSOCIATED_ARTIFACT_TYPE: ClassVar[ArtifactType] = ArtifactType.DATA
    SKIP_REGISTRATION: ClassVar[bool] = True  # other lists keep ZenML's own materializer; steps name this one

    def save(self, data: list[Sample]) -> None:
        with self.artifact_store.open(self._file, "wb") as stream:
            stream.write(_to_jsonl(data))

    def load(self, data_type: type[Any]) -> list[Sample]:
        with self.artifact_store.open(self._file, "rb") as stream:
            return [Sample.from_json(json.loads(line)) for line in stream]

    def compute_content_hash(self, data: list[Sample]) -> str:
        """Makes ZenML cache the steps that read the samples by content instead of by artifact id."""
        return hashlib.sha256(_to_jsonl(data)).hexdigest()

    @property
    def _file(self) -> str:
        return f"{self.uri}/samples.jsonl"


def _to_jsonl(samples: list[Sample]) -> bytes:
    return to_jsonl([sample.to_json() for sample in samples])
