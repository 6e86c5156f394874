from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import Annotated
from urllib.parse import urlsplit

from zenml import step

from gpt2core.data import Record, check_records, count_duplicates, read_records, records_sha256
from gpt2core.demo.records import write_records
from gpt2core.demo.world import make_world
from steps.adapters.download import fetch
from steps.cache import code_of
from steps.config import DataConfig
from steps.metadata import describe


@step(cache_policy=code_of(__name__))
def fetch_data(data: DataConfig, seed: int) -> Annotated[list[Record], "records"]:
    """Instruction records: bundled, from a URL with a known sha256, or from a file."""
    if data.source == "bundled":
        records = check_records(write_records(make_world(seed, data.n_facts), seed), "the bundled records")
    elif data.source == "url":
        with TemporaryDirectory() as directory:
            file = Path(directory) / PurePosixPath(urlsplit(data.url).path).name
            records = read_records(fetch(data.url, file, data.sha256))
    else:
        records = read_records(data.path)
    about = {"records": len(records), "duplicates": count_duplicates(records), "sha256": records_sha256(records)}
    describe("records", {"source": data.source, **about})
    return records
