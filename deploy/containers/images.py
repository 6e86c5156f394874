"""Images, built by the local container engine from the two Dockerfiles, each with an SBOM (CycloneDX) beside it."""

import hashlib
import io
import logging
import os
import tarfile
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import BinaryIO

import docker
from docker.errors import DockerException, ImageNotFound
from docker.models.containers import Container
from requests import RequestException

from deploy import bento
from deploy.source import describe_commit
from gpt2core.types import Commit

logger = logging.getLogger(__name__)

ROOT = Path(__file__).parent.parent.parent
STEPS_FILES = ("Dockerfile", "pyproject.toml", "constraints.txt")
BUILD_ARGS = (
    "BASE_IMAGE",
    "BUILD_IMAGE",
    "TORCH_INDEX",
)  # of the environment: about this machine, no run
BUILD_NETWORK = "BUILD_NETWORK"
TIMEOUT = 1800  # seconds without a word from the engine, as while pip installs
SBOM = "/opt/venv/sbom.cdx.json"


class EngineError(RuntimeError):
    """A container engine that does not answer, or that could not do what it was asked."""


@dataclass(frozen=True)
class Image:
    reference: str  # name:tag
    digest: str  # the engine's id: sha256 of the configuration, which names the layers
    sbom: bytes  # CycloneDX, JSON


@contextmanager
def engine() -> Iterator[docker.DockerClient]:
    """The engine at DOCKER_HOST, or at its usual socket.

    Raises:
        EngineError: none answers, or what is asked of it in the block fails.
    """
    try:
        client = docker.from_env(timeout=TIMEOUT)
    except DockerException as error:
        host = os.environ.get("DOCKER_HOST", "/var/run/docker.sock")
        raise EngineError(
            f"no container engine answers at {host} ({error}); start Docker, or set DOCKER_HOST to where it listens"
        ) from None
    try:
        yield client
    except (DockerException, RequestException) as error:
        raise EngineError(f"the container engine could not do it: {error}") from None
    finally:
        client.close()


def read_file(container: Container, path: str) -> bytes:
    """A file of a container, which need not run.

    Raises:
        docker.errors.NotFound: there is none.
    """
    chunks, _ = container.get_archive(path)
    with tarfile.open(fileobj=io.BytesIO(b"".join(chunks))) as archive:
        file = archive.extractfile(Path(path).name)
        assert file is not None, f"{path} is no file"
        return file.read()


def service_image(tag: str) -> Image:
    """The image of a Bento; it is built unless the engine has it."""
    with engine() as client:
        try:
            return _image(client, tag)
        except ImageNotFound:
            return build_service(tag)


def build_service(tag: str) -> Image:
    """Build the image of a Bento, called as the Bento is, and `latest`.

    Raises:
        EngineError: with the last lines of the build.
        BentoError: the store has no such Bento.
    """
    lineage = bento.lineage(tag)
    labels = {
        **_labels(bento.NAME, tag.partition(":")[2], lineage.commit),
        "gpt2-instruct.run-id": lineage.run.id,
        "gpt2-instruct.run-name": lineage.run.name,
        "gpt2-instruct.adapter-sha256": lineage.adapter.sha256,
    }
    with TemporaryDirectory() as directory:
        exported = Path(directory, "bento.tar")
        bento.export(tag, exported)
        with exported.open("rb") as context:
            return _build(context, "src/bentos/Dockerfile", tag, labels)


def pinned(reference: str) -> str:
    """An image's reference by digest, as this machine's engine pushed or pulled it.

    It stays as it is where no registry gave it a digest, or no engine knows it: an image that was only loaded into a
    cluster's nodes has none.
    """
    if "@" in reference:
        return reference
    try:
        with engine() as client:
            digests = client.images.get(reference).attrs["RepoDigests"]
    except EngineError:
        return reference
    name = reference.rpartition(":")[0]
    return next((digest for digest in digests if digest.startswith(f"{name}@")), reference)


def build_steps() -> Image:
    """Build the image that pipeline steps run in, tagged by the content of what it is made from, and `latest`.

    Raises:
        EngineError: with the last lines of the build.
    """
    context, content = io.BytesIO(), hashlib.sha256()
    with tarfile.open(fileobj=context, mode="w") as archive:
        for name in STEPS_FILES:
            archive.add(ROOT / name, name, filter=_without_time)
            content.update((ROOT / name).read_bytes())
    context.seek(0)
    name, version = f"{bento.NAME}-steps", content.hexdigest()[:16]
    return _build(context, "Dockerfile", f"{name}:{version}", _labels(name, version, describe_commit()))


def _labels(title: str, version: str, commit: Commit) -> dict[str, str]:
    return {
        "org.opencontainers.image.title": title,
        "org.opencontainers.image.version": version,
        "org.opencontainers.image.revision": commit.sha + ("-dirty" if commit.dirty else ""),
        "org.opencontainers.image.licenses": "Apache-2.0",
    }


def _build(context: BinaryIO, dockerfile: str, tag: str, labels: Mapping[str, str]) -> Image:
    with engine() as client:
        log: deque[str] = deque(maxlen=40)
        for event in client.api.build(
            fileobj=context,
            custom_context=True,
            dockerfile=dockerfile,
            tag=tag,
            labels=dict(labels),
            buildargs={name: os.environ[name] for name in BUILD_ARGS if name in os.environ},
            network_mode=os.environ.get(BUILD_NETWORK),
            rm=True,
            forcerm=True,
            decode=True,
        ):
            lines = str(event.get("stream", event.get("error", ""))).strip().splitlines()
            log.extend(lines)
            for line in lines:
                logger.debug(line)
            if "error" in event:
                raise EngineError(f"{tag} could not be built from {dockerfile} ({_arguments()}):\n" + "\n".join(log))
        client.images.get(tag).tag(tag.partition(":")[0], "latest")
        return _image(client, tag)


def _arguments() -> str:
    """What a build of this environment differs in, for its error."""
    given = [f"{name}={os.environ[name]}" for name in (*BUILD_ARGS, BUILD_NETWORK) if name in os.environ]
    return " ".join(given) or "BASE_IMAGE= and TORCH_INDEX= choose another base and another source of torch"


def _image(client: docker.DockerClient, tag: str) -> Image:
    """An image that the engine has; its SBOM is taken out of it."""
    image = client.images.get(tag)
    container = client.containers.create(image)  # it is not run
    try:
        content = read_file(container, SBOM)
    finally:
        container.remove()
    return Image(tag, image.id, content)


def _without_time(entry: tarfile.TarInfo) -> tarfile.TarInfo:
    """The engine's cache goes by content, mode and owner."""
    entry.mtime, entry.uid, entry.gid, entry.uname, entry.gname = 0, 0, 0, "", ""
    return entry
