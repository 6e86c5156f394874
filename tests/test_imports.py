"""What each package may import. import-linter (`make lint`) checks the direction between packages."""

import ast
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
PACKAGES = {"gpt2core", "steps", "pipelines", "commands", "deploy", "bentos", "stacks", "benchmarks"}
CORE = {"gpt2core", "torch", "numpy", "tiktoken", "safetensors"}
# Folder -> names that its files may import, besides the standard library. A file follows its own folder alone.
MAY_IMPORT = {
    "gpt2core": CORE,
    "gpt2core/inference": CORE,
    "gpt2core/demo": CORE | {"tokenizers"},
    "steps": {"steps", "deploy", "gpt2core", "zenml", "tiktoken"},
    "pipelines": {
        "pipelines",
        "bentos",
        "steps",
        "stacks",
        "deploy",
        "gpt2core",
        "zenml",
        "yaml",
        "pydantic",
        "kubernetes",
        "click",
        "psutil",
        "filelock",
        "sqlalchemy",  # the errors of ZenML's database
        "requests",  # the webhook
    },
    "commands": {
        "commands",
        "bentos",
        "steps",
        "deploy",
        "gpt2core",
        "zenml",
        "cryptography",
        "requests",
        "statsmodels",
    },
    "commands/lineage": {"commands", "gpt2core", "zenml"},
    "deploy": {"deploy", "gpt2core", "bentoml", "psutil", "requests", "yaml"},
    "deploy/containers": {"deploy", "gpt2core", "docker", "requests", "aiohttp", "multidict", "yarl"},
    "deploy/kubernetes": {"deploy", "gpt2core", "kubernetes", "urllib3", "yaml"},
    "stacks": {"stacks", "deploy", "zenml", "yaml", "pydantic"},
    "bentos": {
        *("bentos", "gpt2core", "tiktoken", "bentoml", "fastapi", "starlette", "pydantic", "prometheus_client"),
        "pydantic_core",  # schemas.py
        *("llguidance",),  # grammar.py
        *("_bentoml_sdk", "click", "httptools", "opentelemetry", "uvicorn"),  # compat.py
    },
    "bentos/openai": {"bentos", "gpt2core", "tiktoken", "fastapi", "starlette", "pydantic"},
    "bentos/middleware": {"bentos", "starlette"},
    "benchmarks": {
        *("benchmarks", "gpt2core", "torch", "deploy"),  # deploy: the service is built and served as in the pipeline
        *("transformers", "peft", "click", "jinja2", "aiohttp", "fastapi", "uvicorn", "matplotlib"),
        *("steps", "numpy", "llama_cpp", "ctranslate2", "nncf", "openvino", "openvino_genai"),  # engines.py
    },
}
ADAPTERS = {  # the library that each adapter wraps
    "base": set(),
    "comparison": {"markupsafe", "plotly"},
    "data_check": set(),
    "download": {"requests", "urllib3", "tqdm"},
    "drift": {"evidently", "numpy", "pandas", "scipy"},
    "gguf_file": {"gguf", "torch"},
    "hub": {"huggingface_hub"},
    "model_card": {"huggingface_hub"},
    "progress": {"tqdm"},
    "judge": {"requests"},
    "pages": {"jinja2"},
    "report": {"evidently", "markupsafe", "pandas", "plotly"},
    "rouge": {"rouge_score"},
    "similarity": {"sklearn"},
    "statistics": {"numpy", "scipy", "statsmodels"},
    "sweep_report": {"markupsafe", "matplotlib"},
    "tables": {"pyarrow"},
    "tracking": {"wandb"},
    "webhook": {"requests", "urllib3"},
}
# Package -> the extras of pyproject.toml that must declare what it imports; the core dependencies count for all.
EXTRAS = {
    "gpt2core": (),
    "gpt2core/demo": ("pipeline",),
    "steps": ("pipeline", "deploy"),
    "pipelines": ("pipeline", "deploy"),
    "commands": ("pipeline", "deploy"),
    "stacks": ("pipeline", "deploy"),
    "deploy": ("deploy", "serve"),
    "bentos": ("serve",),
    "benchmarks": ("bench", "deploy", "engines"),
}
# The modules that may use names which a library does not promise to keep.
COMPAT = {
    "gpt2core/kernels.py",
    "gpt2core/inference/native.py",
    "gpt2core/cuda.py",
    "bentos/compat.py",
    "pipelines/zenml_compat.py",
    "deploy/supervisor.py",  # runs alone, so it cannot import gpt2core/kernels.py
}
PRIVATE = re.compile(r"(^|\.)_(?!_)")
FILES = [path for package in sorted(PACKAGES) for path in sorted((ROOT / package).rglob("*.py"))]


