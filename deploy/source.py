"""The running code: its git commit and the versions of the main libraries."""

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from gpt2core.types import Commit

ROOT = Path(__file__).parent.parent
PACKAGES = ("torch", "numpy", "tiktoken", "safetensors", "zenml", "bentoml", "transformers", "evidently", "wandb")


def describe_commit() -> Commit:
    return Commit(_git("rev-parse", "HEAD") or "unknown", bool(_git("status", "--porcelain")))


def describe_versions() -> dict[str, str]:
    return {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES}


def _git(*arguments: str) -> str:
    """Return the output of a git command; "" if there is no git or no checkout, as in a container."""
    try:
        command = ["git", "-C", str(ROOT), *arguments]  # the user's own git, found in PATH
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)  # noqa: S603 (no shell)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
