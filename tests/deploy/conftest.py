"""An API server double for the tests of the Kubernetes target, and the configuration that leads to it."""

import pytest
import yaml

from deploy.config import DeployConfig
from deploy.kubernetes import progress, rollout
from tests.deploy.kube_api import KubeApi
from tests.helpers import make_lineage

LINEAGE = make_lineage(bento="gpt2-instruct:1111111111111111")
NEXT_LINEAGE = make_lineage("run-18", bento="gpt2-instruct:2222222222222222")
OLD, NEW = "registry.example/gpt2-instruct:1", "registry.example/gpt2-instruct@sha256:" + "2" * 64


@pytest.fixture
def fast_polling(monkeypatch):
    monkeypatch.setattr(progress, "POLL", 0.01)
    monkeypatch.setattr(progress, "IMAGE_PULL_TIMEOUT", 0.0)
    monkeypatch.setattr(rollout, "SETTLE_TIMEOUT", 0.1)


@pytest.fixture
def api(tmp_path, monkeypatch, fast_polling):
    """Knows the images OLD and NEW, whose services answer "Ottawa"."""
    monkeypatch.delenv("KUBECONFIG", raising=False)
    api = KubeApi(tmp_path)
    for image, lineage in ((OLD, LINEAGE), (NEW, NEXT_LINEAGE)):
        api.responses[image] = constant_response("Ottawa", lineage.bento)
    yield api
    api.close()


@pytest.fixture
def write_kubeconfig(tmp_path):
    def write(content: object) -> str:
        file = tmp_path / "kubeconfig"
        file.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
        return str(file)

    return write


@pytest.fixture
def config(api, write_kubeconfig):
    return DeployConfig(target="kubernetes", image=OLD, kubeconfig=write_kubeconfig(api.kubeconfig()))


def constant_response(answer: str, bento: str):
    return lambda body: {"answer": answer, "model": bento}
