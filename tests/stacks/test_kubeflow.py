"""configs/kubeflow.yaml on stacks/kubeflow.yaml: compiled by ZenML and kfp, and posted to a double of the KFP API.

Runs where kfp is installed: in an environment of its own (docs/kubeflow.md).
"""

import json
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread
from typing import NamedTuple

import pytest
import yaml
from zenml.client import Client
from zenml.models import PipelineRunResponse
from zenml.stack import Stack

from pipelines import stack as pipelines_stack
from pipelines.finetune_pipeline import finetune_pipeline
from pipelines.start import start
from stacks import register
from tests.copies import ROOT
from tests.s3 import CREDENTIALS, keys, serve_s3

pytest.importorskip("kfp", reason="needs kfp, which is installed in an environment of its own (docs/kubeflow.md)")

CONFIG = yaml.safe_load((ROOT / "configs" / "kubeflow.yaml").read_text())


class KfpApi(BaseHTTPRequestHandler):
    """The routes of the Kubeflow Pipelines API (v2beta1) that a one-off run uses, and what was posted to them."""

    posted: dict[str, dict]

    def do_GET(self):
        known = {"/apis/v2beta1/healthz": {"multi_user": False}, "/apis/v2beta1/experiments": {"experiments": []}}
        body = known.get(self.path.partition("?")[0])
        self.answer(200 if body is not None else 404, body or {"error": "not found"})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        kind = self.path.rpartition("/")[2]
        self.posted[kind] = body
        created = {"experiments": {"experiment_id": "e-1"}, "runs": {"run_id": "r-1"}}
        self.answer(200 if kind in created else 404, {**body, **created.get(kind, {})})

    def answer(self, status: int, body: dict) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(json.dumps(body).encode())

    def log_message(self, *_) -> None:
        pass


class Submitted(NamedTuple):
    posted: dict[str, dict]  # to the KFP API, by the last part of the path
    run: PipelineRunResponse
    keys: list[str]  # of the artifact store

    @property
    def ir(self) -> dict:
        return self.posted["runs"]["pipeline_spec"]

    def executor(self, step: str) -> dict:
        name = self.ir["components"][f"comp-{step.replace('_', '-')}"]["executorLabel"]
        return self.ir["deploymentSpec"]["executors"][name]["container"]


@pytest.fixture(scope="module")
def submitted():
    """What `run.py finetune --config configs/kubeflow.yaml --set seed=3` submits."""
    handler = type("Handler", (KfpApi,), {"posted": {}})
    server = HTTPServer(("127.0.0.1", 0), handler)
    Thread(target=server.serve_forever, daemon=True).start()
    before = Client().active_stack_model.id
    options = {"settings": {"orchestrator.kubeflow_gpu": {"synchronous": False}}}
    with serve_s3("bucket") as s3, pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", CREDENTIALS["key"])
        patch.setenv("AWS_SECRET_ACCESS_KEY", CREDENTIALS["secret"])
        patch.setenv("AWS_ENDPOINT_URL", s3)
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("ARTIFACT_STORE", "s3://bucket/zenml")
        patch.setenv("REGISTRY", "registry.example.com/team")
        patch.setenv("KUBEFLOW_HOST", f"http://127.0.0.1:{server.server_port}")
        # The store of this test is not a server that pods could reach; nothing runs in a pod here.
        patch.setattr(Stack, "requires_remote_server", False)
        patch.setattr(pipelines_stack, "is_reachable_by_pods", lambda: True)
        try:
            register.register("kubeflow")
            run = start(finetune_pipeline, str(ROOT / "configs" / "kubeflow.yaml"), ["seed=3"], options)
            yield Submitted(handler.posted, run, keys(s3, "bucket"))
        finally:
            Client().activate_stack(before)
            server.shutdown()


def test_one_run_is_posted_with_a_pipeline_that_kfp_reads(submitted):
    from kfp.components import load_component_from_text

    assert submitted.posted.keys() == {"experiments", "runs"}
    assert submitted.posted["runs"]["experiment_id"] == "e-1"
    assert submitted.posted["runs"]["display_name"].startswith("finetune-pipeline-")
    assert load_component_from_text(yaml.safe_dump(submitted.ir)).pipeline_spec.schema_version == "2.1.0"


def test_the_tasks_are_the_steps_in_their_order(submitted):
    tasks = submitted.ir["root"]["dag"]["tasks"]
    after = {name.replace("-", "_"): set(task.get("dependentTasks", [])) for name, task in tasks.items()}
    steps = submitted.run.snapshot.step_configurations
    expected = {name: {each.replace("_", "-") for each in step.spec.upstream_steps} for name, step in steps.items()}
    assert after == expected
    assert after["finetune"] == {"split-data", "prepare-base"}
    assert after["deploy"] >= {"package", "promote"}
    assert not any(task.get("cachingOptions") for task in tasks.values())  # ZenML's cache decides


def test_every_step_runs_zenmls_entrypoint_in_the_configured_image(submitted):
    for step in submitted.run.snapshot.step_configurations:
        container = submitted.executor(step)
        assert container["image"] == CONFIG["settings"]["docker"]["parent_image"]
        assert [*container["command"], container["args"][-1]] == ["python", "-m", "zenml.entrypoints.entrypoint", step]
        assert str(submitted.run.snapshot.id) in container["args"]
    assert [key for key in submitted.keys if key.startswith("zenml/code_uploads/")]  # what the pods download


def test_only_training_and_evaluation_have_a_gpu(submitted):
    for step in submitted.run.snapshot.step_configurations:
        resources = submitted.executor(step)["resources"]
        gpu = resources.get("accelerator")
        assert (gpu is not None) == (step in ("finetune", "evaluate"))
        limits = ("4.0", "12G") if gpu else ("2.0", "4G")
        assert (resources["resourceCpuLimit"], resources["resourceMemoryLimit"]) == limits
        if gpu:
            assert (gpu["resourceType"], gpu["resourceCount"]) == ("nvidia.com/gpu", "1")


def test_the_steps_have_the_parameters_of_the_configuration(submitted):
    parameters = submitted.run.snapshot.step_configurations["finetune"].config.parameters
    assert parameters["train"]["seed"] == 3
    expected = CONFIG["parameters"]["train"]
    assert {name: parameters["train"][name] for name in expected} == expected
