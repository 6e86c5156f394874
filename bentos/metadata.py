"""GET /metadata: the lineage of the served model; GET /health: whether the engine runs."""

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse

from bentos.dependencies import served
from bentos.errors import ServiceError
from bentos.openapi import ERRORS

router = APIRouter()


@router.get("/metadata", responses=ERRORS)
async def metadata(request: Request) -> JSONResponse:
    """Return lineage.json of the run that built the served model: run, commit, data, base, adapter and metrics."""
    return JSONResponse(served(request).lineage.to_json())


@router.get("/health", response_class=PlainTextResponse, responses=ERRORS)
async def health(request: Request) -> PlainTextResponse:
    """Return 200 if the engine runs, as vLLM does. Probes use /livez and /readyz."""
    if not served(request).generator.engine.is_alive:
        raise ServiceError("shutting_down", "the engine has stopped")
    return PlainTextResponse()
