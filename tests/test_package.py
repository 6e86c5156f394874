"""The wheel and the source distribution: what is in them, and that the wheel works without the extras."""

import os
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from importlib.metadata import distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.copies import copy_project

GENERATE = """
import torch
from gpt2core.config import GPT2Config, GenerationConfig, LoraConfig
from gpt2core.engine import Engine
from gpt2core.generate import generate
from gpt2core.lora import add_lora
from gpt2core.model import GPT2
model = add_lora(GPT2(GPT2Config(n_layer=1, n_head=1, n_embd=8, n_positions=16, vocab_size=11)), LoraConfig(), seed=0)
config = GenerationConfig(max_new_tokens=3)
assert [len(tokens) for tokens in generate(model.eval(), [[1, 2]], config)] == [3]
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A folder with the wheel and the source distribution, built from a copy of the checkout."""
    project = copy_project(tmp_path_factory.mktemp("project"))
    out = tmp_path_factory.mktemp("built")
    backend = f"from setuptools.build_meta import *; build_sdist({str(out)!r}); build_wheel({str(out)!r})"
    done = subprocess.run([sys.executable, "-c", backend], cwd=project, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return out


def test_the_wheel_installs_gpt2core_and_no_other_top_level_name(built):
    with zipfile.ZipFile(next(built.glob("*.whl"))) as wheel:
        names = wheel.namelist()
    assert {name.partition("/")[0] for name in names if ".dist-info/" not in name} == {"gpt2core"}
    assert {"gpt2core/py.typed", "gpt2core/cuda.cu"} <= set(names)


def test_the_source_distribution_holds_everything_that_runs_from_a_checkout(built):
    with tarfile.open(next(built.glob("*.tar.gz"))) as archive:
        files = {name.partition("/")[2] for name in archive.getnames()}
    listed = subprocess.run(["git", "ls-files"], cwd=Path(__file__).parent.parent, capture_output=True, text=True)
    needed = {name for name in listed.stdout.splitlines() if not name.startswith(".")}
    assert needed
    assert needed - files == set()


def test_git_ignores_secrets_and_no_file_of_the_project():
    """ZenML uploads every file that git does not ignore to the artifact store of the stack."""
    root = Path(__file__).parent.parent
    secrets = [".env", ".env.local", "bentos/key.pem", "tls.key", "id_rsa", "id_ed25519", "kubeconfig", ".netrc"]
    secrets += ["kubeconfig.yaml", "prod.kubeconfig", "gpt2core/inference/credentials.json"]
    ignored = subprocess.run(["git", "check-ignore", *secrets], cwd=root, capture_output=True, text=True).stdout
    assert ignored.splitlines() == secrets
    tracked = ["git", "ls-files", "--cached", "--ignored", "--exclude-standard"]
    assert subprocess.run(tracked, cwd=root, capture_output=True, text=True, check=True).stdout == ""


def test_the_wheel_works_with_its_own_dependencies_alone(built, tmp_path):
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--target", str(tmp_path)]
    subprocess.run([*install, str(next(built.glob("*.whl")))], check=True, capture_output=True)
    (metadata,) = tmp_path.glob("*.dist-info/METADATA")
    requirements = [
        Requirement(line.partition(": ")[2])
        for line in metadata.read_text().splitlines()
        if line.startswith("Requires-Dist: ")
    ]
    core = {requirement.name for requirement in requirements if requirement.marker is None}
    assert core == {"torch", "numpy", "tiktoken", "safetensors"}

    links = tmp_path / "dependencies"
    links.mkdir()
    for path in _files_of(core):
        if not (links / path.name).exists():
            (links / path.name).symlink_to(path)
    # -S leaves out site-packages: only the wheel and its dependencies can be imported
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": f"{tmp_path}:{links}"}
    for code, works in ((GENERATE, True), ("import bentoml", False), ("import zenml", False), ("import steps", False)):
        command = [sys.executable, "-S", "-c", code]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert (done.returncode == 0) is works, done.stderr


def _files_of(names: set[str]) -> Iterator[Path]:
    """Top-level files and folders in site-packages of these distributions and of all that they require."""
    todo, seen = [*names], set[str]()
    while todo:
        name = todo.pop()
        if name in seen:
            continue
        seen.add(name)
        found = distribution(name)
        for file in found.files or []:
            if file.parts[0] not in ("..", "__pycache__"):
                yield Path(str(found.locate_file(file.parts[0])))
        for line in found.requires or []:
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                todo.append(requirement.name)
