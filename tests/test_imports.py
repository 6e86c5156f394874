"""Each package imports only what it may. import-linter (`make lint`) checks the direction between packages."""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = {"gpt2core", "steps", "pipelines", "deploy", "bentos", "stacks", "benchmarks"}
CORE = {"gpt2core", "torch", "numpy", "tiktoken", "safetensors"}
PROXY = {"aiohttp", "multidict", "yarl"}
MAY_IMPORT = {
    "gpt2core/*.py": CORE,
    "gpt2core/inference/*.py": CORE,
    "gpt2core/demo/*.py": CORE | {"tokenizers"},
    "benchmarks/*.py": {
        "benchmarks",
        "deploy",  # the service is built and served as in the pipeline
        "gpt2core",
        "torch",
        "transformers",
        "peft",
        "click",
        "jinja2",
        "aiohttp",
        "fastapi",
        "uvicorn",
        "matplotlib",
    },
    "pipelines/*.py": {"pipelines", "steps", "stacks", "deploy", "zenml", "gpt2core", "yaml", "pydantic", "kubernetes"},
    "steps/*.py": {"steps", "deploy", "zenml", "gpt2core"},
    "stacks/*.py": {"stacks", "deploy", "zenml", "yaml", "pydantic"},
    "deploy/*.py": {"deploy", "gpt2core", "bentoml", "requests", "yaml"},
    "deploy/containers/*.py": {"deploy", "gpt2core", "docker", "requests"},
    "deploy/kubernetes/*.py": {"deploy", "gpt2core", "kubernetes", "urllib3", "yaml"},
    "bentos/*.py": {
        "bentos",
        "_bentoml_sdk",  # the class of a service, which bentoml.service takes and bentoml does not name
        "prometheus_client",
        "tiktoken",
        "gpt2core",
        "bentoml",
        "fastapi",
        "starlette",
        "pydantic",
        "aiohttp",
        "multidict",
        "yarl",
    },
}
ADAPTERS = {  # the library that each adapter wraps
    "base": set(),
    "download": {"requests", "urllib3", "tqdm"},
    "hub": {"huggingface_hub"},
    "progress": {"tqdm"},
    "report": {"evidently", "jinja2", "pandas", "plotly"},
    "rouge": {"rouge_score"},
    "tracking": {"wandb"},
}
PYTHON = [path for package in sorted(PACKAGES) for path in (ROOT / package).rglob("*.py")]


def imported(file: Path) -> Iterator[str]:
    """Top-level names, imports inside of functions too."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file} imports relatively"
            yield node.module.partition(".")[0]


@pytest.mark.parametrize("files", MAY_IMPORT)
def test_a_package_imports_only_what_it_may(files):
    used = {name for file in ROOT.glob(files) for name in imported(file)}
    assert used
    assert used - sys.stdlib_module_names <= MAY_IMPORT[files]


def test_each_adapter_imports_only_the_library_that_it_wraps():
    for file in (ROOT / "steps" / "adapters").glob("*.py"):
        if file.stem != "__init__":
            foreign = set(imported(file)) - sys.stdlib_module_names - {"gpt2core", "steps"}
            assert foreign == ADAPTERS[file.stem], file.name


def test_an_init_file_is_empty():
    assert [file for file in PYTHON if file.name == "__init__.py" and file.read_text()] == []


def test_nothing_is_loaded_that_can_run_code():
    words = ("pickle", "torch.load(", "torch.save(", "eval(", "exec(", "yaml.load(", "trust_remote_code")
    found = [
        (file.name, word)
        for file in PYTHON
        for word in words
        if word in file.read_text().replace(".eval()", "").replace("_eval(", "")
    ]
    assert found == []


def test_the_core_brings_no_platform_along_and_changes_no_environment():
    modules = [
        ".".join(file.relative_to(ROOT).with_suffix("").parts)
        for file in PYTHON
        if file.is_relative_to(ROOT / "gpt2core") and file.name != "__init__.py"
    ]
    code = (
        f"import os, sys, importlib\nbefore = dict(os.environ)\n"
        f"for name in {modules}: importlib.import_module(name)\n"
        "assert dict(os.environ) == before\n"
        "found = {'zenml', 'bentoml', 'transformers', 'evidently', 'wandb'} & set(sys.modules)\n"
        "sys.exit(', '.join(found) or 0)"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_what_is_imported_is_declared():
    declared = (ROOT / "pyproject.toml").read_text()
    packages = {"yaml": "pyyaml", "huggingface_hub": "transformers", "rouge_score": "rouge-score"}
    part_of = {"urllib3": "requests", "pydantic": "zenml", "fastapi": "zenml", "starlette": "bentoml"}
    part_of |= dict.fromkeys([*PROXY, "_bentoml_sdk", "prometheus_client", "uvicorn"], "bentoml")
    for name in set().union(*MAY_IMPORT.values(), *ADAPTERS.values()) - PACKAGES:
        assert f'"{packages.get(name, part_of.get(name, name))}' in declared, name


def test_the_served_images_requirements_are_those_tested_with():
    tested = set((ROOT / "constraints.txt").read_text().splitlines())
    wanted = {line for line in (ROOT / "bentos" / "requirements.txt").read_text().splitlines() if "==" in line}
    assert len(wanted) >= 8
    assert wanted <= tested
