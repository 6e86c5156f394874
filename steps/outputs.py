"""outputs/<run name>/ with a run's results as files, for users; no step reads them back.

outputs/latest links to the newest run, outputs/staging and outputs/production to the newest one promoted to the stage.
"""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from shutil import copyfile, copytree, rmtree
from types import MappingProxyType
from typing import Any
from uuid import uuid4

from gpt2core.files import atomic_write, naming_file


def outputs_dir() -> Path:
    """`outputs/` of the checkout, or $GPT2_INSTRUCT_OUTPUTS: a step's container runs from another directory."""
    return Path(os.environ.get("GPT2_INSTRUCT_OUTPUTS") or Path(__file__).parent.parent / "outputs")


def write_outputs(
    run_name: str,
    texts: Mapping[str, str | bytes],
    folders: Mapping[str, Path],
    links: Mapping[str, Path] = MappingProxyType({}),
    pointers: Sequence[str] = ("latest",),
) -> Path:
    """Write a run's files, copies of directories and links to directories; then point outputs/<pointer> at the run.

    The directory appears only when it is complete.

    Args:
        pointers: names of links in outputs/.
    """
    directory, partial = outputs_dir() / run_name, outputs_dir() / f".{run_name}"
    try:
        _fill(partial, texts, folders, links)
        rmtree(directory, ignore_errors=True)  # of a step that is retried
        os.replace(partial, directory)
    except BaseException:
        rmtree(partial, ignore_errors=True)
        raise
    for name in pointers:
        _link(outputs_dir() / name, Path(run_name))
    return directory


def _fill(
    directory: Path, texts: Mapping[str, str | bytes], folders: Mapping[str, Path], links: Mapping[str, Path]
) -> None:
    rmtree(directory, ignore_errors=True)  # of a run that was killed here
    directory.mkdir(parents=True)
    for name, text in texts.items():
        atomic_write(directory / name, text.encode() if isinstance(text, str) else text)
    for name, folder in folders.items():
        with naming_file(directory / name, sum(file.stat().st_size for file in folder.rglob("*"))):
            copytree(folder, directory / name, copy_function=copyfile)
        (directory / name).chmod(0o755)  # copytree kept the 0700 of a temporary directory
    for name, target in links.items():
        _link(directory / name, target.resolve())


def _link(link: Path, target: Path) -> None:
    """Create or replace a link atomically."""
    temporary = link.with_name(f".{link.name}-{uuid4().hex}")
    temporary.symlink_to(target, target_is_directory=True)
    os.replace(temporary, link)


def json_text(value: Any) -> str:
    """For people: indented, with non-ASCII characters as they are."""
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def wandb_directory() -> Path:
    """The directory of wandb's files, including those of offline runs."""
    return outputs_dir() / "wandb"
