"""Tiny models, dev-size runs and a clean ZenML store. The user's own directories are never used."""

import atexit
import json
import logging
import os
import shutil
import tempfile
from pathlib import Path
from types import SimpleNamespace

# Set before zenml, bentoml and wandb are imported: they read these at import.
ROOT = Path(__file__).parent.parent
_home = Path(tempfile.mkdtemp(prefix="gpt2-instruct-tests-"))
atexit.register(shutil.rmtree, _home, ignore_errors=True)
(_home / "repository" / ".zen").mkdir(parents=True)
os.environ.update(
    ZENML_CONFIG_PATH=str(_home / "zenml"),
    ZENML_REPOSITORY_PATH=str(_home / "repository"),
    ZENML_CUSTOM_SOURCE_ROOT=str(ROOT),
    ZENML_ANALYTICS_OPT_IN="false",
    ZENML_LOGGING_VERBOSITY="ERROR",
    BENTOML_HOME=str(_home / "bentoml"),
    BENTOML_DO_NOT_TRACK="true",
    DO_NOT_TRACK="1",
    WANDB_MODE="disabled",
    HF_HUB_OFFLINE="1",
    TOKENIZERS_PARALLELISM="false",
)
for _name in ("WANDB_API_KEY", "BENTOML_CONFIG", "PORT", "BENTOML_PORT"):
    os.environ.pop(_name, None)

import pytest  # noqa: E402
import torch  # noqa: E402

from gpt2core.checkpoint import load_pretrained, save_adapter  # noqa: E402
from gpt2core.config import LoraConfig  # noqa: E402
from gpt2core.demo.base import make_base  # noqa: E402
from gpt2core.lora import add_lora  # noqa: E402


def pytest_ignore_collect(collection_path, config):
    """`pytest -m gpu` collects no file without such a test: a GPU machine may lack what the others import."""
    if config.option.markexpr != "gpu" or "tests" not in collection_path.parts:
        return None
    path = collection_path.relative_to(ROOT / "tests").as_posix()
    return None if path in (".", "gpt2core", "gpt2core/test_gpu.py", "gpt2core/test_cuda.py") else True


@pytest.fixture(autouse=True)
def warnings_are_logged(caplog):
    """Set the root logger's level, which ZenML raises when a run of another test ends."""
    caplog.set_level(logging.WARNING)


@pytest.fixture(scope="session")
def base_dir(tmp_path_factory):
    """A nano checkpoint with random weights, and its tokenizer."""
    directory = tmp_path_factory.mktemp("base")
    make_base("gpt2-nano", None, seed=0, n_facts=18, directory=directory, log=None)
    return directory


@pytest.fixture(scope="session")
def adapter_dir(base_dir, tmp_path_factory):
    """An adapter for `base_dir` that changes its answers."""
    model = add_lora(load_pretrained(base_dir), LoraConfig(rank=4), seed=0)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B"):
            parameter.data.normal_(generator=generator)
    return save_adapter(model, tmp_path_factory.mktemp("adapter"))


@pytest.fixture(scope="session")
def outputs(tmp_path_factory):
    """The outputs/ of the runs below."""
    return tmp_path_factory.mktemp("project") / "outputs"


@pytest.fixture(scope="session")
def dev_run(outputs):
    """A run of configs/dev.yaml, a minute on two cores; shared, because it is the slowest part of the tests."""
    from tests.runs import finetune

    return finetune(outputs)


@pytest.fixture(scope="session")
def cached_run(outputs, dev_run):
    """The same run again, from the cache; promoted, because by perplexity it is better than its base."""
    from tests.runs import finetune

    return finetune(outputs, "promote.metric=perplexity")


@pytest.fixture(scope="session")
def cluster(tmp_path_factory):
    """A test double of a cluster's API, and the values that deploy to it."""
    from deploy.kubernetes import wait
    from tests.deploy.kube_api import KubeApi

    directory = tmp_path_factory.mktemp("cluster")
    api = KubeApi(directory)
    kubeconfig = directory / "kubeconfig"
    kubeconfig.write_text(json.dumps(api.kubeconfig()))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(wait, "POLL", 0.05)
        yield SimpleNamespace(
            api=api,
            image="registry.example/gpt2-instruct:1",
            values=("deploy.target=kubernetes", f"deploy.kubeconfig={kubeconfig}"),
        )
    api.close()


@pytest.fixture(scope="session")
def deployed(outputs, cached_run, cluster):
    """A run deployed to the cluster, whose service is the Bento itself, served at `url`."""
    from deploy.server import serve
    from tests.runs import finetune

    with serve(finetune(outputs).lineage.bento) as url:
        cluster.api.responses[cluster.image] = url
        run = finetune(outputs, *cluster.values, f"deploy.image={cluster.image}")
        yield SimpleNamespace(run=run, url=url)
