"""Server-sent events, without a server."""

import asyncio
import json

from starlette.requests import Request

from bentos.streaming import event_stream


def test_line_ends_of_unicode_are_escaped_in_events():
    async def events():
        yield {"text": "a\u2028b\u2029c\x85d\ne東"}

    async def send() -> list[bytes]:
        async def receive():
            await asyncio.sleep(60)

        request = Request({"type": "http", "headers": []}, receive)
        response = await event_stream(request, events(), [])
        return [part async for part in response.body_iterator]

    data, done = asyncio.run(send())
    assert len(data.decode().splitlines()) == 2
    assert json.loads(data.removeprefix(b"data: ")) == {"text": "a\u2028b\u2029c\x85d\ne東"}
    assert "東".encode() in data
    assert done == b"data: [DONE]\n\n"
