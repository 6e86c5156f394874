import shutil
from types import SimpleNamespace

import pytest
from click.testing import CliRunner
from zenml import Model, link_artifact_to_model, save_artifact
from zenml.client import Client
from zenml.utils.pagination_utils import depaginate

from deploy.config import DeployConfig
from deploy.target import DeployError, DeployOutcome
from run import main
from steps import deploy as step
from steps.config import EvaluateConfig, PackageConfig
from steps.metadata import save_extra_artifact
from steps.model_versions import version_name
from steps.promote import Promotion
from tests.helpers import make_lineage


def test_an_image_of_a_service_that_was_never_built_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("GPT2_INSTRUCT_OUTPUTS", str(tmp_path))
    result = CliRunner().invoke(main, ["image", "service"])
    assert result.exit_code == 1
    assert result.output == "Error: there is no Bento yet; build one with: make run\n"


@pytest.fixture
def records(monkeypatch):
    """Stores outcomes, newest first, in ZenML, and hides those before; a rollback's reason is its namespace."""

    def stored(*arguments, **filters):
        return [artifact for artifact in depaginate(*arguments, **filters) if artifact.id not in hidden]

    def record(*contents):
        hidden.update(artifact.id for artifact in stored(Client().list_artifact_versions, artifact="deployment"))
        for content in reversed(contents):
            save_extra_artifact("deployment", content)

    def open_target(config):
        if config.target == "none":
            return None
        outcome = DeployOutcome("kubernetes", "rolled_back", "", reason=config.namespace)
        return SimpleNamespace(rollback=lambda: outcome)

    hidden = set()
    record()
    others = {*hidden}
    monkeypatch.setattr(step, "open_target", open_target)
    monkeypatch.setattr(step, "depaginate", stored)
    yield record
    for artifact in depaginate(Client().list_artifact_versions, artifact="deployment"):
        if artifact.id not in others:
            Client().delete_artifact_version(artifact.id)


def outcome_in(namespace, outcome, **values):
    config = {"target": "kubernetes", "image": "a:1", "namespace": namespace}
    return DeployOutcome("kubernetes", outcome, "").to_json() | {"config": config} | values


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


def test_a_rollback_needs_no_file_and_ignores_artifacts_of_other_projects(records):
    records(outcome_in("prod", "deployed", run="1"))
    [artifact] = step.depaginate(Client().list_artifact_versions, artifact="deployment")
    shutil.rmtree(artifact.uri)
    save_artifact("prod-eu", "deployment", user_metadata={"outcome": "deployed"})
    assert step.rollback().reason == "prod"


def test_a_deployment_that_a_target_refuses_fails_the_step_and_is_recorded(monkeypatch):
    def refuse(*_):
        raise DeployError("port 3000 is in use")

    recorded = []
    monkeypatch.setattr(step, "exists", lambda bento: True)
    monkeypatch.setattr(step, "open_target", lambda config: SimpleNamespace(deploy=refuse))
    monkeypatch.setattr(step, "get_step_context", lambda: SimpleNamespace(pipeline_run=SimpleNamespace(id="17")))
    monkeypatch.setattr(step, "save_extra_artifact", lambda name, content: recorded.append(content))
    config = DeployConfig(target="docker")
    with pytest.raises(DeployError, match="port 3000 is in use"):
        step.deploy.entrypoint(
            "a:1", make_lineage(), [], promotion_of("a/1"), config, PackageConfig(), EvaluateConfig()
        )
    [content] = recorded
    parts = [content[key] for key in ("target", "outcome", "bento", "reason", "run")]
    assert parts == ["docker", "failed", "a:1", "port 3000 is in use", "17"]


@pytest.fixture
def model_version():
    """A function (adapter's sha256, stage) -> the name of a new model version with this adapter, in this stage."""
    Client().create_model("staged")

    def make(sha256, stage):
        version = Client().create_model_version("staged")
        adapter = save_artifact(sha256, "adapter", user_metadata={"sha256": sha256})
        link_artifact_to_model(adapter, model=Model(name="staged", version=version.name))
        if stage:
            version.set_stage(stage, force=True)
        return version_name(version)

    yield make
    Client().delete_model("staged")


def promotion_of(version):
    return Promotion(promoted=False, stage="", model_version=version, reason="")


def test_a_required_stage_is_that_of_the_adapter_not_of_a_name_that_zenml_used_again(model_version):
    ours, other = "a" * 64, "b" * 64
    staged, unstaged = model_version(ours, "production"), model_version(ours, "")
    lineage = make_lineage(model_version=staged)
    assert lineage.adapter.sha256 == ours
    step._check_stage("staging", promotion_of(unstaged), lineage)
    Client().delete_model_version(Client().get_model_version("staged", "production").id)
    with pytest.raises(RuntimeError, match=f"{unstaged} is in no stage; .* staged {unstaged[-1]} --stage staging"):
        step._check_stage("staging", promotion_of(unstaged), lineage)
    reused = model_version(other, "production")
    with pytest.raises(RuntimeError, match="no model version has this adapter"):
        step._check_stage("staging", promotion_of(reused), make_lineage(model_version=reused))
