"""Tiny models, a tokenizer and a clean ZenML store; the user's own folders are never touched."""

import atexit
import os
import shutil
import tempfile
from pathlib import Path

# Before anything imports zenml, bentoml or wandb: they read these when they are imported.
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


@pytest.fixture(scope="session")
def base_dir(tmp_path_factory):
    """A nano checkpoint with its tokenizer; the weights are random."""
    directory = tmp_path_factory.mktemp("base")
    make_base("gpt2-nano", None, seed=0, n_facts=18, directory=directory, log=None)
    return directory


@pytest.fixture(scope="session")
def adapter_dir(base_dir, tmp_path_factory):
    """An adapter for it that changes its answers."""
    model = add_lora(load_pretrained(base_dir), LoraConfig(rank=4), seed=0)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B"):
            parameter.data.normal_(generator=generator)
    return save_adapter(model, tmp_path_factory.mktemp("adapter"))
