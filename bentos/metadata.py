"""GET /metadata: the lineage of the served model."""

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse

from bentos.dependencies import served
from bentos.openapi import ERRORS

router = APIRouter()


@router.get("/metadata", responses=ERRORS)
async def metadata(request: Request) -> JSONResponse:
    """Return lineage.json of the run that built the served model: run, commit, data, base, adapter and metrics."""
    return JSONResponse(served(request).lineage.to_json())
