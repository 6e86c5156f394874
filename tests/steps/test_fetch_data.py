import functools
import hashlib
import json
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest
from zenml import pipeline

from gpt2core.demo.records import write_records
from gpt2core.demo.world import make_world
from steps.adapters.download import DownloadError
from steps.config import DataConfig
from steps.fetch_data import fetch_data

RECORDS = [{"instruction": f"Say {i % 3}.", "input": "", "output": str(i % 3)} for i in range(5)]


@pipeline(enable_cache=False)
def only_fetch_data(data: DataConfig) -> None:
    fetch_data(data, 0)


def fetched(data: DataConfig):
    """The records and their metadata."""
    [artifact] = only_fetch_data(data).steps["fetch_data"].outputs["records"]
    return artifact.load(), artifact.run_metadata


@pytest.fixture
def url(tmp_path):
    (tmp_path / "records.json").write_text(json.dumps(RECORDS))
    handler = functools.partial(SimpleHTTPRequestHandler, directory=tmp_path)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever).start()
        yield f"http://127.0.0.1:{server.server_port}/records.json"
        server.shutdown()


def test_records_from_a_url_are_read_and_counted(url):
    sha256 = hashlib.sha256(json.dumps(RECORDS).encode()).hexdigest()
    records, about = fetched(DataConfig(source="url", url=url, sha256=sha256))
    assert records == RECORDS
    assert (about["source"], about["records"], about["duplicates"]) == ("url", 5, 2)


def test_a_file_with_another_digest_fails_the_step(url):
    with pytest.raises((DownloadError, RuntimeError)):
        only_fetch_data(DataConfig(source="url", url=url, sha256="0" * 64))


def test_the_bundled_records_follow_from_the_seed():
    records, about = fetched(DataConfig(n_facts=40))
    assert records == write_records(make_world(0, 40), 0)
    assert about["duplicates"] == 0
