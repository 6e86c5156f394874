import json
import shutil
import socket
import subprocess
import sys

import pytest
from tokenizers import ByteLevelBPETokenizer
from transformers import GPT2Config, GPT2LMHeadModel

from gpt2core.checkpoint import directory_sha256, load_pretrained
from gpt2core.tokenizer import END_OF_TEXT, load_tokenizer
from gpt2core.types import BaseRef
from steps.adapters.base import open_base, write_base
from steps.adapters.hub import HubError, fetch_base

REVISION = "0123456789abcdef0123456789abcdef01234567"

IMPORT = "from gpt2core.types import BaseRef; from steps.adapters.hub import fetch_base"


def fetch(name: object, revision: str = ""):
    return fetch_base(BaseRef(str(name), revision, sha256=""))


@pytest.fixture(scope="module")
def saved(base_dir, tmp_path_factory):
    """A directory as transformers writes it, with the two files of the tokenizer."""
    directory = tmp_path_factory.mktemp("saved")
    vocab_size = load_tokenizer(base_dir).n_vocab
    config = GPT2Config(n_layer=1, n_head=2, n_embd=8, n_positions=16, vocab_size=vocab_size)
    GPT2LMHeadModel(config).save_pretrained(directory)
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(base_dir / name, directory)
    return directory


@pytest.fixture
def copy(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "base")


def test_a_directory_is_a_base_named_by_its_path_with_the_digest_of_its_model_files(copy):
    (copy / "README.md").write_text("more")
    fetched = fetch(copy)
    names = ["config.json", "generation_config.json", "merges.txt", "model.safetensors", "vocab.json"]
    assert fetched.ref == BaseRef(str(copy), "", directory_sha256(copy, names))
    load_pretrained(fetched.path)


def test_sharded_weights_are_part_of_the_digest(copy):
    model = GPT2LMHeadModel.from_pretrained(copy)
    (copy / "model.safetensors").unlink()
    model.save_pretrained(copy, max_shard_size="2KB")
    assert len(list(copy.glob("model-*-of-*.safetensors"))) > 1
    load_pretrained(copy)
    before = fetch(copy).ref.sha256
    shard = next(copy.glob("model-00001-of-*"))
    shard.write_bytes(shard.read_bytes() + b" ")
    assert fetch(copy).ref.sha256 != before


@pytest.mark.parametrize("name", ["config.json", "vocab.json", "model.safetensors"])
def test_a_base_with_a_missing_file_is_refused_with_the_name_of_the_file(copy, name):
    (copy / name).unlink()
    with pytest.raises(HubError, match="safetensors" if name.startswith("model") else name):
        fetch(copy)


def test_another_architecture_is_refused(copy):
    (copy / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(HubError, match="llama"):
        fetch(copy)


def test_a_base_that_changed_after_it_was_recorded_is_refused(copy):
    recorded = fetch(copy).ref
    reference = copy.parent / "reference"
    write_base(reference, recorded, {})
    assert open_base(reference) == copy
    (copy / "merges.txt").write_text("#version: 0.2\n")
    with pytest.raises(HubError, match=recorded.sha256):
        open_base(reference)


@pytest.mark.parametrize("revision", ["", "main", "v1", "0123", REVISION.upper()])
def test_a_revision_that_may_move_is_refused(revision):
    with pytest.raises(HubError, match="40 hexadecimal digits"):
        fetch("someone/gpt2", revision)


@pytest.mark.parametrize("name", ["someone/gpt2", "no such/name at all", "../gpt2"])
def test_a_failed_download_is_an_error_that_says_what_to_check(name):
    with pytest.raises(HubError, match="check the network"):  # conftest.py sets HF_HUB_OFFLINE
        fetch(name, REVISION)


def test_a_repository_in_the_cache_is_used_without_a_network(copy, tmp_path):
    snapshot = tmp_path / "cache" / "models--someone--gpt2" / "snapshots" / REVISION
    shutil.copytree(copy, snapshot)
    code = f"{IMPORT}; print(fetch_base(BaseRef('someone/gpt2', '{REVISION}', '')).path)"
    environment = {"HF_HUB_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1", "HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == str(snapshot), done.stderr


@pytest.mark.slow  # huggingface_hub retries for half a minute
def test_a_hub_that_does_not_answer_is_an_error(tmp_path):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{unused.getsockname()[1]}"
    code = f"{IMPORT}; fetch_base(BaseRef('someone/gpt2', '{REVISION}', ''))"
    environment = {"HF_ENDPOINT": endpoint, "HF_HUB_CACHE": str(tmp_path), "HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert "HubError: someone/gpt2" in done.stderr


def test_a_tokenizer_json_alone_is_enough(copy):
    tokenizer = ByteLevelBPETokenizer(str(copy / "vocab.json"), str(copy / "merges.txt"))
    tokenizer.add_special_tokens([END_OF_TEXT])
    (copy / "merges.txt").unlink()
    (copy / "vocab.json").unlink()
    with pytest.raises(HubError, match=r"no tokenizer\.json, nor vocab\.json and merges\.txt"):
        fetch(copy)
    tokenizer.save(str(copy / "tokenizer.json"))
    before = fetch(copy)
    load_tokenizer(before.path)
    (copy / "tokenizer.json").write_text((copy / "tokenizer.json").read_text() + " ")
    assert fetch(copy).ref.sha256 != before.ref.sha256


def test_a_directory_has_no_revision(copy):
    assert fetch(copy, REVISION).ref.revision == ""
