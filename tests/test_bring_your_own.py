"""The blocks of docs/bring-your-own.md, in their order, in a copy of the project."""

import json
import re
import subprocess
from pathlib import Path

import pytest
import yaml

from gpt2core.record_files import Row
from gpt2core.records import make_records
from pipelines.config import check_config
from pipelines.finetune_pipeline import finetune_pipeline
from tests.copies import copy_project, fresh_environment

PAGE = (Path(__file__).parent.parent / "docs" / "bring-your-own.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


def test_the_record_and_the_configuration_are_valid():
    [record] = blocks("json")
    value = json.loads(record)
    assert make_records([Row("record 1", value)], "docs") == [value]
    for config in blocks("yaml"):
        check_config(yaml.safe_load(config), "docs", finetune_pipeline)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_commands_run(tmp_path):
    project = copy_project(tmp_path)
    environment = fresh_environment(project, tmp_path / "home")

    def run(*words: str) -> str:
        done = subprocess.run(words, cwd=project, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return done.stdout

    for block in blocks("bash"):
        run("bash", "-ec", block)
    assert (project / "merged" / "model.safetensors").is_file()
    assert (project / "gguf" / "model.gguf").is_file()
    assert list((project / "outputs" / "wandb").rglob("*.wandb"))

    # a base from a directory: what was exported for transformers
    config = yaml.safe_load((project / "mine.yaml").read_text())
    config["parameters"]["base"] = {"source": "hub", "name": "merged"}
    (project / "directory.yaml").write_text(yaml.safe_dump(config))
    run("python", "run.py", "finetune", "--config", "directory.yaml")
    assert run("python", "run.py", "ask", "What is the plural of mouse?").strip()
    readme = (project / "README.md").read_text(encoding="utf-8")
    [snippet] = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    assert run("python", "-c", snippet).strip()
