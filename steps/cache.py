"""Cache keys that include this repository's code. ZenML's own key covers the step function only."""

import ast
from pathlib import Path

from zenml.config import CachePolicy

ROOT = Path(__file__).parent.parent
PACKAGES = ("gpt2core", "steps", "deploy", "bentos")


def code_of(step_module: str, *others: str, folder: str | None = None) -> CachePolicy:
    """Return a cache policy whose key covers the source files of the modules, and of all modules of this repository
    that they import directly or indirectly.

    Args:
        folder: a directory whose files are part of the key too.
    """
    found: set[Path] = set()
    todo = [step_module, *others]
    while todo:
        file = _file_of(todo.pop())
        if file is not None and file not in found:
            found.add(file)
            todo += _imports(file)
    siblings = {
        file for module in found for file in module.parent.glob(f"{module.stem}.*")
    }  # such as a module's template
    whole = {file for file in (ROOT / folder).iterdir() if file.is_file()} if folder is not None else set()
    files = sorted(file.relative_to(ROOT).as_posix() for file in found | siblings | whole)
    return CachePolicy(file_dependencies=files)


def _file_of(module: str) -> Path | None:
    if module.split(".")[0] not in PACKAGES:
        return None
    path = ROOT.joinpath(*module.split("."))
    return next((file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()), None)


def _imports(file: Path) -> list[str]:
    """Modules named by the import statements of a file; `from a import b` may mean the module a.b."""
    modules = []
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            modules += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            modules += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return modules
