"""Authentication by bearer tokens: some for all routes, others for the routes that change adapters."""

import base64
import hmac
from collections.abc import Collection
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.routing import BaseRoute, Match
from starlette.types import ASGIApp, Receive, Scope, Send

from bentos.errors import ServiceError, error_response


class AuthMiddleware:
    """Rejects requests without a valid token, and requests that a page of another site sends through a browser."""

    def __init__(
        self,
        app: ASGIApp,
        api_tokens: Collection[str],
        admin_tokens: Collection[str],
        open_paths: Collection[str],
        admin_routes: Collection[BaseRoute],
        cors_origins: Collection[str],
    ) -> None:
        """
        Args:
            api_tokens: all routes except `open_paths` require one of them; if empty, these routes require no token.
            admin_tokens: `admin_routes` require one of them. All other routes accept them too. If empty, `admin_routes`
                are disabled.
            cors_origins: origins whose pages may send requests to routes that require no token; "*": all.
        """
        self.app, self.api_tokens, self.admin_tokens = app, api_tokens, admin_tokens
        self.open_paths, self.admin_routes, self.cors_origins = open_paths, admin_routes, cors_origins

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        accepted = self._accepted_tokens(scope) if scope["type"] == "http" else None
        if accepted is None and scope["type"] == "http" and _is_forged(scope) and not self._is_permitted(scope):
            message = "a page of another site sent this request; GPT2_CORS_ORIGINS of the server does not permit that"
            await error_response(ServiceError("forbidden", message))(scope, receive, send)
        elif accepted is None or _has_token(scope, accepted):
            await self.app(scope, receive, send)
        elif not accepted:
            error = ServiceError("forbidden", "this route is disabled: the server has no GPT2_ADMIN_TOKEN")
            await error_response(error)(scope, receive, send)
        else:
            # Basic: a browser that opens the page asks for a password (the token), and sends it with later requests.
            scheme = 'Basic realm="gpt2-instruct", charset="UTF-8"' if scope["path"] == "/" else "Bearer"
            error = ServiceError("unauthorized", "a valid token is required: Authorization: Bearer …, or X-Api-Key")
            await error_response(error, {"WWW-Authenticate": scheme})(scope, receive, send)

    def _accepted_tokens(self, scope: Scope) -> list[str] | None:
        """Return the tokens that this route accepts; None: it requires no token; []: it accepts no token."""
        # Match as the router does instead of comparing paths: for the router, "/v1/load_lora_adapter\n" is that route.
        if any(route.matches(scope)[0] != Match.NONE for route in self.admin_routes):
            return [*self.admin_tokens]
        if scope["path"] in self.open_paths or not self.api_tokens:
            return None
        return [*self.api_tokens, *self.admin_tokens]

    def _is_permitted(self, scope: Scope) -> bool:
        return "*" in self.cors_origins or Headers(scope=scope).get("origin") in self.cors_origins


def _has_token(scope: Scope, accepted: list[str]) -> bool:
    headers = Headers(scope=scope)
    # X-Api-Key too: some proxies, such as Kubernetes' API server, do not forward Authorization
    given = [value.encode("latin-1") for value in headers.getlist("x-api-key")]
    given += [_token(value, scope) for value in headers.getlist("authorization")]
    matches = [hmac.compare_digest(one, token.encode()) for one in given for token in accepted]  # each in constant time
    return any(matches)


def _token(authorization: str, scope: Scope) -> bytes:
    scheme, _, value = authorization.partition(" ")
    if scheme.lower() == "bearer":
        return value.strip().encode("latin-1")
    if scheme.lower() == "basic" and not _is_forged(scope):
        try:
            return base64.b64decode(value, validate=True).partition(b":")[2]
        except ValueError:
            return b""
    return b""


def _is_forged(scope: Scope) -> bool:
    """Whether this is a cross-site request forgery (CSRF): a page of another site made the browser send the request.

    The browser may add its stored password. It sets Sec-Fetch-Site only over https and for localhost; otherwise Origin
    is compared with Host. GET and HEAD are safe, because the other page cannot read the response. JSON is safe, because
    browsers send it to another site only if that site permits it by CORS; this service never permits it with a stored
    password.
    """
    headers = Headers(scope=scope)
    content_type = headers.get("content-type", "").partition(";")[0].strip().lower()
    if scope["method"] in ("GET", "HEAD") or content_type == "application/json":
        return False
    if site := headers.get("sec-fetch-site"):
        return site not in ("same-origin", "none")
    origin = headers.get("origin")
    try:
        return origin is not None and urlsplit(origin).netloc != headers.get("host")
    except ValueError:  # no browser sends such an origin
        return True
