from types import SimpleNamespace

import pytest
from click.testing import CliRunner

from deploy.target import DeployError, Deployment
from run import main
from steps import deploy as step


def test_an_image_of_a_service_that_was_never_built_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("GPT2_INSTRUCT_OUTPUTS", str(tmp_path))
    result = CliRunner().invoke(main, ["image", "service"])
    assert result.exit_code == 1
    assert result.output == "Error: there is no Bento yet; build one with: make run\n"


@pytest.fixture
def records(monkeypatch):
    """Sets the recorded outcomes, newest first; a rollback's reason is the namespace that was rolled back."""

    def record(*contents):
        artifacts = [SimpleNamespace(load=lambda content=content: content) for content in contents]
        monkeypatch.setattr(step, "Client", lambda: SimpleNamespace(list_artifact_versions=None))
        monkeypatch.setattr(step, "depaginate", lambda *_, **__: artifacts)
        monkeypatch.setattr(step, "save_extra_artifact", lambda name, content: None)
        monkeypatch.setattr(step, "open_target", open_target)

    def open_target(config):
        if config.target == "none":
            return None
        outcome = Deployment("kubernetes", "rolled_back", "", reason=config.namespace)
        return SimpleNamespace(rollback=lambda: outcome)

    return record


def outcome_in(namespace, outcome, **values):
    config = {"target": "kubernetes", "image": "a:1", "namespace": namespace}
    return Deployment("kubernetes", outcome, "").to_json() | {"config": config} | values


@pytest.mark.parametrize("outcome", ["rolled_back", "failed"])
def test_a_deployment_that_failed_is_not_the_last_one(records, outcome):
    records(outcome_in("stagin", outcome, run="2"), outcome_in("prod", "deployed", run="1"))
    assert step.rollback().reason == "prod"
    records(outcome_in("stagin", outcome, run="2"))
    with pytest.raises(DeployError, match="no run has deployed anything yet"):
        step.rollback()


def test_a_rollback_on_request_is_followed_by_one_on_the_same_target(records):
    records(outcome_in("prod", "rolled_back"), outcome_in("staging", "deployed", run="2"))
    assert step.rollback().reason == "prod"
