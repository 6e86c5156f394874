"""GPT-2 checkpoints from the Hugging Face hub, by huggingface_hub: pinned by commit, safetensors only."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gpt2core.checkpoint import directory_sha256, read_config
from gpt2core.files import CHECKPOINT_FILES, checkpoint_files
from gpt2core.types import BaseRef

TOKENIZERS = (("tokenizer.json",), ("vocab.json", "merges.txt"))  # one of them is enough


class HubError(RuntimeError):
    """A base model that is not available or not the recorded one."""


@dataclass(frozen=True)
class Fetched:
    """A checkpoint on this machine: what it is, and its directory."""

    ref: BaseRef
    path: Path


def fetch_base(base: BaseRef) -> Fetched:
    """Download a repository of the hub, or read a local directory.

    Args:
        base: name (a repository or a directory), revision (the commit: a branch or tag may move; ignored for a
            directory) and sha256 by `directory_sha256` ("": not known yet, so not checked).

    Raises:
        HubError: the download fails, files are missing, or the sha256 differs.
    """
    path = Path(base.name) if Path(base.name).is_dir() else _download(base.name, base.revision)
    files = checkpoint_files(path)
    if missing := _missing(files):
        raise HubError(f"{base.name} has no {missing}; use a GPT-2 checkpoint that has it")
    try:
        config = read_config(path / "config.json")
    except ValueError as error:
        raise HubError(f"{base.name} is not a GPT-2 that this project can load: {error}") from None
    if config.norm_position != "pre":
        raise HubError(
            f"{base.name} has norm_position {config.norm_position!r}, which the service cannot decode; use 'pre'"
        )
    found = directory_sha256(path, files)
    if base.sha256 and found != base.sha256:
        raise HubError(
            f"{base.name} at {base.revision or path} has sha256 {found}, but {base.sha256} was recorded; "
            "it changed after the run"
        )
    revision = "" if Path(base.name).is_dir() else base.revision
    return Fetched(BaseRef(base.name, revision, found), path)


def _missing(files: Sequence[str]) -> str:
    if "config.json" not in files:
        return "config.json"
    if not any(file.endswith(".safetensors") for file in files):
        return "safetensors weights"
    if not any(set(tokenizer) <= set(files) for tokenizer in TOKENIZERS):
        return "tokenizer.json, nor vocab.json and merges.txt"
    return ""


def _download(name: str, revision: str) -> Path:
    from huggingface_hub import snapshot_download  # takes seconds to import; only hub bases need it
    from huggingface_hub.errors import HFValidationError, HTTPError

    if not re.fullmatch(r"[0-9a-f]{40}", revision):
        raise HubError(
            f"base.revision of {name} is {revision!r}; use the commit's 40 hexadecimal digits, which make the run "
            "reproducible (if base.name is meant to be a directory: it does not exist)"
        )
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=[*CHECKPOINT_FILES]))
    except (OSError, HTTPError, HFValidationError) as error:  # everything the network, the hub and its cache raise
        raise HubError(
            f"{name} at {revision} could not be downloaded ({type(error).__name__}); check the network, the name, and "
            "whether the repository needs a login (HF_TOKEN). Without a network, copy the checkpoint to this machine "
            "and set base.name to its directory"
        ) from error
