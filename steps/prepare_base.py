"""Provides the base. A model of the hub stays a reference: its weights are not in the artifact store."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

from zenml import ArtifactConfig, step
from zenml.enums import ArtifactType

from gpt2core.demo.base import make_base
from gpt2core.types import BaseRef
from steps.adapters.base import Figures, write_base
from steps.adapters.hub import fetch_base
from steps.adapters.progress import training_progress
from steps.cache import code_of
from steps.checkpoints import stored_checkpoints
from steps.config import BaseConfig
from steps.materializers import DirectoryMaterializer, output_directory
from steps.metadata import attach_metadata


@step(cache_policy=code_of(__name__), output_materializers={"base": DirectoryMaterializer})
def prepare_base(
    base: BaseConfig, n_facts: int | None, seed: int, base_sha256: str = ""
) -> Annotated[Path, ArtifactConfig(name="base", artifact_type=ArtifactType.MODEL)]:
    """Return the base: a directory with a model that is made here, or with a reference to a model of the hub.

    Args:
        base_sha256: see `BaseConfig.resolved`.
    """
    with output_directory("base-") as directory:
        figures: Figures
        if base.source == "hub":
            fetched = fetch_base(BaseRef(base.name, base.revision, base_sha256))
            ref, figures = fetched.ref, {"path": str(fetched.path)}
        else:
            figures = _make(base, n_facts, seed, directory)
            ref = BaseRef.from_json(figures)
        write_base(directory, ref, figures)
    attach_metadata("base", {"source": base.source, **figures, **ref.to_json()})
    return directory


def _make(base: BaseConfig, n_facts: int | None, seed: int, directory: Path) -> Figures:
    with (
        stored_checkpoints([asdict(base), n_facts, seed]) as checkpoints,
        training_progress("pretrain", base.pretrain.max_steps) as log,
    ):
        pretrain = base.pretrain if base.source == "nano" else None
        log = checkpoints.after(log)
        return make_base(base.name, pretrain, seed, n_facts, directory, log, checkpoints.directory)
