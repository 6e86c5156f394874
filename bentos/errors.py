"""The one shape of every error: {"error": {"type", "message", "param"}}, whoever it comes from."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from http import HTTPStatus

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send


@dataclass
class RequestError(Exception):
    """A request that cannot be answered, and why."""

    status: int
    type: str
    message: str
    param: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)

    @property
    def content(self) -> dict[str, dict[str, str | None]]:
        return {"error": {"type": self.type, "message": self.message, "param": self.param}}

    def response(self) -> JSONResponse:
        return JSONResponse(self.content, self.status, self.headers)


class OneErrorShape:
    """ASGI middleware: errors of BentoML and of the router (unknown route, wrong method, a fault) get our shape."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        held: Message | None = None  # the head of an error, until its body is known
        body = bytearray()

        async def shape(message: Message) -> None:
            nonlocal held
            if message["type"] == "http.response.start" and message["status"] >= 400:
                held = message
            elif held is None:
                await send(message)
            else:
                body.extend(message.get("body", b""))
                if not message.get("more_body", False):
                    content = bytes(body) if _is_ours(body) else _shaped(held["status"], scope)
                    changed = (b"content-length", b"content-type")
                    headers = [(name, value) for name, value in held["headers"] if name.lower() not in changed]
                    headers += [(b"content-type", b"application/json"), (b"content-length", str(len(content)).encode())]
                    await send({**held, "headers": headers})
                    await send({"type": "http.response.body", "body": content})

        await self.app(scope, receive, shape if scope["type"] == "http" else send)


def _is_ours(body: bytes | bytearray) -> bool:
    try:
        content = json.loads(body)
    except ValueError:
        return False
    return isinstance(content, dict) and (isinstance(content.get("error"), dict) or "statusCode" in content)


def _shaped(status: int, scope: Scope) -> bytes:
    phrase = HTTPStatus(status)
    message = f"{scope['method']} {scope['asked_path']}: {phrase.phrase}"
    return bytes(RequestError(status, phrase.name.lower(), message).response().body)
