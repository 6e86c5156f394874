"""Containers of pipeline steps: start one, forward its log, and remove it even if this process is interrupted."""

import codecs
import logging
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from docker import DockerClient
from docker.errors import APIError, NotFound
from docker.models.containers import Container
from docker.types import DeviceRequest

from deploy.containers.client import EngineError, connect, hardening, require_image
from deploy.signals import handling_signals
from gpt2core.types import NAME

logger = logging.getLogger(__name__)

STOP_TIMEOUT = 10  # seconds from SIGTERM to SIGKILL; enough for ZenML to record that the step was stopped
LAST_LINES = 30  # lines of a failed container's log in its error


@dataclass(frozen=True)
class StepContainer:
    """The container of one step of a pipeline run: its command, and the paths of this machine that it can access.

    writable, readable: absolute paths of this machine, mounted at the same path.
    memory: limit, such as "8g". /tmp and /app are in memory and count towards it. None: no limit.
    """

    image: str
    command: Sequence[str]
    run_id: str
    step: str
    environment: Mapping[str, str] = field(default_factory=dict)
    writable: Sequence[Path] = ()
    readable: Sequence[Path] = ()
    network: str = "none"
    memory: str | None = None


def run(step: StepContainer) -> None:
    """Start the step's container, forward its log until it ends, and remove it.

    Raises:
        EngineError: see `start`; or the exit code is not 0. The message then has the last lines of the log.
    """
    with _interruptions(), connect() as client:
        try:
            _follow(_start(client, step))
        finally:
            _remove(_find(client, step.run_id, step.step))


def start(step: StepContainer) -> None:
    """Start the step's container in the background.

    Raises:
        EngineError: there is no engine or no such image, a path to mount does not exist, or the engine fails.
    """
    with connect() as client:
        _start(client, step)


def follow(run_id: str, step: str) -> None:
    """Forward the log of the step's container until it ends, and remove it. Does nothing if there is no container.

    Raises:
        EngineError: the exit code is not 0. The message has the last lines of the log.
    """
    with connect() as client:
        container = _find(client, run_id, step)
        if container is not None:
            _follow(container)


def is_running(run_id: str, step: str) -> bool:
    with connect() as client:
        container = _find(client, run_id, step)
        return container is not None and container.status in ("created", "running")


def remove(run_id: str, step: str) -> None:
    """Stop and remove a step's container, if there is one."""
    with connect() as client:
        _remove(_find(client, run_id, step))


def remove_run(run_id: str) -> None:
    """Stop and remove all containers of a killed run. No effect without an engine."""
    with suppress(EngineError), connect() as client:
        label = f"{NAME}.run={run_id}"
        for container in client.containers.list(all=True, filters={"label": label}, ignore_removed=True):
            logger.warning("removing the container %s of a killed run", container.name)
            _remove(container)


def _start(client: DockerClient, step: StepContainer) -> Container:
    require_image(client, step.image)
    arguments = run_arguments(step, has_gpus="nvidia" in client.info().get("Runtimes", {}))
    try:
        return client.containers.run(
            step.image,
            entrypoint=step.command[:1],
            command=step.command[1:],
            detach=True,
            name=f"{NAME}-{step.step}-{step.run_id[:8]}",
            labels={f"{NAME}.run": step.run_id, f"{NAME}.step": step.step},
            **arguments,
        )
    except APIError as error:
        raise EngineError(f"cannot start a container from {step.image}: {error.explanation}") from None
    except BaseException:  # interrupted, perhaps after the container started
        _remove(_find(client, step.run_id, step.step))
        raise


def run_arguments(step: StepContainer, has_gpus: bool) -> dict[str, Any]:
    """Return the arguments of `containers.run`: hardening, this process's user, the mounts and every GPU.

    Raises:
        EngineError: a path to mount is relative or does not exist. The engine would create a directory there.
    """
    for path in step.readable:
        if not path.is_absolute() or not path.exists():
            raise EngineError(f"mounts has {path}, which must be an absolute path of an existing file or directory")
    modes = {**dict.fromkeys(step.readable, "ro"), **dict.fromkeys(step.writable, "rw")}
    return {
        # ZenML unpacks the code in /app
        **hardening(tmpfs={"/tmp": "mode=1777", "/app": "mode=1777"}, pids_limit=4096),
        "user": f"{os.getuid()}:{os.getgid()}",  # owns the files that the step writes to mounts
        "init": True,  # forwards signals to the step, and reaps the server processes that `package` starts
        "volumes": {str(path): {"bind": str(path), "mode": mode} for path, mode in modes.items()},
        # the image has no passwd entry for this user, so Python needs its name and home directory
        "environment": {"HOME": "/tmp", "LOGNAME": "step", **step.environment},
        "network_mode": step.network,
        "mem_limit": step.memory,
        "memswap_limit": step.memory,
        "device_requests": [DeviceRequest(count=-1, capabilities=[["gpu"]])] if has_gpus else [],
    }


def _find(client: DockerClient, run_id: str, step: str) -> Container | None:
    labels = [f"{NAME}.run={run_id}", f"{NAME}.step={step}"]
    return next(iter(client.containers.list(all=True, filters={"label": labels}, ignore_removed=True)), None)


def _follow(container: Container) -> None:
    last: deque[str] = deque(maxlen=LAST_LINES)
    with _interruptions() as check:
        try:
            for line in log_lines(container.logs(stream=True, follow=True)):
                logger.info(line)
                last.append(line)
                check()
            code = container.wait()["StatusCode"]
            container.reload()
            out_of_memory = container.attrs["State"]["OOMKilled"]
        except NotFound:
            code, out_of_memory = "unknown (the container was removed)", False
        finally:
            _remove(container)
    if code != 0:
        reason = "; it exceeded its memory limit" if out_of_memory else ""
        raise EngineError(
            f"the container {container.name} ended with exit code {code}{reason}. Its last lines:\n" + "\n".join(last)
        )


def _remove(container: Container | None) -> None:
    if container is None:
        return
    with suppress(NotFound):
        container.stop(timeout=STOP_TIMEOUT)
        container.remove(force=True)


def log_lines(chunks: Iterator[bytes]) -> Iterator[str]:
    """Yield the lines of a UTF-8 stream. Its chunks may end within a line or within a character."""
    decoder, rest = codecs.getincrementaldecoder("utf-8")("replace"), ""
    for chunk in chunks:
        *whole, rest = (rest + decoder.decode(chunk)).split("\n")
        yield from whole
    if rest:
        yield rest


@contextmanager
def _interruptions() -> Iterator[Callable[[], None]]:
    """Context manager: signals raise KeyboardInterrupt in the block (see `handling_signals`).

    Yields a function that raises KeyboardInterrupt if a signal has arrived. It also runs at the end of the block. It is
    needed because Python ignores a signal handler's exception in some places, for example in a destructor that the
    garbage collector calls.
    """
    arrived = False

    def handle(number: int, frame: Any, previous: Any) -> None:
        nonlocal arrived
        arrived = True
        if callable(previous):  # the handler of the caller, or of ZenML
            previous(number, frame)
        raise KeyboardInterrupt

    def check() -> None:
        if arrived:
            raise KeyboardInterrupt

    with handling_signals(handle):
        yield check
        check()
