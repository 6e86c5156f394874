"""Files from the web, by requests: retried, checked by sha256, and there whole or not at all."""

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
    """A file that could not be had, or is not the one that was asked for."""


def fetch(url: str, destination: Path, sha256: str, timeout: float = 30, retries: int = 4) -> Path:
    """Bring the file, unless it is there already; return `destination`.

    Args:
        sha256: of the file, in hexadecimal.
        timeout: seconds to connect, and seconds without a byte.
        retries: of refused connections, and of the statuses 429, 500, 502, 503 and 504, with growing pauses.

    Raises:
        DownloadError: nothing is left behind then, and an older file stays.
    """
    if destination.is_file() and file_sha256(destination) == sha256:
        return destination
    shown = _without_secrets(url)
    if urlsplit(url).scheme not in ("http", "https"):
        raise DownloadError(f"{shown} is no http or https address")
    destination.parent.mkdir(parents=True, exist_ok=True)
    with NamedTemporaryFile(dir=destination.parent, prefix=f".{destination.name}.", delete=False) as stream:
        temporary = Path(stream.name)
    try:
        found = _download(url, temporary, timeout, retries)
        if found != sha256:
            raise DownloadError(
                f"{shown} has sha256 {found}, but {sha256} was expected: the file changed, or something is between; "
                "look at it, and give its sha256 if it is the one you want"
            )
        temporary.chmod(0o644)
        os.replace(temporary, destination)
    except requests.HTTPError as error:
        raise DownloadError(f"{shown} answered {error.response.status_code} {error.response.reason}") from None
    except requests.RequestException as error:
        # the library's own words may hold the address with its password
        raise DownloadError(
            f"{shown} could not be read ({type(error).__name__}); is there a network, and does it allow this host?"
        ) from None
    finally:
        with suppress(FileNotFoundError):
            temporary.unlink()
    return destination


def _download(url: str, file: Path, timeout: float, retries: int) -> str:
    """Write the body to the file; return its sha256."""
    retry = Retry(retries, backoff_factor=0.5, status_forcelist=(429, 500, 502, 503, 504), raise_on_status=False)
    digest = hashlib.sha256()
    with requests.Session() as session, file.open("wb") as stream:
        for scheme in ("http://", "https://"):
            session.mount(scheme, HTTPAdapter(max_retries=retry))
        with session.get(url, stream=True, timeout=timeout) as response:
            response.raise_for_status()
            total = int(response.headers.get("Content-Length", 0)) or None
            # disable=None: only where there is a terminal
            with tqdm(total=total, desc=file.name.split(".")[1], unit="B", unit_scale=True, disable=None) as bar:
                for chunk in response.iter_content(CHUNK):
                    stream.write(chunk)
                    digest.update(chunk)
                    bar.update(len(chunk))
    return digest.hexdigest()


def _without_secrets(url: str) -> str:
    """The address without user, password and query, which may hold tokens."""
    parts = urlsplit(url)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment="").geturl()
