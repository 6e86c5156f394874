from pathlib import Path

import pytest

from steps import cache


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


def test_additional_modules_are_covered():
    assert "bentos/service.py" in files_of("steps.package", "bentos.service")


def test_all_files_of_an_additional_folder_are_covered():
    files = set(cache.code_of("steps.package", folder="bentos").file_dependencies)
    assert {"bentos/Dockerfile", "bentos/requirements.txt", "bentos/service.py"} <= files


def test_paths_are_relative_to_the_root():
    for file in files_of("steps.evaluate"):
        assert (cache.ROOT / file).is_file()


def test_imports_within_functions_and_of_modules_from_packages_are_followed(tmp_path, monkeypatch):
    for name, text in {
        "steps/__init__.py": "",
        "steps/one.py": "def f():\n    from steps.adapters import two\n",
        "steps/adapters/__init__.py": "",
        "steps/adapters/two.py": "import gpt2core.three\nimport json\n",
        "gpt2core/three.py": "from steps.one import f\n",
        "gpt2core/alone.py": "",
    }.items():
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    monkeypatch.setattr(cache, "ROOT", Path(tmp_path))

    assert files_of("steps.one") == {
        "steps/one.py",
        "steps/adapters/__init__.py",
        "steps/adapters/two.py",
        "gpt2core/three.py",
    }
