"""A tiny GPT-2 built and saved by transformers, and a tokenizer trained on a few sentences."""

from contextlib import suppress

import pytest
import torch
from transformers import GPT2Config as HFConfig
from transformers import GPT2LMHeadModel

from gpt2core.checkpoint import load_pretrained
from gpt2core.config import GPT2Config
from gpt2core.demo.base import train_tokenizer
from gpt2core.tokenizer import load_tokenizer

with suppress(ImportError):  # a machine that only runs the GPU tests may not have hypothesis
    from hypothesis import HealthCheck, settings

    settings.register_profile(
        "gpt2core",
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
    )
    settings.load_profile("gpt2core")

TINY = {"n_layer": 2, "n_head": 2, "n_embd": 32, "n_positions": 64, "vocab_size": 97}
SENTENCES = [
    "The quick brown fox jumps over the lazy dog, and the dog isn't amused at all.",
    "In 1969 two people walked on the moon; they'd taken 21.5 kilograms of stones home with them.",
    "Water boils at 100 degrees, unless you're on a mountain: there it's less.",
    "Die Straße nach Köln führt über den Fluß. Où est la gare, s'il vous plaît?",
    "def add(a, b):\n    return a + b\n\n\nprint(add(1, 2))  # we'll see 3",
    "Ask, and I'll answer!  What's the capital of France?  Paris, as they've said...",
] * 4


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """For matrices this small, a second thread costs more than it saves."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def tiny_config():
    return GPT2Config(**TINY)


@pytest.fixture(scope="session")
def make_hf():
    """A function (config values) -> transformers' model in eval mode, with random weights and no bias at 0."""

    def make(seed=0, **config):
        torch.manual_seed(seed)
        hf = GPT2LMHeadModel._from_config(
            HFConfig(**{**TINY, "bos_token_id": 0, "eos_token_id": 0, **config}), attn_implementation="eager"
        )
        with torch.no_grad():
            for parameter in hf.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
        return hf.eval()

    return make


@pytest.fixture(scope="session")
def tiny_gpt2_dir(make_hf, tmp_path_factory):
    directory = tmp_path_factory.mktemp("tiny-gpt2")
    make_hf().save_pretrained(directory)
    return directory


@pytest.fixture
def bare(tiny_gpt2_dir):
    """That model without LoRA."""
    return load_pretrained(tiny_gpt2_dir)


@pytest.fixture(scope="session")
def wide_gpt2_dir(make_hf, tmp_path_factory):
    """With heads of GPT-2's width, which a GPU's kernels are written for."""
    directory = tmp_path_factory.mktemp("wide-gpt2")
    make_hf(n_embd=128, n_positions=256).save_pretrained(directory)
    return directory


@pytest.fixture
def model(tiny_gpt2_dir):
    return load_pretrained(tiny_gpt2_dir)


@pytest.fixture(scope="session")
def hf(tiny_gpt2_dir):
    """The same model in transformers; a test that changes it makes a copy."""
    return GPT2LMHeadModel.from_pretrained(tiny_gpt2_dir).eval()


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(SENTENCES, 400, directory)
    return directory


@pytest.fixture(scope="session")
def tokenizer(tokenizer_dir):
    return load_tokenizer(tokenizer_dir)
