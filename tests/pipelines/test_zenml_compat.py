"""Each workaround for ZenML, and a test that fails when ZenML no longer needs it."""

import subprocess
import sys

import click
import pytest
from zenml.cli.pipeline import _import_pipeline
from zenml.pipelines.pipeline_definition import Pipeline

from pipelines.finetune_pipeline import finetune_pipeline
from pipelines.zenml_compat import PipelineSource
from tests.copies import ROOT


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
    environment |= {"ZENML_CUSTOM_SOURCE_ROOT": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.stdout.splitlines()[-1:] == ["PipelineSource"], done.stderr
