"""A pipeline run in ZenML's store, with the metadata of its artifacts."""

from functools import cached_property
from typing import Any

from zenml.client import Client
from zenml.models import PipelineRunResponse

from gpt2core.data import Split
from gpt2core.types import Lineage


class TracedRun:
    """A run and its artifacts. A cached step has the artifacts of an earlier run."""

    def __init__(self, run: PipelineRunResponse) -> None:
        self.run = run
        outputs = [step.outputs.items() for step in run.steps.values()]
        self.artifacts = {name: versions[0] for step in outputs for name, versions in step if versions}

    def metadata(self, artifact: str, key: str) -> Any:
        """Return a value of an artifact's metadata; "" if the run did not produce the artifact."""
        return self.artifacts[artifact].run_metadata.get(key, "") if artifact in self.artifacts else ""

    @cached_property
    def data(self) -> tuple[str, ...]:
        """The sha256 of train, validation and test records."""
        return tuple(str(self.metadata(f"{part}_records", "sha256")) for part in Split._fields)

    @cached_property
    def lineage(self) -> Lineage | None:
        """The /metadata response of the run's Bento; None if the run did not build a Bento."""
        lineage = self.artifacts["lineage"].load() if "lineage" in self.artifacts else None
        # runs of earlier versions stored the JSON object
        return Lineage.from_json(lineage) if isinstance(lineage, dict) else lineage

    @cached_property
    def model_versions(self) -> list[str]:
        """The names of the model version: by number and, if it is in a stage, by stage."""
        version = self.run.model_version
        if version is None:
            return []
        return [f"{version.model.name}/{name}" for name in (version.name, version.stage) if name]

    @cached_property
    def names(self) -> dict[str, str]:
        """All names that refer to this run, and their kinds; empty if the run did not split data."""
        digests = dict(zip(self.data, Split._fields, strict=True))
        if not any(digests):
            return {}
        names = {digest: f"{part} records" for digest, part in digests.items()}
        names |= {str(self.metadata("adapter", "sha256")): "adapter", str(self.metadata("bento", "tag")): "Bento"}
        names |= dict.fromkeys(self.model_versions, "model version")
        names |= {self.run.name: "run", str(self.run.id): "run id"}
        names.pop("", None)
        return names

    def cached_from(self, step: str) -> str:
        """Return the id of the run that computed a cached step; "" if this run computed it."""
        original = self.run.steps[step].original_step_run_id
        return "" if original is None else str(Client().get_run_step(original).pipeline_run_id)
