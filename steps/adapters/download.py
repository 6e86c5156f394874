"""File download over HTTP, by requests: retried, verified by sha256, written atomically."""

import hashlib
import os
from contextlib import suppress
from pathlib import Path
from tempfile import NamedTemporaryFile
from urllib.parse import urlsplit

import requests
from requests.adapters import HTTPAdapter
from tqdm import tqdm
from urllib3.util import Retry

from gpt2core.checkpoint import file_sha256

CHUNK = 1 << 16  # bytes


class DownloadError(RuntimeError):
    """A download that failed or has an unexpected sha256."""


def fetch(url: str, destination: Path, sha256: str, timeout: float = 30, retries: int = 4) -> Path:
    """Download the file unless `destination` already has this sha256; return `destination`.

    Args:
        sha256: of the file, in hexadecimal.
        timeout: seconds to connect, and seconds between two bytes.
        retries: after refused connections and the statuses 429, 500, 502, 503 and 504, with exponential backoff.

    Raises:
        DownloadError: nothing is written, and an existing file is kept.
    """
    if destination.is_file() and file_sha256(destination) == sha256:
        return destination
    shown = without_secrets(url)
    if urlsplit(url).scheme not in ("http", "https"):
        raise DownloadError(f"{shown} is not an http or https URL")
    destination.parent.mkdir(parents=True, exist_ok=True)
    with NamedTemporaryFile(dir=destination.parent, prefix=f".{destination.name}.", delete=False) as stream:
        temporary = Path(stream.name)
    try:
        found = _download(url, temporary, timeout, retries)
        if found != sha256:
            raise DownloadError(
                f"{shown} has sha256 {found}, but {sha256} was expected: the file changed, or a proxy replaced it; "
                "inspect it, and set its sha256 if it is the file you want"
            )
        temporary.chmod(0o644)
        os.replace(temporary, destination)
    except requests.HTTPError as error:
        raise DownloadError(f"{shown} returned {error.response.status_code} {error.response.reason}") from None
    except requests.RequestException as error:
        # the library's message may contain the URL with its password
        raise DownloadError(
            f"{shown} could not be downloaded ({type(error).__name__}); check that the network allows it, or download "
            "the file elsewhere and set data.source=file and data.path"
        ) from None
    finally:
        with suppress(FileNotFoundError):
            temporary.unlink()
    return destination


def _download(url: str, file: Path, timeout: float, retries: int) -> str:
    """Write the response body to the file; return its sha256."""
    retry = Retry(retries, backoff_factor=0.5, status_forcelist=(429, 500, 502, 503, 504), raise_on_status=False)
    digest = hashlib.sha256()
    with requests.Session() as session, file.open("wb") as stream:
        for scheme in ("http://", "https://"):
            session.mount(scheme, HTTPAdapter(max_retries=retry))
        with session.get(url, stream=True, timeout=timeout) as response:
            response.raise_for_status()
            total = int(response.headers.get("Content-Length", 0)) or None
            # disable=None: only on a terminal
            with tqdm(total=total, desc=file.name.split(".")[1], unit="B", unit_scale=True, disable=None) as bar:
                for chunk in response.iter_content(CHUNK):
                    stream.write(chunk)
                    digest.update(chunk)
                    bar.update(len(chunk))
    return digest.hexdigest()


def without_secrets(url: str) -> str:
    """The URL without user, password and query, which may contain tokens."""
    parts = urlsplit(url)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment="").geturl()
