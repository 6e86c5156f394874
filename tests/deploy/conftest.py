"""Fixtures of the targets' tests: an API server double with a configuration for it, and images in the local engine."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from secrets import token_hex

import docker
import pytest
import yaml

from deploy import bento, source
from deploy.config import DeployConfig
from deploy.containers import images
from deploy.containers.client import EngineError, connect
from deploy.containers.images import Image, build_service
from deploy.kubernetes import client, lock, rollout, wait
from deploy.server import serve
from deploy.verify import request_answer
from tests.copies import copy_project
from tests.deploy.kube_api import KubeApi
from tests.deploy.kube_target import LINEAGE, NEW, NEXT_LINEAGE, OLD, constant_response
from tests.helpers import build_bento, make_sample


@pytest.fixture
def fast_polling(monkeypatch):
    for module, name in ((wait, "POLL"), (lock, "POLL"), (client, "OUTAGE_POLL")):
        monkeypatch.setattr(module, name, 0.01)
    monkeypatch.setattr(wait, "IMAGE_PULL_TIMEOUT", 0.0)
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


MAX_NEW_TOKENS = 5
SESSION = token_hex(8)  # part of the run's name in the lineage, so that no two test sessions share an image
CANARY = "canary-of-the-building-machine"
SECRETS = ("HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "GPT2_API_TOKEN", "GPT2_INSTRUCT_WEBHOOK")


@pytest.fixture(scope="session")
def with_secrets(tmp_path_factory):
    """Context manager: images are built from a checkout with secrets in untracked files, and in the environment."""
    checkout = copy_project(tmp_path_factory.mktemp("checkout"))
    for folder in (".", "bentos", "gpt2core"):
        for name in (".env", "key.pem", "local_settings.py"):
            (checkout / folder / name).write_text(f'HF_TOKEN = "{CANARY}, in a file"\n')

    @contextmanager
    def context():
        with pytest.MonkeyPatch.context() as patch:
            for module in (bento, images, source):
                patch.setattr(module, "ROOT", checkout)
            for name in SECRETS:
                patch.setenv(name, f"{CANARY}, in {name}")
            yield

    return context


@pytest.fixture(scope="session")
def engine() -> Iterator[docker.DockerClient]:
    """The container engine, with the base image of the Dockerfiles."""
    base = os.environ.get("BASE_IMAGE", "python:3.11-slim-bookworm")
    try:
        with connect() as client:
            found = tagged(client, base) or client.images.pull(base)
            assert found.id
    except EngineError as error:
        pytest.skip(f"{error} (BASE_IMAGE selects another base image than {base})")
    with connect() as client:
        yield client


def tagged(engine: docker.DockerClient, reference: str) -> docker.models.images.Image | None:
    try:
        return engine.images.get(reference)
    except docker.errors.ImageNotFound:
        return None


@pytest.fixture(scope="session")
def make_image(engine, base_dir, adapter_dir, with_secrets):
    """Build a Bento and its image. At the end all images are removed, and the user's own `latest` tags are restored."""
    made = []
    latest = {name: tagged(engine, f"{name}:latest") for name in (bento.NAME, f"{bento.NAME}-steps")}

    def make(run: str) -> Image:
        with with_secrets():
            tag = build_bento(base_dir, adapter_dir, f"{run}-{SESSION}")
            made.append(tag)
            image = build_service(tag)
        assert engine.images.get(f"{bento.NAME}:latest").id == image.digest  # here: the next build moves it on
        return image

    yield make
    for tag in made:
        engine.images.remove(tag, force=True)
    for name, image in latest.items():
        if image is not None:
            image.tag(name, "latest")
        elif tagged(engine, f"{name}:latest") is not None:
            engine.images.remove(f"{name}:latest")


@pytest.fixture(scope="session")
def first(make_image):
    return make_image("first")


@pytest.fixture(scope="session")
def second(make_image):
    return make_image("second")


@pytest.fixture(scope="session")
def samples(first):
    """Records with the answers of the model that all these images serve."""
    with serve(first.reference) as url:
        return [
            make_sample(text, input, tuned=request_answer(url, text, input, MAX_NEW_TOKENS))
            for text, input in (("Hello.", ""), ("Name the capital.", "France"))
        ]
