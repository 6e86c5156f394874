import json
import re
import shutil
import socket
import subprocess
import sys
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

import pytest
from tokenizers import ByteLevelBPETokenizer
from transformers import GPT2Config, GPT2LMHeadModel

from gpt2core.checkpoint import load_pretrained
from gpt2core.files import directory_sha256
from gpt2core.tokenizer import END_OF_TEXT, load_tokenizer
from gpt2core.types import BaseRef
from steps.adapters.base import open_base, write_base
from steps.adapters.hub import HubError, fetch_base
from steps.config import DataConfig
from steps.fetch_data import read_source

INDEX = "model.safetensors.index.json"
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


def test_the_reference_to_a_directory_holds_in_another_working_directory(copy, monkeypatch, tmp_path):
    monkeypatch.chdir(copy)
    fetched = fetch("../base")
    monkeypatch.chdir("/")
    assert fetch_base(fetched.ref) == fetched
    (tmp_path / "link").symlink_to(copy)
    assert fetch(tmp_path / "link").ref == fetched.ref  # a link like outputs/latest may change


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


@pytest.fixture
def renamed(copy):
    """Shards with names of another tool, through the index."""
    model = GPT2LMHeadModel.from_pretrained(copy)
    (copy / "model.safetensors").unlink()
    model.save_pretrained(copy, max_shard_size="2KB")
    for shard in copy.glob("model-*-of-*.safetensors"):
        shard.rename(copy / shard.name.replace("model-", "weights_"))
    index = copy / INDEX
    index.write_text(index.read_text().replace("model-", "weights_"))
    return copy


def test_shards_of_any_name_are_found_by_the_index_and_are_part_of_the_digest(renamed):
    before = fetch(renamed)
    load_pretrained(before.path)
    shards = sorted(file.name for file in renamed.glob("weights_*"))
    others = ["config.json", "generation_config.json", "merges.txt", INDEX, "vocab.json"]
    assert before.ref.sha256 == directory_sha256(renamed, [*others, *shards])
    (renamed / shards[0]).write_bytes((renamed / shards[0]).read_bytes() + b" ")
    assert fetch(renamed).ref.sha256 != before.ref.sha256
    (renamed / shards[-1]).unlink()
    with pytest.raises(HubError, match=f"{shards[-1]}, which its index names"):
        fetch(renamed)


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd", "sub/x.safetensors", "..", ".", "x.bin", ""])
def test_an_index_that_reaches_outside_its_directory_is_refused(renamed, name):
    (renamed.parent / "secret.safetensors").write_bytes(b"")
    (renamed / INDEX).write_text(json.dumps({"weight_map": {"wte.weight": name}}))
    with pytest.raises(HubError, match=rf"{INDEX}: shard '{name}' is not the plain name of a .safetensors file"):
        fetch(renamed)


def test_an_index_beside_the_whole_model_does_not_change_the_digest(copy):
    (copy / INDEX).write_text(json.dumps({"weight_map": {"wte.weight": "other.safetensors"}}))
    (copy / "other.safetensors").write_bytes(b"")
    names = ["config.json", "generation_config.json", "merges.txt", "model.safetensors", INDEX, "vocab.json"]
    assert fetch(copy).ref.sha256 == directory_sha256(copy, names)


