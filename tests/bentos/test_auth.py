"""API tokens. Mostly without a server: the middleware around an app that always answers 204."""

import base64
import json
from collections.abc import Sequence

import pytest
import requests
from starlette.responses import Response
from starlette.testclient import TestClient

from bentos import admin
from bentos.middleware.auth import AuthMiddleware
from tests.bentos.client import error_of


def client(
    api_tokens: Sequence[str] = (), admin_tokens: Sequence[str] = (), cors_origins: Sequence[str] = ()
) -> TestClient:
    app = Response(status_code=204)
    return TestClient(AuthMiddleware(app, api_tokens, admin_tokens, ["/livez"], admin.router.routes, cors_origins))


def basic(password: str) -> dict[str, str]:
    return {"Authorization": "Basic " + base64.b64encode(f"anyone:{password}".encode()).decode()}


@pytest.mark.parametrize(
    ("path", "headers", "status"),
    [
        ("/livez", {}, 204),
        ("/predict", {}, 401),
        ("/predict", {"Authorization": "Bearer s3cret"}, 204),
        ("/predict", {"Authorization": "Bearer old"}, 204),
        ("/predict", {"Authorization": "Bearer old,s3cret"}, 401),
        ("/predict", {"Authorization": "Bearer of-the-admin"}, 204),
        ("/predict", basic("s3cret"), 204),
        ("/predict", {"X-Api-Key": "s3cret", "Authorization": "Bearer of-a-proxy"}, 204),
        ("/predict", {"X-Api-Key": "of-a-proxy", "Authorization": "Bearer s3cret"}, 204),
        ("/predict", {"X-Api-Key": "x"}, 401),
        ("/predict", {"X-Api-Key": ""}, 401),
        ("/predict", {"Authorization": "Bearer s3cre"}, 401),
        ("/predict", {"Authorization": "Bearer "}, 401),
        ("/predict", {"Authorization": "Bearer é".encode()}, 401),
        ("/predict", {"Authorization": "Basic s3cret"}, 401),
        ("/v1/load_lora_adapter", {"Authorization": "Bearer s3cret"}, 401),
        ("/v1/load_lora_adapter%0a", {"Authorization": "Bearer s3cret"}, 401),  # for the router the same route
        ("/v1/unload_lora_adapter", {"Authorization": "Bearer of-the-admin"}, 204),
    ],
)
def test_a_token_opens_the_routes_it_is_for(path, headers, status):
    assert client(["old", "s3cret"], ["of-the-admin"]).get(path, headers=headers).status_code == status


@pytest.mark.parametrize(
    ("headers", "is_forged"),
    [
        ({}, False),
        ({"Origin": "http://testserver"}, False),
        ({"Sec-Fetch-Site": "same-origin", "Origin": "http://address-at-the-proxy"}, False),
        ({"Sec-Fetch-Site": "cross-site", "Origin": "http://testserver"}, True),
        ({"Origin": "http://evil.example"}, True),
        ({"Origin": "null"}, True),
    ],
)
def test_a_page_of_another_site_cannot_use_the_password_that_the_browser_has_stored(headers, is_forged):
    for path in ("/predict", "/v1/load_lora_adapter"):
        reading, writing, explicit = (
            client(["s3cret"], ["admin"]).request(method, path, headers=headers | own).status_code
            for method, own in [("GET", basic("admin")), ("POST", basic("admin")), ("POST", {"X-Api-Key": "admin"})]
        )
        assert (reading, writing, explicit) == (204, 401 if is_forged else 204, 204)


@pytest.mark.parametrize(
    ("content_type", "origin", "status"),
    [
        ("text/plain;charset=UTF-8", "http://evil.example", 403),
        ("application/x-www-form-urlencoded", "null", 403),
        ("text/plain; application/json", "http://evil.example", 403),
        (None, "http://evil.example", 403),
        (None, "http://[", 403),
        (None, None, 200),  # curl, and any other client that is not a browser
        ("text/plain", "{url}", 200),
        # a browser sends this to another site only with its permission, which this service does not give
        ("application/json; charset=utf-8", "http://evil.example", 200),
    ],
)
def test_without_a_token_a_page_of_another_site_cannot_send_a_request(url, content_type, origin, status):
    given = {"Content-Type": content_type, "Origin": origin and origin.replace("{url}", url)}
    body = json.dumps({"instruction": "Hello.", "max_new_tokens": 1}).encode()
    headers = {name: value for name, value in given.items() if value is not None}
    response = requests.post(f"{url}/predict", data=body, headers=headers, timeout=60)
    assert response.status_code == status
    if status == 403:
        assert error_of(response)["type"] == "forbidden"


@pytest.mark.parametrize(
    ("origins", "status"), [((), 403), (["https://other.example"], 403), (["https://app.example"], 204), (["*"], 204)]
)
def test_a_page_that_cors_permits_may_send_any_type_of_content(origins, status):
    """`fetch` with a string and `navigator.sendBeacon` declare text, unless the page sets Content-Type."""
    headers = {"Origin": "https://app.example", "Content-Type": "text/plain", "Sec-Fetch-Site": "cross-site"}
    assert client(cors_origins=origins).post("/predict", headers=headers).status_code == status
    with_token = client(["s3cret"], cors_origins=origins)
    assert with_token.post("/predict", headers=headers | basic("s3cret")).status_code == 401


def test_without_an_api_token_only_the_admin_routes_are_closed():
    assert client().get("/predict").status_code == 204
    assert client().get("/v1/load_lora_adapter").status_code == 403


def test_a_browser_is_asked_for_a_password_and_other_clients_for_a_bearer_token():
    page, route = (client(["s3cret"]).get(path) for path in ("/", "/nothing"))
    assert page.headers["WWW-Authenticate"].startswith("Basic")
    assert route.headers["WWW-Authenticate"] == "Bearer"
    assert route.json()["error"]["type"] == "unauthorized"
