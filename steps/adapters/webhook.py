"""A JSON message to an HTTP address, by requests: bounded in time, retried, without redirects."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

import requests
from requests.adapters import HTTPAdapter
from urllib3.util import Retry

TIMEOUT = 10  # seconds to connect, and to the response's status
RETRIES = 2
BUSY = (429, 500, 502, 503, 504)  # statuses after which a request is repeated


class WebhookError(RuntimeError):
    """The message was not accepted. The error names only the host, because a webhook's path is often a secret."""


def post(url: str, content: dict[str, Any]) -> None:
    """Post the content as JSON.

    Raises:
        WebhookError: the URL is not http(s), the host cannot be reached, or the status is not 2xx.
    """
    try:
        parts = urlsplit(url)
        shown = f"{parts.scheme}://{parts.hostname}"
    except ValueError:
        parts, shown = urlsplit(""), "the URL"
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise WebhookError("the webhook is not an http or https URL")
    try:
        # stream=True: do not read the body, which may be endless
        with (
            _hiding_path(),
            retrying_session() as session,
            session.post(url, json=content, timeout=TIMEOUT, allow_redirects=False, stream=True) as response,
        ):
            status = response.status_code
    except requests.RequestException as error:
        raise WebhookError(f"{shown} cannot be reached ({type(error).__name__})") from None
    if not 200 <= status < 300:
        raise WebhookError(f"{shown} answered {status}")


@contextmanager
def _hiding_path() -> Iterator[None]:
    """Context manager: suppress urllib3's warnings about retries, which contain the URL's path."""
    logger = logging.getLogger("urllib3.connectionpool")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def retrying_session(token: str = "") -> requests.Session:
    """Return a session that retries after broken connections and the statuses BUSY, with exponential backoff.

    Args:
        token: the bearer token to send; "": none.
    """

    def authenticate(request: requests.PreparedRequest) -> requests.PreparedRequest:
        if token:
            request.headers["Authorization"] = f"Bearer {token}"
        return request

    retry = Retry(RETRIES, status_forcelist=BUSY, allowed_methods=None, backoff_factor=0.5, raise_on_status=False)
    retry.respect_retry_after_header = False  # the header may require a wait of any length
    session = requests.Session()
    session.auth = authenticate  # otherwise requests would send a password of ~/.netrc
    for scheme in ("http://", "https://"):
        session.mount(scheme, HTTPAdapter(max_retries=retry))
    return session
