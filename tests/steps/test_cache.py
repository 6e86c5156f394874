from pathlib import Path

import pytest
from zenml.utils import source_utils

from deploy import bento, source
from steps import cache
from steps.package import package


def files_of(module: str, *others: str) -> set[str]:
    return set(cache.code_of(module, *others).file_dependencies)


def test_the_key_of_a_step_covers_its_own_file_and_all_transitive_imports():
    files = files_of("steps.finetune")
    assert {"steps/finetune.py", "gpt2core/train.py", "gpt2core/model.py", "steps/adapters/tracking.py"} <= files


@pytest.mark.parametrize(
    ("step", "foreign"), [("steps.split_data", "gpt2core/train.py"), ("steps.finetune", "steps/adapters/report.py")]
)
def test_the_key_does_not_cover_files_that_the_step_does_not_use(step, foreign):
    assert foreign not in files_of(step)


def test_additional_modules_and_files_are_covered():
    policy = cache.code_of("steps.package", "bentos.service", files=["bentos/Dockerfile"])
    assert {"bentos/service.py", "bentos/page.html", "bentos/Dockerfile"} <= set(policy.file_dependencies)


@pytest.mark.parametrize(
    ("step", "files"),
    [
        ("steps.package", {"model_card.md.j2", "model_card_results.md.j2"}),
        ("steps.report", {"report.html.j2", "report.css"}),
        ("bentos.service", {"native.c", "avx2.h", "cuda.cu", "page.html"}),
    ],
)
def test_the_key_covers_templates_and_sources_that_modules_name(step, files):
    assert files <= {Path(file).name for file in files_of(step)}


def test_paths_are_relative_to_the_root():
    for file in files_of("steps.evaluate"):
        assert (source.ROOT / file).is_file()


@pytest.fixture
def write_code(tmp_path, monkeypatch):
    def write(files: dict[str, str]) -> None:
        for name, text in files.items():
            file = tmp_path / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)

    monkeypatch.setattr(source, "ROOT", tmp_path)
    return write


def test_imports_within_functions_and_of_modules_from_packages_are_followed(write_code):
    write_code(
        {
            "steps/__init__.py": "",
            "steps/one.py": "def f():\n    from steps.adapters import two\n",
            "steps/adapters/__init__.py": "",
            "steps/adapters/two.py": "import gpt2core.three\nimport json\n",
            "gpt2core/three.py": "from steps.one import f\n",
            "gpt2core/alone.py": "",
        }
    )
    assert files_of("steps.one") == {
        "steps/__init__.py",
        "steps/one.py",
        "steps/adapters/__init__.py",
        "steps/adapters/two.py",
        "gpt2core/three.py",
    }


def test_files_that_no_module_names_are_in_no_key(write_code):
    """ZenML uploads code without the files that git ignores: in a container, a key with one of them is an error."""
    used = {
        "steps/one.py": "render('page.html.j2')",
        "steps/page.html.j2": "{% include 'page.css' %}",
        "steps/page.css": "",
    }
    write_code(used)
    write_code(
        dict.fromkeys(("steps/.env", "steps/one.pem", "steps/one.so", "steps/one.j2", "steps/page.html.j2~"), "")
    )
    assert files_of("steps.one") == used.keys()


def test_the_key_of_package_covers_the_kernels(tmp_path, monkeypatch):
    """They are not in git, and in the image of the steps not in the checkout."""
    library = tmp_path / "library.so"
    monkeypatch.setattr(bento, "library_files", lambda: {"name": library} if library.exists() else {})
    digest = source_utils.load(package.configuration.cache_policy.cache_func)
    found = [digest()]
    for content in (b"one", b"two"):
        library.write_bytes(content)
        found.append(digest())
    assert len(set(found)) == 3
