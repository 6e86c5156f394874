"""POST /v1/load_lora_adapter and /v1/unload_lora_adapter, named as in vLLM. Both require GPT2_ADMIN_TOKEN."""

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse

from bentos.body import read_body
from bentos.dependencies import served
from bentos.openapi import ADMIN_ERRORS, operation
from bentos.schemas import AdapterVersion, LoadAdapterRequest, UnloadAdapterRequest

router = APIRouter()


@router.post(
    "/v1/load_lora_adapter",
    response_model=AdapterVersion,
    responses=ADMIN_ERRORS,
    openapi_extra=operation(LoadAdapterRequest),
)
async def load_adapter(request: Request) -> JSONResponse:
    """Load an adapter from below GPT2_ADAPTERS_DIR, or replace a loaded one."""
    body = await read_body(request, LoadAdapterRequest)
    return JSONResponse((await served(request).generator.load(body.lora_name, body.lora_path)).model_dump())


@router.post("/v1/unload_lora_adapter", responses=ADMIN_ERRORS, openapi_extra=operation(UnloadAdapterRequest))
async def unload_adapter(request: Request) -> JSONResponse:
    """Unload an adapter."""
    body = await read_body(request, UnloadAdapterRequest)
    await served(request).generator.unload(body.lora_name)
    return JSONResponse({"unloaded": body.lora_name})
