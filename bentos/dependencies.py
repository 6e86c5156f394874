"""Typed dependencies of route handlers: the served model, and the state of the current request."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from starlette.requests import Request

from bentos.middleware.access_log import RequestRecord
from bentos.settings import MultiTurn
from gpt2core.types import Lineage

if TYPE_CHECKING:
    from bentos.generation import TextGenerator
    from bentos.request_log import RequestLog


@dataclass
class BodyBudget:
    """Counts the bytes of all bodies that are being received, so that slow clients cannot fill the memory."""

    n_bytes: int = 0


@dataclass(frozen=True)
class Served:
    """Set once as `app.state.served`, by the service when it starts."""

    generator: "TextGenerator"
    lineage: Lineage
    started: int  # Unix seconds
    multi_turn: MultiTurn
    request_log: "RequestLog | None" = None  # None: switched off
    body_budget: BodyBudget = field(default_factory=BodyBudget)


def served(request: Request) -> Served:
    value: Served = request.app.state.served
    return value


def record(request: Request) -> RequestRecord:
    value: RequestRecord = request.state.record
    return value


def route_key(request: Request) -> str:
    """Return the client's X-Canary-Key, or else the request id. Requests with the same key go to the same version."""
    return request.headers.get("x-canary-key") or request_id(request)


def request_id(request: Request) -> str:
    return str(request.state.request_id)
