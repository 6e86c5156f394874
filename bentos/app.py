"""The FastAPI app: its routers and error handlers.

The routes are FastAPI's, because BentoML 1.4's routes ignore unknown fields, parse plain `curl -d` as a form, and hide
the message of most errors. `bentos/service.py` sets `app.state.served` when the service starts.
"""

from fastapi import FastAPI
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from bentos import admin, feedback, metadata, page, predict
from bentos.errors import ServiceError, error_response
from bentos.openai import chat, completions, models, tokenize

app = FastAPI(title="gpt2-instruct", docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)
for module in (page, predict, completions, chat, models, admin, tokenize, feedback, metadata):
    app.include_router(module.router)


@app.exception_handler(ServiceError)
async def respond_with_error(request: Request, error: ServiceError) -> Response:
    return error_response(error)


@app.exception_handler(ClientDisconnect)
async def handle_client_disconnect(request: Request, error: ClientDisconnect) -> Response:
    """Return a response for the access log and the metrics. No client receives it."""
    return error_response(ServiceError("client_closed_request", "the client has closed the connection"))