def name_of(file: Path) -> str:
    return file.relative_to(ROOT).as_posix()


@cache
def tree_of(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def imported_modules(file: Path) -> Iterator[str]:
    """Dotted names, those of imports inside functions too."""
    for node in ast.walk(tree_of(file)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name_of(file)} imports relatively"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def third_party(file: Path) -> set[str]:
    return {name.partition(".")[0] for name in imported_modules(file)} - sys.stdlib_module_names


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_a_package_imports_only_what_it_may(folder):
    files = list((ROOT / folder).glob("*.py"))
    used = {(name_of(file), name) for file in files for name in third_party(file) if name not in MAY_IMPORT[folder]}
    assert used == set()


def test_every_folder_with_code_has_an_allow_list():
    folders = {name_of(file.parent) for file in FILES if file.name != "__init__.py"}
    assert folders - MAY_IMPORT.keys() == {"steps/adapters"}


def test_each_adapter_imports_only_the_library_that_it_wraps():
    for file in (ROOT / "steps" / "adapters").glob("*.py"):
        if file.stem != "__init__":
            assert third_party(file) - {"gpt2core", "steps"} == ADAPTERS[file.stem], file.name


def test_an_init_file_is_empty():
    assert [name_of(file) for file in FILES if file.name == "__init__.py" and file.read_text()] == []


def test_private_names_of_libraries_occur_in_the_compat_modules_only():
    assert {(name_of(file), name) for file in FILES for name in private_names(file)} == set()


def private_names(file: Path) -> Iterator[str]:
    """Names with a leading underscore, imported from a library or looked up in one of its modules."""
    if name_of(file) in COMPAT:
        return
    yield from (name for name in imported_modules(file) if PRIVATE.search(name))
    modules = {name.partition(".")[0] for name in imported_modules(file)} - sys.stdlib_module_names - PACKAGES
    for node in ast.walk(tree_of(file)):
        if isinstance(node, ast.Attribute) and PRIVATE.match(node.attr):
            path = ast.unparse(node)
            if path.partition(".")[0] in modules:
                yield path


def test_foreign_function_calls_occur_in_the_kernels_module_only():
    assert {
        name_of(file) for file in FILES if "ctypes" in {name.partition(".")[0] for name in imported_modules(file)}
    } <= COMPAT


def test_nothing_is_loaded_that_can_run_code():
    words = ("pickle", "torch.load(", "torch.save(", "eval(", "exec(", "yaml.load(", "trust_remote_code")
    found = [
        (name_of(file), word)
        for file in FILES
        for word in words
        if word in file.read_text().replace(".eval()", "").replace("_eval(", "")
    ]
    assert found == []


def test_text_is_read_and_written_with_a_named_encoding():
    """Without one it is the locale's. ruff's PLW1514 misses paths whose type it does not know."""
    files = [*FILES, *ROOT.glob("*.py")]
    assert [f"{name_of(file)}:{line}" for file in files for line in locale_encoded(file)] == []


def locale_encoded(file: Path) -> Iterator[int]:
    """The lines of calls that open, read or write text, or start a process, in the locale's encoding."""
    for call in (node for node in ast.walk(tree_of(file)) if isinstance(node, ast.Call)):
        keywords = {keyword.arg for keyword in call.keywords}
        called = ast.unparse(call.func)
        modes = [*call.args, *(keyword.value for keyword in call.keywords if keyword.arg == "mode")]
        binary = any(isinstance(mode, ast.Constant) and re.fullmatch("[rwax]b[+]?", str(mode.value)) for mode in modes)
        # tarfile's; ZenML's, which has no encoding; and a file descriptor's
        other = "fileobj" in keywords or called in ("fileio.open", "os.open")
        opens = called.rpartition(".")[2] == "open" and not binary and not other
        text = any(keyword.arg == "text" and ast.unparse(keyword.value) == "True" for keyword in call.keywords)
        if (opens or text or called.endswith((".read_text", ".write_text"))) and "encoding" not in keywords:
            yield call.lineno


def test_the_core_imports_no_platform_and_changes_no_environment():
    modules = [
        ".".join(file.relative_to(ROOT).with_suffix("").parts)
        for file in FILES
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


@pytest.mark.parametrize("package", EXTRAS)
def test_what_a_package_imports_is_declared_by_its_extras(package):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [*project["dependencies"]]
    for extra in EXTRAS[package]:
        lines += project["optional-dependencies"][extra]
    declared = {canonicalize_name(Requirement(line).name) for line in lines}
    # huggingface_hub comes with transformers; compat modules use what BentoML itself depends on; the engines that
    # the benchmarks compare with are installed by `make bench` alone
    provided = packages_distributions() | {
        "huggingface_hub": ["transformers"],
        "opentelemetry": ["bentoml"],
        "pydantic_core": ["pydantic"],
        "ctranslate2": ["ctranslate2"],
        "llama_cpp": ["llama-cpp-python"],
        "nncf": ["nncf"],
        "openvino": ["openvino-genai"],
        "openvino_genai": ["openvino-genai"],
    }
    others = [ROOT / name for name in EXTRAS if name.startswith(f"{package}/")]
    files = [file for file in (ROOT / package).rglob("*.py") if not any(file.is_relative_to(other) for other in others)]
    for name in set().union(*map(third_party, files)) - PACKAGES:
        assert {canonicalize_name(distribution) for distribution in provided[name]} & declared, name


def test_the_requirements_of_the_served_image_are_the_tested_versions():
    tested = set((ROOT / "constraints.txt").read_text().splitlines())
    pinned = {line for line in (ROOT / "bentos" / "requirements.txt").read_text().splitlines() if "==" in line}
    assert len(pinned) >= 8
    assert pinned <= tested


def test_the_hashes_of_the_served_image_are_those_of_its_requirements():
    wanted = (ROOT / "bentos" / "requirements.txt").read_text().splitlines()
    pinned = {canonical(line) for line in wanted if "==" in line and not line.startswith("torch==")}
    assert hashed(ROOT / "bentos" / "requirements-hashed.txt") == pinned, "run `make hashes`"


def test_the_hashes_of_the_steps_image_are_those_of_its_dependencies_as_tested():
    tested = {canonical(line) for line in (ROOT / "constraints.txt").read_text().splitlines()}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pins = hashed(ROOT / "requirements-hashed.txt")
    assert pins - tested == set(), "run `make hashes`"
    lines = list(project["dependencies"])
    for extra in ("pipeline", "serve", "deploy"):
        lines += project["optional-dependencies"][extra]
    wanted = {canonicalize_name(Requirement(line).name) for line in lines}
    assert wanted - {pin.partition("==")[0] for pin in pins} == {"torch"}, "run `make hashes`"


def hashed(file: Path) -> set[str]:
    """The pins of a file of `make hashes`, each of which has hashes."""
    blocks = file.read_text().replace(" \\\n", " ").splitlines()
    assert all(re.fullmatch(r"\S+==\S+( +--hash=sha256:[0-9a-f]{64})+", block) for block in blocks)
    return {canonical(block.split()[0]) for block in blocks}


def canonical(pin: str) -> str:
    name, _, version = pin.partition("==")
    return f"{canonicalize_name(name)}=={version}"
