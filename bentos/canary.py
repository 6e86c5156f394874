"""A canary: a share of the requests for the default model goes to another adapter, and both are counted apart."""

import hashlib
from typing import TYPE_CHECKING

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse

from bentos.body import read_body
from bentos.dependencies import served
from bentos.openapi import ADMIN_ERRORS, operation
from bentos.schemas import CanaryArm, CanaryRequest, CanaryStatus, ShadowStatus

if TYPE_CHECKING:
    from bentos.completion import CompletionResult
    from bentos.shadow import Comparison

FAILED = ("error", "deadline")  # finish reasons; a cancelled completion says nothing about its adapter

router = APIRouter()


def takes(canary: CanaryRequest, key: str) -> bool:
    """Whether requests with this key go to the canary. A larger share keeps the keys of a smaller one."""
    digest = hashlib.sha256(f"{canary.adapter}\n{key}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < canary.share * 2**64


def observe(arm: CanaryArm, result: "CompletionResult") -> None:
    """Count a completion of one version, in place."""
    if result.finish_reason in FAILED:
        arm.failed += 1
    elif result.finish_reason != "cancelled":
        arm.completed += 1
        change = result.ended_at - result.submitted_at - arm.mean_seconds
        arm.mean_seconds += change / arm.completed
        arm.variance += (change * change * (1 - 1 / arm.completed) - arm.variance) / arm.completed  # Welford


def observe_shadow(status: ShadowStatus, comparison: "Comparison") -> None:
    """Count a completed answer of a canary in shadow mode, in place."""
    status.compared += 1
    status.agreed += comparison.agreed
    status.mean_token_f1 += (comparison.token_f1 - status.mean_token_f1) / status.compared
    status.mean_logprob += ((comparison.mean_logprob or 0.0) - status.mean_logprob) / status.compared


@router.get("/v1/canary", response_model=CanaryStatus, responses=ADMIN_ERRORS)
async def canary_status(request: Request) -> JSONResponse:
    """The canary, and the completions of both versions since it started."""
    return JSONResponse(served(request).generator.canary_status().model_dump())


@router.post(
    "/v1/start_canary", response_model=CanaryStatus, responses=ADMIN_ERRORS, openapi_extra=operation(CanaryRequest)
)
async def start_canary(request: Request) -> JSONResponse:
    """Send a share of the requests for the default model to a loaded adapter; or change the share.

    In shadow mode the adapter answers them again, and clients get the default model's answer.
    """
    body = await read_body(request, CanaryRequest)
    await served(request).generator.set_canary(body)
    return JSONResponse(served(request).generator.canary_status().model_dump())


@router.post("/v1/end_canary", response_model=CanaryStatus, responses=ADMIN_ERRORS)
async def end_canary(request: Request) -> JSONResponse:
    """Send all requests for the default model to it again."""
    await served(request).generator.set_canary(None)
    return JSONResponse(served(request).generator.canary_status().model_dump())
