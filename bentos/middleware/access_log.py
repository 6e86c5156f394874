"""The access log: one JSON line per request on standard output, without any text of users or the model."""

import ipaddress
import json
import sys
from collections.abc import Collection
from contextlib import suppress
from datetime import UTC, datetime
from time import monotonic
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from bentos.completion import CompletionResult


class RequestRecord:
    """The completions of one HTTP request. Routes pass `add` to the generator; the access log writes `fields`."""

    def __init__(self) -> None:
        self._results: list[CompletionResult] = []

    def add(self, result: CompletionResult) -> None:
        self._results.append(result)

    def fields(self) -> dict[str, Any]:
        """Totals over the request's completions; a prompt with several completions counts once."""
        if not self._results:
            return {}
        first = self._results[0]
        prompts = {id(result.request.prompt): result.request.prompt for result in self._results}
        waits = [result.time_to_first_token for result in self._results if result.time_to_first_token is not None]
        return {
            "model": first.request.model,
            "adapter_sha256": first.adapter and first.adapter.sha256,
            "finish_reason": ",".join(sorted({result.finish_reason for result in self._results})),
            "prompt_tokens": sum(len(prompt) for prompt in prompts.values()),
            "completion_tokens": sum(len(result.tokens) for result in self._results),
            "first_token_milliseconds": round(1000 * min(waits), 1) if waits else None,
        }


class AccessLogMiddleware:
    """Requires RequestIdMiddleware outside of it; handlers find the record in `request.state.record`."""

    def __init__(self, app: ASGIApp, skip_paths: Collection[str]) -> None:
        """`skip_paths`: paths that are not logged, such as probes and metrics."""
        self.app, self.skip_paths = app, skip_paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in self.skip_paths:
            await self.app(scope, receive, send)
            return
        record, start, status = RequestRecord(), monotonic(), 0
        scope["state"]["record"] = record

        async def observed(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, observed)
        finally:
            _write(scope, status, monotonic() - start, record)


def _write(scope: Scope, status: int, seconds: float, record: RequestRecord) -> None:
    line = {
        "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "client": _client(scope),
        "method": scope["method"],
        "path": scope["path"],
        "status": status,  # 0: the client disconnected before there was one
        "milliseconds": round(1000 * seconds, 1),
        "request_id": scope["state"]["request_id"],
        **record.fields(),
    }
    with suppress(OSError):  # the disk is full, or the pipe has no reader
        sys.stdout.write(json.dumps(line) + "\n")
        sys.stdout.flush()


def _client(scope: Scope) -> str | None:
    """Return the client's IP address. If a proxy passed on another text in X-Forwarded-For, it is not logged."""
    host = scope["client"][0] if scope.get("client") else ""
    try:
        address = ipaddress.ip_address(host.partition("%")[0])  # without a zone, which is any text
    except ValueError:
        return None
    return str(getattr(address, "ipv4_mapped", None) or address)  # IPv4 on a socket of both families
