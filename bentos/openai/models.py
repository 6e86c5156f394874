"""GET /v1/models: the models that requests may name."""

from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse

from bentos.dependencies import Served, served
from bentos.openapi import ERRORS
from bentos.schemas import BASE, TUNED

router = APIRouter()


@router.get("/v1/models", responses=ERRORS)
async def list_models(request: Request) -> JSONResponse:
    """List the names that requests may use as `model` or `adapter`."""
    names = served(request).generator.adapters.models
    return JSONResponse({"object": "list", "data": [_model(served(request), name) for name in names]})


@router.get("/v1/models/{model}", responses=ERRORS)
async def get_model(request: Request, model: str) -> JSONResponse:
    served(request).generator.adapters.check_model(model, "model")
    return JSONResponse(_model(served(request), model))


def _model(served: Served, name: str) -> dict[str, Any]:
    adapter = served.generator.adapters.models[name]
    return {
        "id": name,
        "object": "model",
        "created": served.started,
        "owned_by": TUNED,
        "parent": None if adapter is None else BASE,
        "sha256": served.lineage.base.sha256 if adapter is None else adapter.sha256,
        "max_model_len": served.generator.n_positions,
    }
