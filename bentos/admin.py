"""Routes that require GPT2_ADMIN_TOKEN: load and unload adapters, named as in vLLM, and start and end a canary."""

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse

from bentos.body import read_body
from bentos.dependencies import served
from bentos.openapi import ERRORS, operation
from bentos.schemas import AdapterVersion, CanaryRequest, CanaryStatus, LoadAdapterRequest, UnloadAdapterRequest

router = APIRouter()


@router.post(
    "/v1/load_lora_adapter",
    response_model=AdapterVersion,
    responses=ERRORS,
    openapi_extra=operation(LoadAdapterRequest),
)
async def load_adapter(request: Request) -> JSONResponse:
    """Load an adapter from below GPT2_ADAPTERS_DIR, or replace a loaded one."""
    body = await read_body(request, LoadAdapterRequest)
    return JSONResponse((await served(request).generator.adapters.load(body.lora_name, body.lora_path)).model_dump())


@router.post("/v1/unload_lora_adapter", responses=ERRORS, openapi_extra=operation(UnloadAdapterRequest))
async def unload_adapter(request: Request) -> JSONResponse:
    """Unload an adapter."""
    body = await read_body(request, UnloadAdapterRequest)
    await served(request).generator.adapters.unload(body.lora_name)
    return JSONResponse({"unloaded": body.lora_name})


@router.get("/v1/canary", response_model=CanaryStatus, responses=ERRORS)
async def canary_status(request: Request) -> JSONResponse:
    """Return the canary, and the completions of both versions since it started."""
    return JSONResponse(served(request).generator.canary.status().model_dump())


@router.post("/v1/start_canary", response_model=CanaryStatus, responses=ERRORS, openapi_extra=operation(CanaryRequest))
async def start_canary(request: Request) -> JSONResponse:
    """Send a share of the requests for the default model to a loaded adapter, or change the share.

    In shadow mode, clients get the default model's answers, and the adapter only repeats the requests.
    """
    body = await read_body(request, CanaryRequest)
    await served(request).generator.adapters.set_canary(body)
    return JSONResponse(served(request).generator.canary.status().model_dump())


@router.post("/v1/end_canary", response_model=CanaryStatus, responses=ERRORS)
async def end_canary(request: Request) -> JSONResponse:
    """End the canary: send all requests for the default model to the default adapter."""
    await served(request).generator.adapters.set_canary(None)
    return JSONResponse(served(request).generator.canary.status().model_dump())
