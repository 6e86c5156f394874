"""The base model as an artifact: a directory with base.json, and the checkpoint if it is small.

A base from the hub is stored as name, revision and sha256. Its files (1.5 GB) are downloaded where they are needed.
"""

from collections.abc import Mapping
from pathlib import Path

from gpt2core.files import checkpoint_files, json_bytes, verify_directory, write_files
from gpt2core.types import BaseRef
from steps.adapters.hub import fetch_base

REFERENCE = "base.json"
Figures = Mapping[str, str | int | float]


def write_base(directory: Path, base: BaseRef, figures: Figures) -> None:
    """Write base.json: the reference, and figures about the base (parameters, losses, ...) for readers."""
    write_files(directory, {REFERENCE: json_bytes(base.to_json() | dict(figures))})


def read_base(directory: Path) -> BaseRef:
    """Read the reference in base.json."""
    return BaseRef.from_json_file(directory / REFERENCE)


def has_checkpoint(directory: Path) -> bool:
    """Whether the directory contains the weights, not only a reference to them."""
    return any(directory.glob("*.safetensors"))


def open_base(directory: Path) -> Path:
    """Return the directory of the checkpoint. Downloads it first if `directory` contains only a reference.

    Raises:
        HubError: the download fails, or it has another sha256 than base.json records.
        ValueError: the checkpoint in the directory has another sha256 than base.json records.
    """
    base = read_base(directory)
    if not has_checkpoint(directory):
        return fetch_base(base).path
    verify_directory(directory, base.sha256, checkpoint_files(directory))
    return directory
