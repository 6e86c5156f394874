"""Checkpoints live in the artifact store: a killed step's successor goes on from them, on whatever machine."""

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
def kept_checkpoints(key: Any, log: Log) -> Iterator[tuple[Path, Log]]:
    """A directory where training with this key, of plain data, keeps its checkpoint; and the log it is to call.

    A folder of this machine as artifact store has the directory itself. Of any other the directory is a copy: what a
    killed run left is fetched first, and each call of the log sends a checkpoint that is new. When the block ends well,
    the checkpoint is removed.
    """
    store = Client().active_stack.artifact_store
    place = f"{store.path}/checkpoints/{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]}"
    if store.config.is_local:
        yield Path(place), log
    else:
        with TemporaryDirectory(prefix="checkpoints-") as directory, _copied(place, Path(directory), log) as copying:
            yield Path(directory), copying
    if fileio.exists(place):
        fileio.rmtree(place)


@contextmanager
def _copied(place: str, directory: Path, log: Log) -> Iterator[Log]:
    file, kept = directory / CHECKPOINT, f"{place}/{CHECKPOINT}"
    if fileio.exists(kept):
        fileio.copy(kept, str(file))
    sent = _written(file)

    def send() -> None:
        nonlocal sent
        if _written(file) != sent:
            sent = _written(file)
            fileio.makedirs(place)
            fileio.copy(str(file), kept, overwrite=True)  # an object store has it whole or not at all
            logger.debug("checkpoint sent to %s", kept)

    def log_and_send(step: int, values: Mapping[str, float]) -> None:
        log(step, values)
        send()

    try:
        yield log_and_send
    except BaseException:  # told to stop: what was learnt since the last call is not lost
        send()
        raise


def _written(file: Path) -> int | None:
    """When the file was last put there."""
    return file.stat().st_mtime_ns if file.is_file() else None
