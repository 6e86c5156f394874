"""Checkpoints and datasets from the Hugging Face hub, by huggingface_hub: pinned by commit, safetensors only."""

import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from glob import escape
from pathlib import Path
from typing import Any

from gpt2core.checkpoint import config_hint, read_config
from gpt2core.files import CHECKPOINT_FILES, checkpoint_files, directory_sha256, shard_files
from gpt2core.record_files import SUFFIXES
from gpt2core.types import BaseRef
from steps.adapters.tables import data_files, is_table

PICKLES = ("pytorch_model*.bin", "*.pt", "*.pth", "*.ckpt")
TOKENIZERS = (("tokenizer.json",), ("vocab.json", "merges.txt"))  # one of these is sufficient


class HubError(RuntimeError):
    """A base model or dataset is unavailable, or differs from its recorded sha256."""


@dataclass(frozen=True)
class Fetched:
    """A checkpoint on this machine: its reference and its directory."""

    ref: BaseRef
    path: Path


def fetch_base(base: BaseRef) -> Fetched:
    """Download a repository of the hub, or read a local directory.

    Args:
        base: `name` is a repository or a directory. `revision` is a commit, because branches and tags may move; it is
            ignored for a directory. `sha256` is by `directory_sha256`; "": not known yet, so not checked.

    Raises:
        HubError: the download fails, files are missing, or the sha256 differs.
    """
    is_directory = Path(base.name).is_dir()
    try:
        # An absolute path: later commands have another working directory, and links such as outputs/latest change.
        path = Path(base.name).resolve() if is_directory else _download_base(base)
        files = checkpoint_files(path)
        if missing := _missing(path, files):
            raise HubError(f"{base.name} has no {missing}")
        config = read_config(path / "config.json")
    except ValueError as error:
        raise HubError(f"{base.name} is not a GPT-2 that this project can load: {error}") from None
    if config.norm_position != "pre":
        raise HubError(
            f"{base.name} has norm_position {config.norm_position!r}, which the service cannot decode; use 'pre'"
        )
    digest = directory_sha256(path, files)
    if base.sha256 and digest != base.sha256:
        raise HubError(
            f"{base.name} at {base.revision or path} has sha256 {digest}, but {base.sha256} was recorded; "
            "it changed after the run"
        )
    name, revision = (str(path), "") if is_directory else (base.name, base.revision)
    return Fetched(BaseRef(name, revision, digest), path)


def fetch_dataset(name: str, revision: str, path: str, max_bytes: int) -> Path:
    """Download files of records from a dataset repository of the hub, or take them from a local directory.

    Args:
        name: a repository or a directory.
        revision: the commit; ignored for a directory.
        path: a file, a directory or a pattern of files in the repository; "": all files of records.
        max_bytes: maximum size of all files together.

    Returns:
        The directory, or `path` in it.

    Raises:
        HubError: the download fails or is too large, or there is no such path.
    """
    if Path(name).is_dir():
        directory = Path(name)
    else:
        patterns = [path, f"{path}/*"] if path else [f"*{suffix}" for suffix in (*SUFFIXES, ".parquet")]
        directory = _download("data", name, revision, patterns, "dataset", max_bytes)
    source = (directory / path).absolute()
    exists = source.exists() or (is_table(source) and data_files(source)[1])
    if not source.is_relative_to(directory.absolute()) or ".." in Path(path).parts or not exists:
        raise HubError(f"data.path is {path!r}, which {name} does not have")
    return directory / path


def _missing(path: Path, files: Sequence[str]) -> str:
    """Return what a checkpoint's directory lacks, with a hint for the user; "" if it is complete."""
    use_another = "use a GPT-2 checkpoint that has it"
    if "config.json" not in files:
        return f"config.json; {config_hint(path)}"
    if absent := _absent_shards(path):
        return f"{absent[0]}, which its index names; copy or download it again"
    if not any(file.endswith(".safetensors") for file in files):
        others = sorted({file.name for pattern in PICKLES for file in path.glob(pattern)})
        only = f" (only {', '.join(others)})" if others else ""
        return (
            f"safetensors weights{only}. Pickles like pytorch_model.bin can run any code and are not read. If you "
            "trust one, load it with transformers' GPT2LMHeadModel.from_pretrained, write it and its tokenizer with "
            "save_pretrained, and set base.name to that directory"
        )
    if not any(set(tokenizer) <= set(files) for tokenizer in TOKENIZERS):
        return f"tokenizer.json, nor vocab.json and merges.txt; {use_another}"
    return ""


def _absent_shards(path: Path) -> list[str]:
    return [name for name in shard_files(path) if not (path / name).is_file()]


def _download_base(base: BaseRef) -> Path:
    path = _download("base", base.name, base.revision, CHECKPOINT_FILES)
    if others := _absent_shards(path):  # shards that are not called model-*-of-* are added to the same directory
        _download("base", base.name, base.revision, [escape(name) for name in others])
    return path


def _download(
    key: str,
    name: str,
    revision: str,
    patterns: Sequence[str],
    repo_type: str = "model",
    max_bytes: int | None = None,
) -> Path:
    """Download a snapshot of the files that match. `key`: configuration section that names the repository."""
    from huggingface_hub import snapshot_download  # takes seconds to import; only hub users need it
    from huggingface_hub.errors import DryRunError, HFValidationError, HTTPError

    if not re.fullmatch(r"[0-9a-f]{40}", revision):
        raise HubError(
            f"{key}.revision of {name} is {revision!r}; use the commit's 40 hexadecimal digits, which make the run "
            f"reproducible (if {key}.name is meant to be a directory: it does not exist)"
        )
    what: dict[str, Any] = {"revision": revision, "repo_type": repo_type, "allow_patterns": list(patterns)}
    try:
        if max_bytes is not None:
            with suppress(DryRunError):  # without a network, the next call uses the cache or says what is missing
                size = sum(file.file_size or 0 for file in snapshot_download(name, dry_run=True, **what))
                if size > max_bytes:
                    raise HubError(f"{name} has {size:,} bytes of records, more than {key}.max_bytes, {max_bytes:,}")
        return Path(snapshot_download(name, **what))
    except (OSError, HTTPError, HFValidationError) as error:  # all errors of the network, the hub and its cache
        raise HubError(
            f"{name} at {revision} could not be downloaded ({type(error).__name__}); check the network, the name, and "
            f"whether the repository needs a login (HF_TOKEN). Without a network, copy it to this machine and set "
            f"{key}.name to its directory"
        ) from error
