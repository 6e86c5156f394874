"""Rules for the modules of the package."""

import re
import subprocess
import sys
from pathlib import Path

from bentos import settings

PACKAGE = Path(settings.__file__).parent
ENGINE = {"bentos.generation", "bentos.metrics", "bentos.request_log"}  # imported by the worker only


def test_the_environment_is_read_in_one_place():
    readers = {path.name for path in PACKAGE.rglob("*.py") if re.search(r"\bos\.environ|getenv", path.read_text())}
    assert readers <= {"service.py"}  # the service passes it to Settings


def test_bentomls_parent_process_does_not_import_torch():
    modules = [".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts) for path in PACKAGE.rglob("*.py")]
    others = sorted(set(modules) - ENGINE - {"bentos.service"})
    imports = set(re.findall(r"^(?:from|import) ([\w.]+)", (PACKAGE / "service.py").read_text(), re.MULTILINE))
    assert not imports & ENGINE
    code = (
        f"import sys, importlib\nfor name in {others}: importlib.import_module(name)\nassert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=PACKAGE.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
