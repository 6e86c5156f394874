"""The client of the local container engine: connection, error translation, hardening and files of containers."""

import io
import os
import socket
import tarfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import urlsplit

import docker
from docker.context import Context, ContextAPI
from docker.context.config import get_current_context_name
from docker.errors import DockerException, ImageNotFound, NotFound
from docker.models.containers import Container
from requests import RequestException

TIMEOUT = 60  # seconds without a byte from the engine; log streams have no limit


class EngineError(RuntimeError):
    """The container engine does not respond or rejected an operation, or a container failed; the message says why."""


@contextmanager
def connect(timeout: int = TIMEOUT) -> Iterator[docker.DockerClient]:
    """Connect to the engine that the command `docker` uses: at DOCKER_HOST, or that of the Docker context.

    Raises:
        EngineError: no engine responds, or an operation in the block fails.
    """
    host = os.environ.get("DOCKER_HOST")
    context = None if host else _context()
    try:
        if context is None:
            client = docker.from_env(timeout=timeout)
        else:
            host = f"{context.Host} (Docker context {context.Name})"
            client = docker.DockerClient(base_url=context.Host, tls=context.TLSConfig or False, timeout=timeout)
        client.ping()
    except (DockerException, RequestException) as error:
        raise EngineError(
            f"no container engine responds at {host} ({error}); start Docker, or set DOCKER_HOST to its address"
        ) from None
    try:
        yield client
    except (DockerException, RequestException) as error:
        raise EngineError(f"the container engine reports: {error}") from None
    finally:
        client.close()


def _context() -> Context:
    """Return the context that DOCKER_CONTEXT names, or else the one that `docker context use` selected."""
    name = os.environ.get("DOCKER_CONTEXT") or get_current_context_name()
    try:
        context = ContextAPI.get_context(name)
    except Exception as error:  # docker 7.1 raises Exception if the file is damaged
        raise EngineError(f"the Docker context {name} cannot be read: {error}") from None
    if context is None:
        raise EngineError(f"there is no Docker context {name}; `docker context ls` lists the contexts")
    return context


def is_local(client: docker.DockerClient) -> bool:
    """Whether the engine is on this machine, which then reaches the ports that containers publish."""
    url = urlsplit(client.api.base_url)
    if url.scheme == "http+docker":  # docker's client replaces the address of a Unix socket or of an SSH connection
        return url.hostname != "ssh"
    host = url.hostname or ""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        socket.create_server((host, 0), family=family).close()
    except OSError:  # not an address of this machine, or not a known name
        return False
    return True


def hardening(tmpfs: Mapping[str, str], pids_limit: int) -> dict[str, Any]:
    """Arguments of `containers.run` for every container of this project.

    Args:
        tmpfs: path -> mount options. Only these paths and volumes are writable.
    """
    return {
        "read_only": True,
        "cap_drop": ["ALL"],
        "security_opt": ["no-new-privileges"],
        "tmpfs": dict(tmpfs),
        "pids_limit": pids_limit,
    }


def require_image(client: docker.DockerClient, image: str) -> None:
    """
    Raises:
        EngineError: the engine does not have the image.
    """
    try:
        client.images.get(image)
    except ImageNotFound:
        raise EngineError(f"the engine has no image {image}: `make image-train` builds gpt2-instruct-steps") from None


def find_container(client: docker.DockerClient, name: str) -> Container | None:
    """Return the container with this name; None if there is none."""
    try:
        return client.containers.get(name)
    except NotFound:
        return None


def read_file(container: Container, path: str) -> bytes:
    """Read a file of a container, running or not.

    Raises:
        docker.errors.NotFound: the container has no such file.
    """
    chunks, _ = container.get_archive(path)
    with tarfile.open(fileobj=io.BytesIO(b"".join(chunks))) as archive:
        file = archive.extractfile(PurePosixPath(path).name)
        assert file is not None, f"{path} is not a file"
        return file.read()


def write_file(container: Container, path: str, content: bytes) -> None:
    """Write a file of a container, running or not.

    Raises:
        EngineError: the engine did not write it.
    """
    entry = tarfile.TarInfo(PurePosixPath(path).name)
    entry.size = len(content)
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        tar.addfile(entry, io.BytesIO(content))
    if not container.put_archive(str(PurePosixPath(path).parent), archive.getvalue()):
        raise EngineError(f"the engine did not write {path} in the container {container.name}")
