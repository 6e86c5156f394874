"""Installation by the Makefile; the packages are not installed."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def install(folder: Path, version: tuple[int, int]) -> subprocess.CompletedProcess[str]:
    """Run `make install` in `folder` with a Python that reports `version`, and without pip."""
    python = folder / "python"
    fake = f"import sys; sys.version_info = {version}; exec(sys.argv[1])"
    python.write_text(
        f"#!/bin/sh\n[ $1 = -c ] && exec {sys.executable} -c '{fake}' \"$2\"\n"
        f'[ $1 = -V ] && exec echo Python {version[0]}.{version[1]}\nexec {sys.executable} "$@" --without-pip\n'
    )
    python.chmod(0o755)
    for name in ("pyproject.toml", "constraints.txt", "setup.py", "gpt2core"):
        if not (folder / name).exists():
            (folder / name).symlink_to(ROOT / name)
    command = ["make", "-f", ROOT / "Makefile", "install", f"PYTHON={python}"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("version", [(3, 10), (3, 14)])
def test_an_unsupported_python_is_refused_with_the_way_out(tmp_path, version):
    done = install(tmp_path, version)
    [message] = [line for line in done.stderr.splitlines() if not line.startswith("make")]
    assert f"is Python {version[0]}.{version[1]}, but 3.11, 3.12 or 3.13 is needed" in message
    assert "make install PYTHON=python3.13" in message
    assert not (tmp_path / ".venv").exists()


def test_an_environment_of_another_python_is_replaced(tmp_path):
    stale = tmp_path / ".venv" / "bin" / "python3.10"
    stale.parent.mkdir(parents=True)
    stale.touch()
    assert ".venv/bin/pip" in install(tmp_path, (3, 13)).stderr  # it is not there: the test installs nothing
    assert not stale.exists()
    assert (tmp_path / ".venv" / "bin" / "python").exists()


def test_the_makefile_permits_the_versions_of_pyproject():
    permitted = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["requires-python"]
    low, high = re.search(r"\((3, \d+)\) <= v < \((3, \d+)\)", (ROOT / "Makefile").read_text(encoding="utf-8")).groups()
    assert permitted == f">={low},<{high}".replace(", ", ".")
