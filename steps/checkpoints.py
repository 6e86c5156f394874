"""Training checkpoints in the artifact store, from which a step that was killed resumes on any machine."""

import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from uuid import uuid4

from zenml.client import Client
from zenml.io import fileio

from gpt2core.train import Log
from gpt2core.training_state import CHECKPOINT

logger = logging.getLogger(__name__)


TRAINING_ID = "training-id"


@dataclass(frozen=True)
class Checkpoints:
    """The directory of a training run's checkpoint. Every attempt to resume the run has the same `training_id`."""

    directory: Path
    training_id: str
    upload: Callable[[], None]

    def after(self, log: Log) -> Log:
        """Return a training callback that calls `log` and then uploads a new checkpoint."""

        def log_and_upload(step: int, values: Mapping[str, float]) -> None:
            log(step, values)
            self.upload()

        return log_and_upload


@contextmanager
def stored_checkpoints(key: Any) -> Iterator[Checkpoints]:
    """Context manager: yields the checkpoints of the training run with this key. Removes them if the block succeeds.

    If the artifact store is a local directory, checkpoints are written there. Otherwise they are written to a local
    directory, which starts with the checkpoint that a killed run uploaded.

    Args:
        key: JSON data that identifies the training; its digest names the directory in the store.
    """
    store = Client().active_stack.artifact_store
    uri = f"{store.path}/checkpoints/{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]}"
    training_id = _training_id(uri)
    if store.config.is_local:
        yield Checkpoints(Path(uri), training_id, upload=lambda: None)
    else:
        with TemporaryDirectory(prefix="checkpoints-") as directory, _copied(uri, Path(directory)) as upload:
            yield Checkpoints(Path(directory), training_id, upload)
    try:
        fileio.rmtree(uri)
    # a concurrent run with the same training has removed the directory (ZenML raises TypeError), or still writes to it
    except (OSError, TypeError) as error:
        logger.warning("the checkpoints of the finished training run were not removed: %s", error)


def _training_id(uri: str) -> str:
    file = f"{uri}/{TRAINING_ID}"
    if not fileio.exists(file):
        fileio.makedirs(uri)
        with fileio.open(file, "w") as stream:
            stream.write(uuid4().hex)
    with fileio.open(file, "r") as stream:
        return str(stream.read())


@contextmanager
def _copied(uri: str, directory: Path) -> Iterator[Callable[[], None]]:
    file, stored = directory / CHECKPOINT, f"{uri}/{CHECKPOINT}"
    if fileio.exists(stored):
        fileio.copy(stored, str(file))
    uploaded = _modified(file)

    def upload() -> None:
        nonlocal uploaded
        if _modified(file) != uploaded:
            uploaded = _modified(file)
            fileio.copy(str(file), stored, overwrite=True)  # atomic in an object store
            logger.debug("checkpoint uploaded to %s", stored)

    try:
        yield upload
    except BaseException:  # the run was stopped: keep the progress since the last upload
        upload()
        raise


def _modified(file: Path) -> int | None:
    """Return the modification time in ns; None if the file does not exist."""
    return file.stat().st_mtime_ns if file.is_file() else None
