"""Reverse proxy of a deployment on one machine: listens on its port and forwards each request to the current service.

No request fails when the service is replaced: each request opens a new connection to the service that is current at
that time. `proxy_container.py` runs the proxy in a container of the service's image and writes the file with the
current service's address. `deploy/bento.py` copies this module into the image.
"""

import logging
import os
from collections.abc import AsyncIterator, Mapping
from contextlib import suppress
from pathlib import Path

from aiohttp import ClientError, ClientResponse, ClientSession, ClientTimeout, TCPConnector, web
from multidict import CIMultiDict
from yarl import URL

ADDRESS = Path("/proxy/address")  # file with the current service's address: http://host:port and a newline
# RFC 9110, section 7.6.1: these describe one connection and are not forwarded
HOP_BY_HOP = ("Connection", "Keep-Alive", "Proxy-Connection", "TE", "Trailer", "Transfer-Encoding", "Upgrade")
CONNECT_TIMEOUT = 5  # seconds

logger = logging.getLogger(__name__)
SESSION = web.AppKey("session", ClientSession)
CURRENT = web.AppKey("current", list[str])  # the last address that was read, if any


def make_app(address: Path = ADDRESS) -> web.Application:
    """Build the proxy application. It reads the `address` file for each request."""
    # bodies are forwarded without decompression, because they must match their headers
    app = web.Application(handler_args={"auto_decompress": False})
    app[CURRENT] = []

    async def session(app: web.Application) -> AsyncIterator[None]:
        # One connection per request: a service could close an idle connection just when it is reused.
        connector = TCPConnector(limit=0, force_close=True, ttl_dns_cache=1)
        timeout = ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT)
        async with ClientSession(connector=connector, timeout=timeout, auto_decompress=False) as app[SESSION]:
            yield

    async def forward(request: web.Request) -> web.StreamResponse:
        if not request.raw_path.startswith("/"):  # a whole URL, as clients send it to a forward proxy
            return web.Response(status=400, text="the request target is not a path\n")
        with suppress(OSError, ValueError):  # the file is being written: use the last address
            if (current := [_read(address)]) != app[CURRENT]:
                app[CURRENT][:] = current
                _sync(address)
        if not app[CURRENT]:
            return _unavailable("no service is deployed")
        url = URL(app[CURRENT][0] + request.raw_path, encoded=True)
        try:
            async with app[SESSION].request(
                request.method,
                url,
                headers=_end_to_end(request.headers),
                data=request.content if request.body_exists else None,
                allow_redirects=False,
            ) as response:
                return await _relay(request, response)
        except (ClientError, TimeoutError) as error:
            logger.warning("%s did not respond: %r", app[CURRENT][0], error)
            return _unavailable("the service did not respond; it may be restarting")

    app.cleanup_ctx.append(session)
    app.router.add_route("*", "/{path:.*}", forward)
    return app


async def _relay(request: web.Request, response: ClientResponse) -> web.StreamResponse:
    """Send the service's response to the client as it arrives."""
    headers = _end_to_end(response.headers)
    relayed = web.StreamResponse(status=response.status, reason=response.reason, headers=headers)
    await relayed.prepare(request)
    try:
        async for chunk in response.content.iter_any():
            await relayed.write(chunk)
    except ClientError:
        # abort the connection, so that the client can tell that the response is incomplete
        if request.transport is not None:
            request.transport.abort()
        return relayed
    await relayed.write_eof()
    return relayed


def _read(address: Path) -> str:
    text = address.read_text(encoding="ascii")
    if not text.endswith("\n"):
        raise ValueError("incomplete")
    return text.strip()


def _sync(address: Path) -> None:
    """Write a new address to the disk, so that it survives a power loss. The engine only writes it to the cache."""
    for path in (address, address.parent):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _end_to_end(headers: Mapping[str, str]) -> "CIMultiDict[str]":
    """Return the headers that are forwarded: all except hop-by-hop headers."""
    kept = CIMultiDict(headers)
    for name in (*HOP_BY_HOP, *headers.get("Connection", "").split(",")):
        kept.popall(name.strip(), None)
    return kept


def _unavailable(message: str) -> web.Response:
    error = {"type": "unavailable", "message": message, "param": None, "code": "unavailable"}
    return web.json_response({"error": error}, status=503, headers={"Retry-After": "1"})


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING)
    # handler_cancellation: a client disconnect cancels the request to the service too
    web.run_app(make_app(), port=int(os.environ["PORT"]), print=None, access_log=None, handler_cancellation=True)