def test_pickled_weights_are_named_with_the_reason_and_the_way_out(copy):
    (copy / "model.safetensors").unlink()
    (copy / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(HubError, match=r"only pytorch_model\.bin\)\. Pickles .* can run any code.*save_pretrained"):
        fetch(copy)


@pytest.mark.parametrize("name", ["config.json", "vocab.json", "model.safetensors"])
def test_a_base_with_a_missing_file_is_refused_with_the_name_of_the_file(copy, name):
    (copy / name).unlink()
    with pytest.raises(HubError, match="safetensors" if name.startswith("model") else name):
        fetch(copy)


def test_the_directory_of_a_cached_repository_names_its_snapshot(copy):
    snapshot = copy.parent / "models--o--m/snapshots/0123"
    shutil.copytree(copy, snapshot)
    with pytest.raises(HubError, match=rf"models--o--m has no config.json; {snapshot} has one: use that directory"):
        fetch(copy.parent / "models--o--m")


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


RECORDS = [{"instruction": f"Say {i}.", "input": "", "output": str(i)} for i in range(20)]


@pytest.fixture
def dataset(tmp_path):
    """A directory like a dataset repository: two parts, and files that are not records."""
    directory = tmp_path / "dataset"
    directory.mkdir()
    for name, records in (("train", RECORDS[:15]), ("test", RECORDS[15:])):
        (directory / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (directory / "dataset_infos.json").write_text("{}")
    (directory / "README.md").write_text("# About")
    return directory


@contextmanager
def serve(directory):
    """The two routes of the hub that the download of a repository with the directory's files uses."""
    files = {file.name: file.read_bytes() for file in directory.iterdir()}
    requested = []

    class Hub(BaseHTTPRequestHandler):
        def do_GET(self):
            requested.append(self.path)
            path = urlsplit(self.path).path
            name = path.rpartition("/")[2]
            if path.startswith("/api/") and path.endswith(f"/tree/{REVISION}"):
                entries = [{"type": "file", "path": n, "size": len(c), "oid": n} for n, c in files.items()]
                self.answer(json.dumps(entries).encode())
            elif path.endswith(f"/resolve/{REVISION}/{name}"):
                self.answer(files[name], {"ETag": f'"{name}"', "X-Repo-Commit": REVISION})
            else:
                self.send_error(404)

        do_HEAD = do_GET

        def answer(self, content, headers=()):
            self.send_response(200)
            for name, value in {**dict(headers), "Content-Length": str(len(content))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        def log_message(self, *_):
            """Nothing: the test looks at `requested`."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever).start()
        yield f"http://127.0.0.1:{server.server_port}", requested
        server.shutdown()


@pytest.fixture
def hub(dataset):
    with serve(dataset) as served:
        yield served


def test_shards_of_any_name_are_downloaded(renamed, tmp_path):
    (renamed / "pytorch_model.bin").write_bytes(b"")
    local = fetch(renamed).ref
    code = f"{IMPORT}; print(fetch_base(BaseRef('someone/gpt2', '{REVISION}', '{local.sha256}')).path)"
    with serve(renamed) as (endpoint, requested):
        environment = {"HF_ENDPOINT": endpoint, "HF_HUB_CACHE": str(tmp_path / "cache"), "HOME": str(tmp_path)}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not any("pytorch_model" in path for path in requested)


def test_a_dataset_is_downloaded_at_its_commit_and_within_its_bounds(hub, tmp_path):
    endpoint, requested = hub
    code = f"""
from steps.config import DataConfig
from steps.fetch_data import read_source
def read(**values):
    return read_source(DataConfig(source="hub", name="someone/records", revision="{REVISION}", **values), 0)
try:
    read(max_bytes=100)
except RuntimeError as error:
    print("=", error)
records, origin = read()
print("=", sum(record["part"] == "test" for record in records), len(records), origin["location"])
print("=", len(read(path="test.jsonl")[0]))
"""
    environment = {"HF_ENDPOINT": endpoint, "HF_HUB_CACHE": str(tmp_path / "cache"), "HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    too_large, counts, one_file = re.findall("= (.*)", done.stdout)  # beside log lines
    assert too_large.endswith("bytes of records, more than data.max_bytes, 100")
    assert counts == f"5 20 someone/records at {REVISION}"
    assert one_file == "5"
    assert not any("README" in path for path in requested)


def test_a_dataset_may_be_a_directory(dataset):
    records, origin = read_source(DataConfig(source="hub", name=str(dataset), path="train.jsonl"), 0)
    assert (len(records), origin["location"]) == (15, f"{dataset}/train.jsonl")
    for path in ("other.jsonl", "../dataset/train.jsonl", "/etc/passwd"):
        with pytest.raises(HubError, match=r"data\.path is"):
            read_source(DataConfig(source="hub", name=str(dataset), path=path), 0)
    (dataset / "more.jsonl").write_text("{}")
    with pytest.raises(ValueError, match=r"has 3 files of records \(more.jsonl, .*name one of them in data.path"):
        read_source(DataConfig(source="hub", name=str(dataset)), 0)
