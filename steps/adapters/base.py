"""The base model as an artifact: a directory with base.json, and with the checkpoint itself only where that is small.

A base of the hub travels as name, revision and sha256; 1.5 GB are fetched where they are used.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gpt2core.checkpoint import atomic_write
from steps.adapters.hub import fetch_base

REFERENCE = "base.json"


def write_base(directory: Path, about: Mapping[str, Any]) -> None:
    """Describe the base: `name`, `revision` ("" where made here), `sha256`, and what else there is to say."""
    atomic_write(directory / REFERENCE, (json.dumps(about, indent=2) + "\n").encode())


def describe_base(directory: Path) -> dict[str, str]:
    """`name`, `revision` and `sha256` of the base."""
    about = json.loads((directory / REFERENCE).read_text())
    return {key: about[key] for key in ("name", "revision", "sha256")}


def holds_checkpoint(directory: Path) -> bool:
    """Whether the weights are here, or only the reference to them."""
    return any(directory.glob("*.safetensors"))


def open_base(directory: Path) -> Path:
    """The directory of the checkpoint, fetched first if this is a reference.

    Raises:
        HubError: it cannot be fetched, or what was fetched is not what was named.
    """
    if holds_checkpoint(directory):
        return directory
    about = describe_base(directory)
    return Path(fetch_base(about["name"], about["revision"], about["sha256"])["path"])
