"""Builds and looks up the images of the service and of pipeline steps. Each image has an SBOM."""

import hashlib
import io
import logging
import os
import re
import tarfile
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import BinaryIO

import docker
from docker.errors import APIError, ImageNotFound
from docker.utils import parse_repository_tag

from deploy import bento
from deploy.containers.client import EngineError, connect, read_file
from deploy.source import ROOT, describe_commit
from gpt2core.types import NAME, Commit

logger = logging.getLogger(__name__)

STEPS_FILES = (
    "Dockerfile",
    "pyproject.toml",
    "constraints.txt",
    "requirements-hashed.txt",
    "setup.py",
    *(f"gpt2core/inference/{name}" for name in ("native.c", "vectors.h", "avx512.h", "avx2.h")),
)
# Environment variables that depend on the build machine; they are not part of a run configuration.
BUILD_ARGS = ("BASE_IMAGE", "BUILD_IMAGE", "TORCH_INDEX")
BUILD_NETWORK = "BUILD_NETWORK"
BUILD_TIMEOUT = 1800  # seconds without a byte from the engine; it is silent while pip installs
LOG_LINES = 40  # lines of a failed build's log in its error
SBOM = "/opt/venv/sbom.cdx.json"  # in both images


@dataclass(frozen=True)
class Image:
    reference: str  # name:tag
    digest: str  # the engine's image ID: sha256 of the image configuration, which names the layers
    sbom: bytes  # CycloneDX, JSON


def service_image(tag: str) -> Image:
    """Return the image of a Bento. Builds it if the engine does not have it.

    Raises:
        EngineError, BentoError: see `build_service`.
    """
    with connect(BUILD_TIMEOUT) as client:
        try:
            return _image(client, tag)
        except ImageNotFound:
            return build_service(tag)


def build_service(tag: str) -> Image:
    """Build the image of a Bento, with the Bento's name and tag, and tag it `latest` too.

    Raises:
        EngineError: the build failed. The message has the last lines of its log.
        BentoError: the store has no such Bento.
    """
    lineage = bento.lineage(tag)
    labels = {
        **_labels(NAME, tag.partition(":")[2], lineage.commit),
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
    """Replace the tag of an image reference by its registry digest, so that the tag cannot move to another image.

    This requires that the local engine has the image and that its registry confirms the digest. Otherwise, for example
    if the image was loaded into the cluster's nodes without a registry, the reference is returned unchanged.
    """
    if "@" in reference:
        return reference
    name, _ = parse_repository_tag(reference)
    with suppress(EngineError), connect() as client:
        for digest in client.images.get(reference).attrs["RepoDigests"]:
            candidate = f"{name}@{digest.partition('@')[2]}"
            with suppress(APIError):  # engines with containerd's image store list a digest of images never pushed, too
                client.api.inspect_distribution(candidate)
                return candidate
    return reference


def build_steps() -> Image:
    """Build the image that pipeline steps run in. Its tags are a digest of its sources, and `latest`.

    Raises:
        EngineError: the build failed. The message has the last lines of its log.
    """
    context, content = io.BytesIO(), hashlib.sha256()
    with tarfile.open(fileobj=context, mode="w") as archive:
        for name in STEPS_FILES:
            archive.add(ROOT / name, name, filter=_without_owner)
            content.update((ROOT / name).read_bytes())
    context.seek(0)
    name, version = f"{NAME}-steps", content.hexdigest()[:16]
    return _build(context, "Dockerfile", f"{name}:{version}", _labels(name, version, describe_commit()))


def _labels(title: str, version: str, commit: Commit) -> dict[str, str]:
    return {
        "org.opencontainers.image.title": title,
        "org.opencontainers.image.version": version,
        "org.opencontainers.image.revision": commit.sha + ("-dirty" if commit.dirty else ""),
        "org.opencontainers.image.licenses": "Apache-2.0",
    }


def _build(context: BinaryIO, dockerfile: str, tag: str, labels: Mapping[str, str]) -> Image:
    with connect(BUILD_TIMEOUT) as client:
        log: deque[str] = deque(maxlen=LOG_LINES)
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
            lines = _masked(str(event.get("stream", event.get("error", "")))).strip().splitlines()
            log.extend(lines)
            for line in lines:
                logger.debug(line)
            if "error" in event:
                settings = _masked(_build_settings())
                raise EngineError(f"{tag} could not be built from {dockerfile} ({settings}):\n" + "\n".join(log))
        client.images.get(tag).tag(tag.partition(":")[0], "latest")
        return _image(client, tag)


def _build_settings() -> str:
    """Return the build settings of the environment, for an error message."""
    settings = [f"{name}={os.environ[name]}" for name in (*BUILD_ARGS, BUILD_NETWORK) if name in os.environ]
    return " ".join(settings) or "BASE_IMAGE selects another base image, TORCH_INDEX another package index for torch"


def _masked(text: str) -> str:
    """The text without the user names and passwords in its URLs."""
    return re.sub(r"://[^/\s]+@", "://***@", text)


def _image(client: docker.DockerClient, tag: str) -> Image:
    """Look up an image and read its SBOM.

    Raises:
        docker.errors.ImageNotFound: the engine does not have the image.
    """
    image = client.images.get(tag)
    container = client.containers.create(image)  # files are read from containers; this one is not started
    try:
        content = read_file(container, SBOM)
    finally:
        container.remove()
    return Image(tag, image.id, content)


def _without_owner(entry: tarfile.TarInfo) -> tarfile.TarInfo:
    """Remove time and owner, so that the engine's build cache depends only on content and mode."""
    entry.mtime, entry.uid, entry.gid, entry.uname, entry.gname = 0, 0, 0, "", ""
    return entry
