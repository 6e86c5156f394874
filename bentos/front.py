"""Reverse proxy of a deployment on one machine: listens on its port and forwards each request to the current service.

Services are replaced behind it without a failed request: each request uses one connection of its own, to the service
that is current when it begins. `deploy/containers/service.py` runs the proxy in a container of the service's image and
writes the file that names the current service.
"""

import logging
import os
from collections.abc import AsyncIterator, Mapping
from contextlib import suppress
from pathlib import Path

from aiohttp import ClientError, ClientResponse, ClientSession, ClientTimeout, TCPConnector, web
from multidict import CIMultiDict
from yarl import URL

ADDRESS = Path("/front/address")  # of the current service, as http://host:port and a line end
# RFC 9110, section 7.6.1: these are about one connection, not about the message
OF_A_CONNECTION = ("Connection", "Keep-Alive", "Proxy-Connection", "TE", "Trailer", "Transfer-Encoding", "Upgrade")

logger = logging.getLogger(__name__)
SESSION = web.AppKey("session", ClientSession)
CURRENT = web.AppKey("current", list[str])


def make_app(address: Path = ADDRESS) -> web.Application:
    """The front as an application; `address` is read again for each request."""
    app = web.Application()
    app[CURRENT] = []

    async def session(app: web.Application) -> AsyncIterator[None]:
        # A connection per request: one that is kept may be closed by the service just when it is used again.
        connector = TCPConnector(limit=0, force_close=True, ttl_dns_cache=1)
        timeout = ClientTimeout(total=None, sock_connect=5)
        async with ClientSession(connector=connector, timeout=timeout, auto_decompress=False) as app[SESSION]:
            yield

    async def pass_on(request: web.Request) -> web.StreamResponse:
        with suppress(OSError, ValueError):  # being written: the last one holds
            app[CURRENT][:] = [_read(address)]
        if not app[CURRENT]:
            return _unavailable("no service is current")
        url = URL(app[CURRENT][0] + request.raw_path, encoded=True)
        try:
            async with app[SESSION].request(
                request.method,
                url,
                headers=_of_the_message(request.headers),
                data=request.content if request.body_exists else None,
                allow_redirects=False,
            ) as answer:
                return await _answer(request, answer)
        except (ClientError, TimeoutError) as error:
            logger.warning("%s gave no answer: %r", app[CURRENT][0], error)
            return _unavailable("the service gave no answer; it may be starting again")

    app.cleanup_ctx.append(session)
    app.router.add_route("*", "/{path:.*}", pass_on)
    return app


async def _answer(request: web.Request, answer: ClientResponse) -> web.StreamResponse:
    response = web.StreamResponse(status=answer.status, reason=answer.reason, headers=_of_the_message(answer.headers))
    await response.prepare(request)
    try:
        async for chunk in answer.content.iter_any():
            await response.write(chunk)
    except ClientError:
        # the client has to see that the answer is not whole
        if request.transport is not None:
            request.transport.abort()
        return response
    await response.write_eof()
    return response


def _read(address: Path) -> str:
    text = address.read_text(encoding="ascii")
    if not text.endswith("\n"):
        raise ValueError("half written")
    return text.strip()


def _of_the_message(headers: Mapping[str, str]) -> "CIMultiDict[str]":
    kept = CIMultiDict(headers)
    for name in (*OF_A_CONNECTION, *headers.get("Connection", "").split(",")):
        kept.popall(name.strip(), None)
    return kept


def _unavailable(message: str) -> web.Response:
    error = {"type": "unavailable", "message": message, "param": None}
    return web.json_response({"error": error}, status=503, headers={"Retry-After": "1"})


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING)
    # a client that has hung up ends its request here, and so at the service
    web.run_app(make_app(), port=int(os.environ["PORT"]), print=None, access_log=None, handler_cancellation=True)
