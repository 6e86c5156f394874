"""One Bento and one running service for all tests of this folder that do not need a service of their own."""

import shutil

import openai
import pytest

from gpt2core.checkpoint import load_adapter, load_pretrained
from gpt2core.tokenizer import load_tokenizer
from tests.bentos.client import served
from tests.helpers import build_bento


@pytest.fixture(scope="session")
def bento_tag(base_dir, adapter_dir):
    return build_bento(base_dir, adapter_dir)


@pytest.fixture(scope="session")
def adapters(adapter_dir, tmp_path_factory):
    """A directory of adapters to load: one good, one broken; and a good one beside it that must not be reached."""
    root = tmp_path_factory.mktemp("root")
    shutil.copytree(adapter_dir, root / "adapters" / "good")
    shutil.copytree(adapter_dir, root / "outside")
    (root / "adapters" / "broken").mkdir()
    (root / "adapters" / "link").symlink_to(root / "outside")
    return root / "adapters"


@pytest.fixture(scope="session")
def request_log(tmp_path_factory):
    """The request log of `url`."""
    return tmp_path_factory.mktemp("log") / "requests.jsonl"


@pytest.fixture(scope="session")
def url(bento_tag, adapters, request_log):
    """A running service that loads adapters (GPT2_ADMIN_TOKEN is "admin")."""
    settings = {"GPT2_ADMIN_TOKEN": "admin", "GPT2_ADAPTERS_DIR": adapters, "GPT2_REQUEST_LOG": request_log}
    with served(bento_tag, **settings) as url:
        yield url


@pytest.fixture(scope="session")
def client(url):
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="session")
def tokenizer(base_dir):
    return load_tokenizer(base_dir)


@pytest.fixture(scope="session")
def base(base_dir):
    return load_pretrained(base_dir)


@pytest.fixture(scope="session")
def tuned(base_dir, adapter_dir):
    return load_adapter(load_pretrained(base_dir), adapter_dir)
