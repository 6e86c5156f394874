"""A lock in the container engine, for all processes and machines that use the same engine.

The lock is a container with a fixed name, whose only process reads its standard input. The engine closes that input
when the holder's connection ends, also if the holder is killed. The container then ends, and anyone may remove it.
"""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from docker import DockerClient
from docker.errors import APIError, DockerException, NotFound
from docker.models.containers import Container
from requests import RequestException

from deploy.containers.client import EngineError, hardening
from deploy.target import LOCK_TIMEOUT

logger = logging.getLogger(__name__)

CREATED_TIMEOUT = 30  # seconds after which a container that was created but not started belongs to a killed process
POLL = 0.5  # seconds
CONFLICT = 409  # status of the engine: the name is in use
MEMORY = "16m"


@contextmanager
def engine_lock(client: DockerClient, name: str, image: str) -> Iterator[None]:
    """Context manager: hold the lock `name`; waits while another process holds it.

    Args:
        image: an image that the engine has and that has `cat`.

    Raises:
        EngineError: another process still holds it after `LOCK_TIMEOUT`.
    """
    container = _create(client, name, image)
    try:
        stdin = client.api.attach_socket(container.id, params={"stdin": 1, "stream": 1})
        try:
            container.start()
            yield
        finally:
            stdin.close()
    finally:
        with suppress(DockerException, RequestException):  # it has ended, so the next holder can remove it too
            container.remove(force=True)


def _create(client: DockerClient, name: str, image: str) -> Container:
    deadline = time.monotonic() + LOCK_TIMEOUT
    created_since: dict[str, float] = {}  # container ID -> when it was first seen in this state
    is_waiting = False
    while True:
        try:
            return client.containers.create(
                image,
                entrypoint=["cat"],
                name=name,
                stdin_open=True,
                network_mode="none",
                mem_limit=MEMORY,
                healthcheck={"test": ["NONE"]},
                **hardening(tmpfs={}, pids_limit=16),
            )
        except APIError as error:
            if error.status_code != CONFLICT:
                raise
        if time.monotonic() > deadline:
            raise EngineError(f"another deployment holds the lock {name} for {LOCK_TIMEOUT} seconds; retry later")
        with suppress(NotFound):
            holder = client.containers.get(name)
            if holder.status == "created":
                since = created_since.setdefault(holder.id, time.monotonic())
                is_stale = time.monotonic() - since > CREATED_TIMEOUT
            else:
                is_stale = holder.status in ("exited", "dead")
            if is_stale:
                with suppress(APIError):  # another process removed it
                    holder.remove()
            elif not is_waiting:
                logger.info("waiting for another deployment, which holds the lock %s", name)
                is_waiting = True
        time.sleep(POLL)
