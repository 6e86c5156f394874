"""GPT-2 checkpoints of the Hugging Face hub, by huggingface_hub: pinned by commit, safetensors only."""

import re
from pathlib import Path

from gpt2core.checkpoint import directory_sha256, read_config
from gpt2core.files import checkpoint_files

WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "model-*-of-*.safetensors")
OTHERS = ("config.json", "vocab.json", "merges.txt")


class HubError(RuntimeError):
    """A base model that cannot be had, or is not the one that was named."""


def fetch_base(name: str, revision: str, sha256: str | None = None) -> dict[str, str]:
    """Bring a repository of the hub, or look at a directory: `name`, `revision`, `path` and `sha256` of its files.

    Args:
        revision: the commit; a branch or a tag may mean something else tomorrow. Not looked at for a directory.
        sha256: what the files have to have, by `directory_sha256`.

    Raises:
        HubError: it cannot be fetched, is incomplete, or has another sha256.
    """
    path = Path(name) if Path(name).is_dir() else _download(name, revision)
    files = checkpoint_files(path)
    missing = [file for file in OTHERS if file not in files]
    if missing or not any(file.endswith(".safetensors") for file in files):
        raise HubError(
            f"{name} has no {missing[0] if missing else 'safetensors weights'}; take a GPT-2 repository with it"
        )
    try:
        read_config(path / "config.json")
    except ValueError as error:
        raise HubError(f"{name} is no GPT-2 that this project can read: {error}") from None
    found = directory_sha256(path, files)
    if sha256 is not None and found != sha256:
        raise HubError(
            f"{name} at {revision or path} has sha256 {found}, but {sha256} was recorded; it has changed since"
        )
    return {"name": name, "revision": revision, "path": str(path), "sha256": found}


def _download(name: str, revision: str) -> Path:
    from huggingface_hub import snapshot_download  # seconds that a run with a base of its own need not wait
    from huggingface_hub.errors import HFValidationError, HTTPError

    if not re.fullmatch(r"[0-9a-f]{40}", revision):
        raise HubError(
            f"base.revision of {name} is {revision!r}; give the commit's 40 hexadecimal digits, so that the run can be "
            "repeated (and check base.name, if a directory was meant: there is none of that name)"
        )
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=[*WEIGHTS, *OTHERS]))
    except (OSError, HTTPError, HFValidationError) as error:  # all that the network, the hub and its cache raise
        raise HubError(
            f"{name} at {revision} could not be fetched ({type(error).__name__}); is there a network, is the name "
            "right, and does the repository ask for a login (HF_TOKEN)?"
        ) from error
