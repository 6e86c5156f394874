"""File download over HTTP with requests: limited in bytes and time, retried, verified by sha256, written atomically."""

import hashlib
import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from secrets import token_hex
from urllib.parse import urljoin, urlsplit

import requests
import urllib3
from tqdm import tqdm
from urllib3.util import Retry

from gpt2core.files import file_sha256, naming_file
from steps.adapters.webhook import BUSY

logger = logging.getLogger(__name__)

CHUNK = 1 << 16  # bytes
TIMEOUT = 30.0  # seconds to connect, and seconds between two bytes
RETRIES = 4
MAX_SECONDS = 1800.0  # for all attempts and the waits between them
MAX_WAIT = 60.0  # seconds between two attempts, even if the server's Retry-After is longer
# Errors that are retried: refused and broken connections, timeouts, a body that ends too early.
TRANSIENT = (
    *(requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError),
    *(urllib3.exceptions.ProtocolError, urllib3.exceptions.TimeoutError),
)


class DownloadError(RuntimeError):
    """A download that failed, exceeds a limit or has an unexpected sha256."""


def fetch(url: str, destination: Path, sha256: str, max_bytes: int, setting: str = "data") -> Path:
    """Download the file unless `destination` already has this sha256; return `destination`.

    Broken connections, incomplete bodies and the statuses `BUSY` are retried, with exponential backoff.

    Args:
        sha256: digest of the file, in hexadecimal.
        max_bytes: maximum size of the file, after decompression if the server compresses it.
        setting: the configuration section of the file (`data` or `text`), for messages.

    Raises:
        DownloadError: the download failed. Nothing is written, and an existing file is kept.
    """
    sha256, shown = sha256.lower(), without_secrets(url)
    if destination.is_file() and file_sha256(destination) == sha256:
        return destination
    if urlsplit(url).scheme not in ("http", "https"):
        raise DownloadError(f"{shown} is not an http or https URL")
    destination.parent.mkdir(parents=True, exist_ok=True)
    temporary = destination.with_name(f".{destination.name}.{token_hex(4)}")
    temporary.touch(exist_ok=False)
    deadline = time.monotonic() + MAX_SECONDS
    try:
        with _as_download_error(shown, setting):
            actual = _retried(partial(_download, url, temporary, max_bytes, deadline, setting), shown, deadline)
        if actual != sha256:
            raise DownloadError(
                f"{shown} has sha256 {actual}, but {sha256} was expected: the file changed, or a proxy replaced it; "
                "inspect it, and set its sha256 if it is the file you want"
            )
        os.replace(temporary, destination)
    finally:
        temporary.unlink(missing_ok=True)
    return destination


@contextmanager
def _as_download_error(shown: str, setting: str) -> Iterator[None]:
    """Context manager: translate errors of requests and urllib3. Their messages may contain the URL's password."""
    try:
        yield
    except _LimitError as error:
        raise DownloadError(f"{shown} {error}") from None
    except requests.HTTPError as error:
        raise DownloadError(f"{shown} returned {error.response.status_code} {error.response.reason}") from None
    except (requests.RequestException, urllib3.exceptions.HTTPError) as error:
        raise DownloadError(
            f"{shown} could not be downloaded ({type(error).__name__}); check that the network allows it, or download "
            f"the file elsewhere and set {setting}.source=file and {setting}.path"
        ) from None


class _LimitError(Exception):
    """A response that was rejected. The message is the rest of a sentence that starts with the URL."""


class _Session(requests.Session):
    """Follows redirects to http and https only, and from https to https only."""

    def get_redirect_target(self, response: requests.Response) -> str | None:
        target = super().get_redirect_target(response)
        if target is not None:
            before, after = (urlsplit(url).scheme for url in (response.url, urljoin(response.url, target)))
            if after not in ("http", "https") or (before, after) == ("https", "http"):
                raise _LimitError(f"redirects from {before} to {after or 'no URL'}, which is not followed")
        return target


def _retried(download: Callable[[], str], shown: str, deadline: float) -> str:
    for attempt in range(RETRIES):
        try:
            return download()
        except (*TRANSIENT, requests.HTTPError) as error:
            if isinstance(error, requests.HTTPError) and error.response.status_code not in BUSY:
                raise
            _wait(error, shown, 0.5 * 2**attempt, deadline)
    return download()


def _download(url: str, file: Path, max_bytes: int, deadline: float, setting: str) -> str:
    """Write the response body to the file; return its sha256."""
    digest, size = hashlib.sha256(), 0
    with (
        naming_file(file),
        _Session() as session,
        file.open("wb") as stream,
        session.get(url, stream=True, timeout=TIMEOUT) as response,
    ):
        response.raise_for_status()
        total = _content_length(response)
        if total is not None and total > max_bytes:
            raise _LimitError(f"has {total:,} bytes, more than {setting}.max_bytes={max_bytes}")
        # disable=None shows the bar only on a terminal
        with tqdm(total=total, desc=file.name.split(".")[1], unit="B", unit_scale=True, disable=None) as bar:
            # read1 returns the bytes that have arrived. read and iter_content wait for a whole chunk, which a server
            # that sends single bytes can delay forever.
            while chunk := response.raw.read1(CHUNK, decode_content=True):
                size += len(chunk)
                if size > max_bytes:
                    raise _LimitError(f"has more bytes than {setting}.max_bytes={max_bytes}")
                if time.monotonic() > deadline:
                    raise _LimitError(f"took too long: {size:,} bytes arrived within the time limit")
                stream.write(chunk)
                digest.update(chunk)
                bar.update(len(chunk))
    return digest.hexdigest()


def _content_length(response: requests.Response) -> int | None:
    """Return the size of the file; None if the server does not send it, or sends the compressed size."""
    text = response.headers.get("Content-Length")
    if text is not None and not (text.isascii() and text.isdigit()):
        raise _LimitError(f"has the header Content-Length: {text[:40]!r}, which is not a number of bytes")
    return None if text is None or "Content-Encoding" in response.headers else int(text)


def _wait(error: Exception, shown: str, seconds: float, deadline: float) -> None:
    """Sleep before the next attempt, and log it."""
    reason, header = type(error).__name__, None
    if isinstance(error, requests.HTTPError):
        reason, header = f"status {error.response.status_code}", error.response.headers.get("Retry-After")
    with suppress(urllib3.exceptions.InvalidHeader):  # neither seconds nor a date
        seconds = Retry().parse_retry_after(header) if header else seconds
    wait = min(seconds, MAX_WAIT)
    if time.monotonic() + wait > deadline:
        raise error
    wish = f" (the server requested longer: Retry-After: {header[:40]})" if header and wait < seconds else ""
    logger.warning("%s: %s; next attempt in %.1f s%s", shown, reason, wait, wish)
    time.sleep(wait)


def without_secrets(url: str) -> str:
    """Remove user, password and query from the URL, because they may contain secrets."""
    parts = urlsplit(url)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment="").geturl()
