"""Each workaround for ZenML, and a test that fails when ZenML no longer needs it."""

import logging
import os
import sqlite3
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import click
import pytest
from sqlalchemy.exc import OperationalError
from zenml import pipeline, step
from zenml.cli.pipeline import _import_pipeline
from zenml.enums import ExecutionMode
from zenml.orchestrators.step_run_utils import StepRunRequestFactory
from zenml.pipelines.pipeline_definition import Pipeline

from pipelines.artifacts import is_intact
from pipelines.finetune_pipeline import finetune_pipeline
from pipelines.zenml_compat import (
    PipelineSource,
    StoreError,
    log_failed_steps_once,
    store_errors_as_one_line,
    verified_cache,
)
from steps.materializers import DirectoryMaterializer, output_directory
from tests.copies import ROOT
from tests.helpers import flip_bit


def test_zenmls_command_starts_the_source_with_its_options():
    calls = []
    source = PipelineSource(finetune_pipeline, lambda config_path, options: calls.append((config_path, options)))
    assert isinstance(source, Pipeline)  # the command requires it
    source.with_options(config_path="mine.yaml", build=None, prevent_build_reuse=True)()
    assert calls == [("mine.yaml", {"build": None, "prevent_build_reuse": True})]


def test_zenmls_command_still_requires_the_module_itself_to_be_the_pipeline():
    with pytest.raises(click.ClickException, match="does not resolve to a pipeline"):
        _import_pipeline("pipelines")


def test_importing_the_pipelines_runs_no_git_and_reads_no_configuration(tmp_path):
    code = "import finetune_pipeline, pipelines.finetune_pipeline; print(type(finetune_pipeline).__name__)"
    environment = {"PATH": str(tmp_path), "HOME": str(tmp_path), "PYTHONPATH": str(ROOT), "ZENML_ANALYTICS_OPT_IN": "0"}
    environment |= {name: os.environ[name] for name in ("ZENML_CONFIG_PATH", "ZENML_CUSTOM_SOURCE_ROOT")}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.stdout.splitlines()[-1:] == ["PipelineSource"], done.stderr


@pytest.mark.parametrize(
    ("reason", "advice"),
    [
        ("database or disk is full", r"free some space there \([\d,]+ bytes free\)$"),
        ("file is not a database", "restore it"),
    ],
)
def test_the_error_of_the_database_says_what_to_do(reason, advice):
    with pytest.raises(StoreError, match=f"{reason}; .*{advice}"), store_errors_as_one_line():
        raise OperationalError("INSERT", {}, sqlite3.OperationalError(reason))


@step(enable_cache=True, output_materializers={"directory": DirectoryMaterializer})
def make_values() -> tuple[Annotated[str, "text"], Annotated[Path, "directory"]]:
    with output_directory("values-") as directory:
        (directory / "file").write_text("some text")
    return "some text", directory


@step(enable_cache=True)
def use_values(text: str, directory: Path) -> None:
    assert text == (directory / "file").read_text() == "some text"


@pipeline
def values() -> None:
    use_values(*make_values())


@pipeline
def unused() -> None:
    make_values()


def _cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


@pytest.mark.parametrize("output", ["text", "directory"])
@pytest.mark.parametrize("damage", [Path.unlink, _cut, flip_bit])
def test_a_cached_step_runs_again_if_its_artifact_is_damaged(damage, output, caplog, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for file in Path(values().steps["make_values"].outputs[output][0].uri).iterdir():
        damage(file)

    unchecked = unused()
    assert unchecked.steps["make_values"].status.value == "cached"  # otherwise the workaround is not needed any more
    with caplog.at_level(logging.WARNING), verified_cache(is_intact):
        again = values()
        cached = values()

    assert again.steps["make_values"].status.value == "completed"
    assert f"step make_values runs again: its cached artifact {output}" in caplog.text
    assert cached.steps["make_values"].status.value == "cached"
    assert list(tmp_path.iterdir()) == []


@step
def fail() -> None:
    raise ValueError("wrong")


@pipeline(execution_mode=ExecutionMode.FAIL_FAST)
def failing() -> None:
    fail()


def test_a_failed_step_is_logged_without_its_traceback(caplog):
    with pytest.raises(ValueError, match="wrong"), caplog.at_level(logging.ERROR):
        failing()
    assert any(record.exc_info for record in caplog.records)  # otherwise the workaround is not needed any more
    caplog.clear()
    with pytest.raises(ValueError, match="wrong"), caplog.at_level(logging.ERROR), log_failed_steps_once():
        failing()
    assert "Failed to run step `fail`: wrong" in caplog.text
    assert not any(record.exc_info for record in caplog.records)


def test_an_interruption_before_a_step_is_not_logged(caplog, monkeypatch):
    def interrupt(*_: object, **options: object) -> None:
        raise KeyboardInterrupt

    uncached = failing.with_options(enable_cache=False)  # ZenML's look-up of cached steps would be interrupted first
    monkeypatch.setattr(StepRunRequestFactory, "populate_request", interrupt)
    with pytest.raises(KeyboardInterrupt), caplog.at_level(logging.ERROR):
        uncached()
    assert any(record.exc_info for record in caplog.records)  # otherwise the workaround is not needed any more
    caplog.clear()
    with pytest.raises(KeyboardInterrupt), caplog.at_level(logging.ERROR), log_failed_steps_once():
        uncached()
    assert not caplog.records


def test_zenmls_command_writes_no_colors_into_a_pipe(tmp_path):
    code = (
        "import contextlib, logging, click, finetune_pipeline as source\n"
        "with contextlib.suppress(click.ClickException): source.with_options(config_path='missing.yaml')()\n"
        "logging.getLogger('zenml').warning('a message')"
    )
    removed = ("ZENML_LOGGING_VERBOSITY", "ZENML_LOGGING_COLORS_DISABLED")
    environment = {name: value for name, value in os.environ.items() if name not in removed} | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=240)
    output = done.stdout + done.stderr
    assert "a message" in output
    assert "\x1b" not in output
