"""Training checkpoints in the artifact store: a step that was killed resumes from there, on any machine."""

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from zenml.client import Client
from zenml.io import fileio

from gpt2core.train import Log
from gpt2core.training_state import CHECKPOINT

logger = logging.getLogger(__name__)


@contextmanager
def stored_checkpoints(key: Any, log: Log) -> Iterator[tuple[Path, Log]]:
    """A directory for the checkpoint of the training with this key, and the log callback that training must call.

    If the artifact store is a local directory, the checkpoint is written there. Otherwise the directory is a local
    copy: it starts with what a killed run uploaded, and each call of the log uploads a new checkpoint. The checkpoint
    is removed when the block succeeds.

    Args:
        key: JSON data that identifies the training; its digest names the directory.
    """
    store = Client().active_stack.artifact_store
    place = f"{store.path}/checkpoints/{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]}"
    if store.config.is_local:
        yield Path(place), log
    else:
        with (
            TemporaryDirectory(prefix="checkpoints-") as directory,
            _copied(place, Path(directory), log) as log_and_upload,
        ):
            yield Path(directory), log_and_upload
    if fileio.exists(place):
        fileio.rmtree(place)


@contextmanager
def _copied(place: str, directory: Path, log: Log) -> Iterator[Log]:
    file, stored = directory / CHECKPOINT, f"{place}/{CHECKPOINT}"
    if fileio.exists(stored):
        fileio.copy(stored, str(file))
    uploaded = _modified(file)

    def upload() -> None:
        nonlocal uploaded
        if _modified(file) != uploaded:
            uploaded = _modified(file)
            fileio.makedirs(place)
            fileio.copy(str(file), stored, overwrite=True)  # atomic in an object store
            logger.debug("checkpoint uploaded to %s", stored)

    def log_and_upload(step: int, values: Mapping[str, float]) -> None:
        log(step, values)
        upload()

    try:
        yield log_and_upload
    except BaseException:  # keeps the progress since the last call when the run is stopped
        upload()
        raise


def _modified(file: Path) -> int | None:
    """Modification time in ns; None if there is no file."""
    return file.stat().st_mtime_ns if file.is_file() else None
