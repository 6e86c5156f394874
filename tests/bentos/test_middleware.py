"""Each middleware by itself, around a small app."""

import io
import json

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from bentos.completion import CompletionResult, GenerationRequest
from bentos.dependencies import record
from bentos.middleware.access_log import AccessLogMiddleware
from bentos.middleware.drain import DrainMiddleware
from bentos.middleware.error_shape import ErrorShapeMiddleware
from bentos.middleware.request_id import RequestIdMiddleware
from bentos.middleware.unhandled import UnhandledErrorMiddleware
from gpt2core.config import GenerationConfig


async def generate(request: Request) -> PlainTextResponse:
    """Three completions of two prompts."""
    prompts = [[1, 2], [3, 4, 5]]
    for prompt, tokens, reason in (
        (prompts[0], [7], "stop"),
        (prompts[0], [7, 8], "length"),
        (prompts[1], [9], "stop"),
    ):
        wanted = GenerationRequest(prompt, GenerationConfig(), "base", 60.0, request.state.request_id)
        record(request).add(CompletionResult(wanted, None, reason, tokens, [1.0 + len(tokens)], 1.0, 9.0))
    return PlainTextResponse("ok")


def not_ours(request: Request) -> JSONResponse:
    return JSONResponse([{"error": "as BentoML says it"}], 503, {"X-Kept": "yes"})


ROUTES = [Route("/generate", generate), Route("/503", not_ours), Route("/readyz", lambda _: PlainTextResponse("\n"))]


def logged(capsys, path: str, host: str = "::ffff:192.0.2.1") -> list[dict]:  # IPv4 on a socket of both families
    app = RequestIdMiddleware(AccessLogMiddleware(Starlette(routes=ROUTES), skip_paths=["/readyz"]), "run-17")
    client = TestClient(app, client=(host, 50000))
    client.get(path, headers={"X-Request-Id": "mine"})
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_the_access_log_sums_over_all_choices(capsys):
    (line,) = logged(capsys, "/generate")
    assert line.pop("time")
    assert line.pop("milliseconds") >= 0
    assert line == {
        "client": "192.0.2.1",
        "method": "GET",
        "path": "/generate",
        "status": 200,
        "request_id": "mine",
        "model": "base",
        "adapter_sha256": None,
        "finish_reason": "length,stop",
        "prompt_tokens": 5,
        "completion_tokens": 4,
        "first_token_milliseconds": 1000.0,
    }


@pytest.mark.parametrize(
    ("host", "client"),
    [
        ("192.0.2.1", "192.0.2.1"),
        ("2001:DB8::1", "2001:db8::1"),
        ("fe80::1%any text", "fe80::1"),
        ("any text", None),
        ("192.0.2.1, any text", None),
    ],
)
def test_the_access_log_has_no_text_of_the_client_instead_of_its_address(capsys, host, client):
    """The server takes it from X-Forwarded-For, which a proxy may pass on as the client sent it."""
    assert [line["client"] for line in logged(capsys, "/nothing", host)] == [client]


@pytest.mark.parametrize(("path", "statuses"), [("/nothing", [404]), ("/readyz", [])])
def test_the_access_log_has_a_line_per_request_except_probes(capsys, path, statuses):
    assert [line["status"] for line in logged(capsys, path)] == statuses


def test_a_request_is_answered_when_nobody_reads_the_access_log(monkeypatch):
    class Closed(io.StringIO):
        def flush(self):
            raise BrokenPipeError

    monkeypatch.setattr("sys.stdout", Closed())
    app = RequestIdMiddleware(AccessLogMiddleware(Starlette(routes=ROUTES), skip_paths=[]), "run-17")
    assert TestClient(app).get("/generate").text == "ok"


@pytest.mark.parametrize(("path", "expected"), [("/503", "no-store"), ("/readyz", "no-store"), ("/own", "no-cache")])
def test_no_shared_cache_stores_a_response(path, expected):
    """A cache would send it to clients without a token: X-Api-Key, unlike Authorization, does not prevent that."""
    own = Route("/own", lambda _: PlainTextResponse("ok", headers={"Cache-Control": "no-cache"}))
    app = RequestIdMiddleware(Starlette(routes=[*ROUTES, own]), "run-17")
    assert TestClient(app).get(path).headers["Cache-Control"] == expected


@pytest.mark.parametrize(("path", "code", "status"), [("/503", "service_unavailable", 503), ("/x", "not_found", 404)])
def test_errors_of_the_inner_app_get_the_shape_of_all_errors(path, code, status):
    response = TestClient(ErrorShapeMiddleware(Starlette(routes=ROUTES))).get(path)
    assert response.status_code == status
    assert response.headers["Content-Type"] == "application/json"
    assert response.json()["error"].keys() == {"type", "message", "param", "code"}
    assert response.json()["error"]["type"] == response.json()["error"]["code"] == code
    assert ("X-Kept" in response.headers) == (path == "/503")


def broken(request: Request) -> PlainTextResponse:
    raise RuntimeError("as if a handler were wrong")


async def raising(scope, receive, send) -> None:
    raise RuntimeError("as if a middleware were wrong")


async def breaking_off(scope, receive, send) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"half", "more_body": True})
    raise RuntimeError("as if a stream were wrong")


@pytest.mark.parametrize("app", [ErrorShapeMiddleware(Starlette(routes=[Route("/x", broken)])), raising])
def test_an_unexpected_error_is_a_500_and_is_logged_but_not_raised_to_the_server(app, caplog):
    response = TestClient(UnhandledErrorMiddleware(app)).get("/x")
    assert response.status_code == 500
    assert response.json()["error"] == {
        "type": "internal_server_error",
        "message": "GET /x: Internal Server Error",
        "param": None,
        "code": "internal_server_error",
    }
    assert "RuntimeError: as if" in caplog.text


def test_an_error_in_the_middle_of_a_response_closes_its_connection():
    with pytest.raises(RuntimeError):
        TestClient(UnhandledErrorMiddleware(breaking_off)).get("/x")


def test_while_draining_readiness_fails_and_responses_close_their_connection():
    async def stop_listening(handler: object) -> None: ...

    drain = DrainMiddleware(Starlette(routes=ROUTES), ["/readyz"], stop_listening)
    client = TestClient(drain)
    assert client.get("/readyz").status_code == 200
    assert "Connection" not in client.get("/nothing").headers
    drain.draining = True
    assert client.get("/readyz").status_code == 503
    assert client.get("/readyz").json()["error"]["code"] == "shutting_down"
    for path in ("/readyz", "/nothing", "/503"):
        assert client.get(path).headers["Connection"] == "close"
    assert drain.in_flight == 0
