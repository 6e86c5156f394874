from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from tempfile import mkdtemp
from typing import Annotated

from zenml import ArtifactConfig, step
from zenml.enums import ArtifactType

from gpt2core.demo.base import make_base
from steps.adapters.base import write_base
from steps.adapters.hub import fetch_base
from steps.adapters.progress import progress
from steps.cache import code_of
from steps.checkpoints import kept_checkpoints
from steps.config import BaseConfig
from steps.metadata import describe


@step(cache_policy=code_of(__name__))
def prepare_base(
    base: BaseConfig, n_facts: int | None, seed: int
) -> Annotated[Path, ArtifactConfig(name="base", artifact_type=ArtifactType.MODEL)]:
    """A directory with the base: the nano model pretrained here, or a reference to one of the hub."""
    directory = Path(mkdtemp(prefix="base-"))
    if base.source == "hub":
        about: Mapping[str, str | int | float] = fetch_base(base.name, base.revision)
    else:
        pretrain = base.pretrain if base.source == "nano" else None
        with (
            progress("pretrain", base.pretrain.max_steps) as log,
            kept_checkpoints([asdict(base), n_facts, seed], log) as (checkpoints, log),
        ):
            about = make_base(base.name, pretrain, seed, n_facts, directory, log, checkpoints)
    write_base(directory, about)
    describe("base", {"source": base.source, **about})
    return directory
