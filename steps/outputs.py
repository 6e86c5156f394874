"""Writes a run's results as files to outputs/<run name>/, for users. No step reads results from there.

outputs/latest links to the newest run. outputs/staging and outputs/production link to a run of the model in the stage.
"""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from shutil import copyfile, copytree, rmtree
from tempfile import NamedTemporaryFile
from types import MappingProxyType
from typing import Any, Literal, get_args
from uuid import uuid4

from gpt2core.files import atomic_write, naming_file
from gpt2core.types import Lineage, RunRef

# Entries of outputs/ other than directories of runs
Shared = Literal["latest", "staging", "production", "experiments", "monitoring", "images", "wandb", "compare.html"]
LINKS = ("latest", "staging", "production")  # to directories of runs
# File with the id of the run that wrote the directory. lineage.json has the id of the run that built the Bento, which
# is an earlier run if the step was cached.
RUN_ID = ".run_id"
MAX_NAME = 200  # bytes of a run's name; file systems allow 255, but the directory's temporary name is longer


def outputs_dir() -> Path:
    """Return `outputs/` of the checkout, or $GPT2_INSTRUCT_OUTPUTS, which a step's container needs."""
    return Path(os.environ.get("GPT2_INSTRUCT_OUTPUTS") or Path(__file__).parent.parent / "outputs")


def shared_path(name: Shared) -> Path:
    return outputs_dir() / name


def adapter_in(directory: Path) -> str:
    """Return the adapter's sha256 in the lineage of a run's directory; "" if the directory is not complete."""
    try:
        return Lineage.from_json_file(directory / "lineage.json").adapter.sha256 if directory.is_dir() else ""
    except (FileNotFoundError, ValueError):
        return ""


def check_run_name(name: str) -> None:
    """Raise ValueError unless the run's results can have a directory of this name in outputs/."""
    plain = name.isprintable() and not {"/", "\\"} & {*name} and not name.startswith(".")
    if not plain or not 0 < len(name.encode()) <= MAX_NAME:
        raise ValueError(
            f"the run's name is {name[:MAX_NAME]!r}; it must be a directory name of 1 to {MAX_NAME} bytes, without "
            "slashes and not starting with a dot"
        )
    if name.lower() in get_args(Shared):  # some file systems ignore case
        raise ValueError(f"the run's name is {name!r}, which outputs/ uses itself; use another name")


def check_outputs() -> None:
    """
    Raises:
        OSError: outputs/ cannot be written.
        ValueError: outputs/ has a directory with the name of a link that runs create.
    """
    directory = outputs_dir()
    directory.mkdir(parents=True, exist_ok=True)
    with NamedTemporaryFile(dir=directory):
        pass
    for name in LINKS:
        if (directory / name).is_dir() and not (directory / name).is_symlink():
            raise ValueError(f"{directory / name} is a directory, but a run makes a link of this name; move it away")


def write_outputs(
    run: RunRef,
    texts: Mapping[str, str | bytes],
    folders: Mapping[str, Path],
    links: Mapping[str, Path] = MappingProxyType({}),
    pointers: Sequence[str] = ("latest",),
) -> Path:
    """Write outputs/<run name>/ atomically, then link outputs/<pointer> to it.

    Args:
        texts: file name -> content.
        folders: name -> directory that is copied.
        links: name -> directory that is linked.
        pointers: names of links in outputs/ to the new directory.

    Raises:
        ValueError: see `check_run_name`.
        FileExistsError: another run wrote a directory of this name, which stays as it is.
    """
    check_run_name(run.name)
    directory, partial = outputs_dir() / run.name, outputs_dir() / f".{run.name}-{run.id}"
    written = _written_before(directory, run)
    try:
        _fill(partial, {**texts, RUN_ID: run.id}, folders, links)
        if written:
            rmtree(directory)
        os.replace(partial, directory)
    except BaseException:
        rmtree(partial, ignore_errors=True)
        raise
    for name in pointers:
        _link(outputs_dir() / name, Path(run.name))
    return directory


def _written_before(directory: Path, run: RunRef) -> bool:
    """Whether this run wrote the directory in an earlier attempt. Raises FileExistsError if another run wrote it."""
    if not os.path.lexists(directory):
        return False
    marker = directory / RUN_ID
    if not marker.is_file() or marker.read_text(encoding="utf-8") != run.id:
        raise FileExistsError(
            f"{directory} exists, but is from another run than {run.id}; move it away, or set another run_name"
        )
    return True


def _fill(
    directory: Path, texts: Mapping[str, str | bytes], folders: Mapping[str, Path], links: Mapping[str, Path]
) -> None:
    rmtree(directory, ignore_errors=True)  # left by an attempt that was killed
    directory.mkdir(parents=True)
    for name, text in texts.items():
        atomic_write(directory / name, text.encode() if isinstance(text, str) else text)
    for name, folder in folders.items():
        with naming_file(directory / name, sum(file.stat().st_size for file in folder.rglob("*"))):
            copytree(folder, directory / name, copy_function=copyfile)
        (directory / name).chmod(0o755)  # copytree copied the mode of a temporary directory, 0700
    for name, target in links.items():
        _link(directory / name, target.resolve())


def _link(link: Path, target: Path) -> None:
    """Create or replace a link atomically."""
    temporary = link.with_name(f".{link.name}-{uuid4().hex}")
    temporary.symlink_to(target, target_is_directory=True)
    try:
        os.replace(temporary, link)
    except OSError:
        temporary.unlink()
        raise


def json_text(value: Any) -> str:
    """Format JSON for people: indented, with non-ASCII characters as they are."""
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def wandb_directory() -> Path:
    """Return the directory of wandb's files, which include offline runs."""
    return shared_path("wandb")
