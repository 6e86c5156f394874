"""The directories of this machine that a service's container can access: adapters, and that of the request log."""

import os
import stat
from collections.abc import Mapping
from pathlib import Path

from docker.types import Mount

from deploy.target import DeployError

REQUESTS = "/requests"  # the request log's directory in the container
# what a mount at the same path would hide in the container
IMAGE_PATHS = ("/bento", "/bin", "/dev", "/etc", "/lib", "/opt/venv", "/proc", "/sys", "/tmp", "/usr", REQUESTS)


def mount_files(environment: Mapping[str, str]) -> tuple[dict[str, str], list[Mount]]:
    """Return a service's environment with the paths in its container, and the mounts that it requires.

    Adapters keep their path: links between them and paths in requests may be absolute.

    Args:
        environment: as `deploy.server.service_environment` returns it.

    Raises:
        DeployError: the container would hide a directory, or get access to more than adapters and request log.
    """
    environment, mounts = dict(environment), []
    if adapters := environment.get("GPT2_ADAPTERS_DIR"):
        _check_adapters(Path(adapters))
        mounts.append(Mount(adapters, adapters, type="bind", read_only=True))
    if log := environment.get("GPT2_REQUEST_LOG"):
        _check_log(Path(log))
        mounts.append(Mount(REQUESTS, str(Path(log).parent.resolve()), type="bind"))
        environment["GPT2_REQUEST_LOG"] = f"{REQUESTS}/{Path(log).name}"
    return environment, mounts


def _check_adapters(directory: Path) -> None:
    if not directory.is_dir():
        raise DeployError(f"GPT2_ADAPTERS_DIR is {directory}, which is not a directory of this machine")
    for path in map(Path, IMAGE_PATHS):
        if directory.resolve() in (path, *path.parents) or directory in (path, *path.parents):
            raise DeployError(f"GPT2_ADAPTERS_DIR is {directory}, which would hide the container's own {path}; move it")


def _check_log(log: Path) -> None:
    """Check that the log's directory has no other use, because the container can write all of it."""
    example = f"use a directory for the log alone, such as {log.parent / 'requests' / log.name}"
    try:
        log.parent.mkdir(parents=True, exist_ok=True)
        folder = log.parent.resolve()
        others = sorted(file.name for file in folder.iterdir() if not f"{file.name}.".startswith(f"{log.name}."))
        is_shared = folder.stat().st_mode & stat.S_ISVTX  # such as /tmp
    except OSError as error:
        raise DeployError(f"GPT2_REQUEST_LOG is {log}, which cannot be written: {error}") from None
    if log.is_dir() or log.is_symlink():
        raise DeployError(f"GPT2_REQUEST_LOG is {log}, which must be a regular file, or not exist")
    if others:
        raise DeployError(
            f"GPT2_REQUEST_LOG is {log}: the service would get access to other files of that directory, for example "
            f"{others[0]}; {example}"
        )
    if is_shared or folder in (Path.cwd(), *Path.cwd().parents):
        raise DeployError(f"GPT2_REQUEST_LOG is {log}: that directory has other uses too; {example}")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise DeployError(f"GPT2_REQUEST_LOG is {log}, and its directory is not writable")
