"""Tiny models, a tokenizer and a clean ZenML store; the user's own folders are never touched."""

import os
import tempfile
from pathlib import Path

# Before anything imports zenml, bentoml or wandb: they read these when they are imported.
ROOT = Path(__file__).parent.parent
_home = Path(tempfile.mkdtemp(prefix="gpt2-instruct-tests-"))
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
