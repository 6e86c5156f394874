"""Containers of this machine's engine, by the docker SDK: with no rights to spare, followed, never left behind."""

import codecs
import logging
import os
import signal
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import current_thread, main_thread
from typing import Any

import docker
from docker.errors import APIError, DockerException, ImageNotFound, NotFound
from docker.models.containers import Container
from docker.types import DeviceRequest

logger = logging.getLogger(__name__)

NAME = "gpt2-instruct"  # what names and labels of containers begin with
STOP_TIMEOUT = 10  # seconds from SIGTERM to SIGKILL
LAST_LINES = 30  # of a failed container's log, in the error


class EngineError(RuntimeError):
    """The engine, an image or a container does not do what a step needs; the message has the way out."""


def connect() -> docker.DockerClient:
    """The engine that DOCKER_HOST names, or the one at the usual socket.

    Raises:
        EngineError: none answers.
    """
    try:
        client = docker.from_env()
        client.ping()
    except DockerException as error:
        where = os.environ.get("DOCKER_HOST") or "the usual socket"
        raise EngineError(f"no Docker engine answers at {where}: start one, or set DOCKER_HOST ({error})") from None
    return client


def check_image(image: str) -> None:
    """Raises:
    EngineError: no engine answers, or it has no such image.
    """
    try:
        connect().images.get(image)
    except ImageNotFound:
        raise EngineError(f"the engine has no image {image}: `make image-train` builds gpt2-instruct-steps") from None


def run_arguments(
    *,
    environment: Mapping[str, str],
    writable: Sequence[Path],
    readable: Sequence[Path],
    network: str,
    memory: str | None,
) -> dict[str, Any]:
    """What `containers.run` takes for a step: our user, no capability, a root that cannot be written, all GPUs.

    Args:
        writable, readable: folders and files of this machine that the container sees at the same place.
        memory: e.g. "8g"; /tmp and /app, which live in memory, count. None: all there is.
    """
    for path in readable:
        if not path.is_absolute() or not path.exists():  # the engine would make a folder of it
            raise EngineError(f"mounts has {path}; name absolute paths that are there")
    modes = {**dict.fromkeys(readable, "ro"), **dict.fromkeys(writable, "rw")}
    return {
        "user": f"{os.getuid()}:{os.getgid()}",  # what the step writes to our folders is ours
        "read_only": True,
        "cap_drop": ["ALL"],
        "security_opt": ["no-new-privileges"],
        "init": True,  # a signal reaches the step, and the server that `package` starts leaves no zombie
        "tmpfs": {"/tmp": "mode=1777", "/app": "mode=1777"},  # ZenML unpacks the code in /app
        "volumes": {str(path): {"bind": str(path), "mode": mode} for path, mode in modes.items()},
        # nobody in the image has our number, so Python would not find a name and a home for it
        "environment": {"HOME": "/tmp", "LOGNAME": "step", **environment},
        "network_mode": network,
        "mem_limit": memory,
        "memswap_limit": memory,
        "pids_limit": 4096,
        "device_requests": [DeviceRequest(count=-1, capabilities=[["gpu"]])] if _has_gpus() else [],
    }


def _has_gpus() -> bool:
    return "nvidia" in connect().info().get("Runtimes", {})


def run_to_end(image: str, command: Sequence[str], arguments: Mapping[str, Any], run: str, step: str) -> None:
    """`start` and `follow`; whenever this process is told to stop, nothing is left.

    Raises:
        EngineError: as these two.
    """
    with _stopped_by_signals():
        try:
            follow(start(image, command, arguments, run, step))
        finally:
            remove(find(run, step))


def start(image: str, command: Sequence[str], arguments: Mapping[str, Any], run: str, step: str) -> Container:
    """Start a container for a step of a run; `follow` it, or `remove` it.

    Raises:
        EngineError: no engine, no such image, or the engine refuses the arguments.
    """
    check_image(image)
    try:
        return connect().containers.run(
            image,
            entrypoint=command[:1],
            command=command[1:],
            detach=True,
            name=f"{NAME}-{step}-{run[:8]}",
            labels={f"{NAME}.run": run, f"{NAME}.step": step},
            **arguments,
        )
    except APIError as error:
        raise EngineError(f"the engine starts no container of {image}: {error.explanation}") from None
    except BaseException:  # interrupted, perhaps after it had started
        remove(find(run, step))
        raise


def find(run: str, step: str) -> Container | None:
    """The container of a step, running or not."""
    labels = [f"{NAME}.run={run}", f"{NAME}.step={step}"]
    return next(iter(connect().containers.list(all=True, filters={"label": labels}, ignore_removed=True)), None)


def follow(container: Container) -> None:
    """Log what the container says until it ends, then remove it; also when this process is told to stop.

    Raises:
        EngineError: it ended otherwise than with exit code 0; with its last lines.
    """
    last: deque[str] = deque(maxlen=LAST_LINES)
    with _stopped_by_signals():
        try:
            for line in _lines(container.logs(stream=True, follow=True)):
                logger.info(line)
                last.append(line)
            code = container.wait()["StatusCode"]
            container.reload()
            killed_for_memory = container.attrs["State"]["OOMKilled"]
        except NotFound:
            code, killed_for_memory = "unknown, for somebody removed it", False
        finally:
            remove(container)
    if code != 0:
        reason = "; it needed more memory than it may have" if killed_for_memory else ""
        raise EngineError(
            f"the container {container.name} ended with exit code {code}{reason}. Its last lines:\n" + "\n".join(last)
        )


def remove(container: Container | None) -> None:
    """Stop it, in good time to record that it was stopped, and leave nothing of it."""
    if container is None:
        return
    with suppress(NotFound):
        container.stop(timeout=STOP_TIMEOUT)
        container.remove(force=True)


def _lines(chunks: Iterator[bytes]) -> Iterator[str]:
    decoder, rest = codecs.getincrementaldecoder("utf-8")("replace"), ""
    for chunk in chunks:
        *whole, rest = (rest + decoder.decode(chunk)).split("\n")
        yield from whole
    if rest:
        yield rest


@contextmanager
def _stopped_by_signals() -> Iterator[None]:
    """SIGTERM, where it would end this process at once, is an exception meanwhile, as SIGINT is."""

    def stop(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    ours = signal.getsignal(signal.SIGTERM) is signal.SIG_DFL and current_thread() is main_thread()
    if ours:
        signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        if ours:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
