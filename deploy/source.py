"""The running code: its files, its git commit and the versions of the main libraries."""

import ast
import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from gpt2core.types import Commit

ROOT = Path(__file__).parent.parent
PACKAGES = ("torch", "numpy", "tiktoken", "safetensors", "zenml", "bentoml", "transformers", "evidently", "wandb")
CODE = ("gpt2core", "steps", "deploy", "bentos")
GIT_VARIABLES = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_COMMON_DIR", "GIT_OBJECT_DIRECTORY", "GIT_PREFIX")
DATA = (".c", ".css", ".cu", ".h", ".html", ".j2")


def code_files(*modules: str) -> list[str]:
    """Return the source files of the modules and of their transitive imports within CODE, and their data files.

    A data file has a suffix of DATA, is in the directory of a source file, and its name occurs in that file, like a
    template's. Paths are relative to ROOT and sorted.
    """
    files: set[Path] = set()
    todo = [file for module in modules for file in _files_of(module)]
    while todo:
        file = todo.pop()
        if file not in files:
            files.add(file)
            text = file.read_text(encoding="utf-8")
            todo += [other for other in file.parent.iterdir() if other.suffix in DATA and other.name in text]
            if file.suffix == ".py":
                todo += [imported for module in _imports(text) for imported in _files_of(module)]
    return sorted(file.relative_to(ROOT).as_posix() for file in files)


def _files_of(module: str) -> list[Path]:
    """The file of a module and the __init__.py of its packages; [] outside of CODE."""
    parts = module.split(".")
    if parts[0] not in CODE:
        return []
    paths = [ROOT.joinpath(*parts[: end + 1]) for end in range(len(parts))]
    return [file for path in paths for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()]


def _imports(text: str) -> list[str]:
    """Modules named by the import statements of a file; `from a import b` may mean the module a.b."""
    modules = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            modules += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            modules += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return modules


def describe_commit() -> Commit:
    """Return the commit of this checkout; "unknown" without git, and if no repository tracks these files.

    It is dirty if there are changes or untracked files, or if git cannot say.
    """
    if not _git("ls-files", "run.py"):  # a copy of the project in the directory of another repository
        return Commit("unknown", dirty=False)
    changes = _git("status", "--porcelain", "--untracked-files=normal")
    return Commit(_git("rev-parse", "HEAD") or "unknown", dirty=changes != "")


def describe_versions() -> dict[str, str]:
    return {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES}


def _git(*arguments: str) -> str | None:
    """Return the output of a git command; None if it fails, such as without git or a checkout, as in a container."""
    # git sets variables such as GIT_DIR for hooks; they select another repository than that of ROOT
    environment = {name: value for name, value in os.environ.items() if name not in GIT_VARIABLES}
    try:
        command = ["git", "-C", str(ROOT), *arguments]  # the user's own git, found in PATH
        done = subprocess.run(  # noqa: S603 (no shell)
            command, env=environment, capture_output=True, encoding="utf-8", errors="replace", timeout=10
        )
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
