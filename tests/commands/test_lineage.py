"""`python run.py lineage` with real runs."""

import os
import re
import subprocess
import sys

import pytest
from click.testing import CliRunner

from run import main
from tests.copies import ROOT

pytestmark = pytest.mark.timeout(900)  # whole runs; a busy machine takes several times as long


def lineage(name: str):
    return CliRunner().invoke(main, ["lineage", name], catch_exceptions=False)


def names_of(run) -> dict[str, str]:
    """Every kind of name of a run."""
    about = run.lineage
    return {
        "run": run.record.name,
        "run id": str(run.record.id),
        "model version": f"gpt2-instruct/{run.record.model_version.name}",
        "Bento": about.bento,
        "adapter": about.adapter.sha256,
        **{part: digest[:12] for part, digest in about.data.items()},
    }


@pytest.mark.parametrize("kind", ["run", "run id", "model version", "Bento", "adapter", "test"])
def test_every_name_leads_to_all_the_others(kind, deployed, cluster):
    names, about = names_of(deployed.run), deployed.run.lineage
    result = lineage(names[kind])
    assert result.exit_code == 0, result.output
    for part in (*names.values(), about.base.sha256, about.commit.sha, cluster.image, "revision 1"):
        assert part in result.output
    assert re.search(r"deployed on .* by run", result.output)


def test_latest_stands_for_the_run_that_it_links_to(dev_run, tmp_path, monkeypatch):
    monkeypatch.setenv("GPT2_INSTRUCT_OUTPUTS", str(tmp_path))
    (tmp_path / dev_run.record.name).mkdir()
    (tmp_path / "latest").symlink_to(dev_run.record.name)
    assert lineage("latest").output == lineage(dev_run.record.name).output


def test_the_lineage_of_a_run_leaves_out_other_runs(dev_run, cached_run):
    output = lineage(dev_run.record.name).output
    assert str(dev_run.record.id) in output
    assert str(cached_run.record.id) not in output


def test_a_cached_step_names_the_run_that_computed_it(dev_run, cached_run):
    assert f"cached, of run {dev_run.record.id}" in lineage(cached_run.record.name).output


def test_an_unknown_name_is_an_error_with_examples(dev_run):
    result = lineage("moon")
    assert result.exit_code == 1
    assert "nothing matches 'moon'" in result.output
    assert "(train records)" in result.output


def test_an_ambiguous_name_is_an_error_with_all_candidates(dev_run, cached_run):
    result = lineage("finetune_pipeline-")
    assert result.exit_code == 1
    assert "give more characters of one" in result.output
    assert dev_run.record.name in result.output


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("ZENML_ACTIVE_STACK_ID", "0" * 32, "No stack with this ID"),
        ("ZENML_LOGGING_VERBOSITY", "loud", "Verbosity must be one of"),
    ],
)
def test_a_wrong_variable_of_zenml_is_one_line(name, value, message):
    command = [sys.executable, str(ROOT / "run.py"), "lineage", "latest"]
    done = subprocess.run(command, env=os.environ | {name: value}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    assert message in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
