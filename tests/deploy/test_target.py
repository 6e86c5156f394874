"""The choice of a deploy target, and the form of its outcomes."""

import subprocess
import sys

from deploy.config import DeployConfig
from deploy.kubernetes.rollout import KubernetesTarget
from deploy.target import DeployOutcome, Version
from deploy.targets import open_target


def test_none_opens_no_target():
    assert open_target(DeployConfig()) is None


def test_kubernetes_opens_the_cluster(config):
    target = open_target(config)
    assert isinstance(target, KubernetesTarget)
    assert target.cluster.namespace == "gpt2-instruct"


def test_an_outcome_survives_json():
    outcome = DeployOutcome(
        "kubernetes", "deployed", "gpt2-instruct:2", previous=Version("gpt2-instruct:1", "image:1", 1)
    )
    assert DeployOutcome.from_json(outcome.to_json()) == outcome


def test_the_protocol_imports_no_client_library():
    code = "import deploy.target, sys; print(*{'docker', 'kubernetes', 'bentoml', 'torch'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
