"""Text for pretraining; instruction records come from `fetch_data`."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

from zenml import step
from zenml.steps import BaseStep

from gpt2core.demo.prose import write_prose
from gpt2core.demo.world import make_world
from gpt2core.files import check_exists, file_sha256, read_text
from gpt2core.tokenizer import END_OF_TEXT
from steps.adapters.download import fetch, without_secrets
from steps.cache import code_of
from steps.config import TextConfig
from steps.metadata import attach_metadata


@step(cache_policy=code_of(__name__))
def fetch_text(text: TextConfig, seed: int) -> Annotated[list[str], "documents"]:
    """Read the documents to pretrain on: the demo world's prose, or the text of a file or of a URL with a sha256."""
    if text.source == "bundled":
        documents, origin = write_prose(make_world(seed, text.n_facts), seed), {"location": "bundled prose"}
    elif text.source == "url":
        with TemporaryDirectory() as directory:
            file = fetch(text.url, Path(directory) / "text", text.sha256, text.max_bytes, setting="text")
            documents, origin = _read(file), {"location": without_secrets(text.url), "file_sha256": text.sha256}
    else:
        file = Path(text.path)
        check_exists(file)
        if (size := file.stat().st_size) > text.max_bytes:
            raise ValueError(f"{file} has {size:,} bytes, more than text.max_bytes={text.max_bytes}")
        documents, origin = _read(file), {"location": text.path, "file_sha256": file_sha256(file)}
    attach_metadata("documents", {"documents": len(documents), "characters": sum(map(len, documents)), **origin})
    return documents


def text_step(text: TextConfig) -> BaseStep:
    """Return `fetch_text` for this text. It is not cached for a file, which may change under the same name."""
    return fetch_text.with_options(enable_cache=False) if text.source == "file" else fetch_text


def _read(file: Path) -> list[str]:
    documents = split_documents(read_text(file))
    if not documents:
        raise ValueError(f"{file} has no text")
    return documents


def split_documents(text: str) -> list[str]:
    """Split a text at END_OF_TEXT, as in TinyStories. A text without it is one document."""
    documents = text.split(END_OF_TEXT)
    return [document.strip() if len(documents) > 1 else document for document in documents if document.strip()]
