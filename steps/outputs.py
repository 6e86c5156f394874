"""outputs/<run name>/ with a run's results as files, and outputs/latest, a link to the newest run.

For users; no step reads them back.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from shutil import copytree
from typing import Any

from gpt2core.checkpoint import atomic_write


def outputs_dir() -> Path:
    """`outputs/` of the checkout, or $GPT2_INSTRUCT_OUTPUTS: a step's container runs from another directory."""
    return Path(os.environ.get("GPT2_INSTRUCT_OUTPUTS") or Path(__file__).parent.parent / "outputs")


def write_outputs(run_name: str, texts: Mapping[str, str | bytes], folders: Mapping[str, Path]) -> Path:
    """Write a run's files and directories, then point outputs/latest at them."""
    directory = outputs_dir() / run_name
    for name, text in texts.items():
        atomic_write(directory / name, text.encode() if isinstance(text, str) else text)
    for name, folder in folders.items():
        copytree(folder, directory / name, dirs_exist_ok=True)
        (directory / name).chmod(0o755)  # copytree kept the 0700 of a temporary directory
    link = outputs_dir() / f".latest-{run_name}"
    link.symlink_to(run_name, target_is_directory=True)
    os.replace(link, outputs_dir() / "latest")
    return directory


def to_json(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def wandb_directory() -> Path:
    """Where wandb keeps its files, also those of offline runs."""
    return outputs_dir() / "wandb"
