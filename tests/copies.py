"""A fresh copy of the project, and the environment of a new user."""

import os
import subprocess
import sys
from pathlib import Path
from shutil import copy2

ROOT = Path(__file__).parent.parent


def copy_project(copy: Path) -> Path:
    """Copy all files that git tracks or would add; link this environment as .venv."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    for name in listed.stdout.decode().split("\0"):
        if (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            copy2(ROOT / name, copy / name)
    (copy / ".venv").symlink_to(sys.prefix)
    return copy


def fresh_environment(project: Path, home: Path) -> dict[str, str]:
    """Environment variables in which the copy's code comes before the installed project."""
    names = ("LANG", "TMPDIR", "TIKTOKEN_CACHE_DIR", "DOCKER_HOST")
    passed = {name: os.environ[name] for name in names if name in os.environ}
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return passed | {"HOME": str(home), "PATH": path, "PYTHONPATH": str(project), "ZENML_ANALYTICS_OPT_IN": "false"}
