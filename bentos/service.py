"""The BentoML service: models, settings, middleware and engine for `bentos/app.py`. Built by `deploy/bento.py`.

BentoML's parent process imports this module too, so nothing here imports torch before a worker starts the service.
"""

import asyncio
import gc
import os
from functools import cache
from pathlib import Path
from time import time
from typing import Any

import bentoml
from pydantic import BaseModel
from starlette.applications import Starlette
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp

from bentos import admin, compat
from bentos.app import app
from bentos.dependencies import Served
from bentos.middleware.access_log import AccessLogMiddleware
from bentos.middleware.auth import AuthMiddleware
from bentos.middleware.drain import DrainMiddleware
from bentos.middleware.error_shape import ErrorShapeMiddleware
from bentos.middleware.head import HeadMiddleware
from bentos.middleware.metrics_path import path_label
from bentos.middleware.request_id import RequestIdMiddleware
from bentos.middleware.unhandled import UnhandledErrorMiddleware
from bentos.openapi import set_limits
from bentos.settings import Settings
from gpt2core.files import model_files, read_json, verify_directory
from gpt2core.types import Lineage

LINEAGE = Path(__file__).parent.parent / "lineage.json"
PROBES = ("/livez", "/readyz", "/healthz", "/health", "/metrics")  # no token, no log, no effect on draining
DOCUMENT, FASTAPI_DOCUMENT = "/docs.json", "/openapi.json"  # BentoML's path of the OpenAPI document, and FastAPI's
BENTOML_PATHS = (*PROBES, DOCUMENT, FASTAPI_DOCUMENT, "/schema.json")


class Models(BaseModel):
    """Tags in the model store, fixed when the Bento is built."""

    base: str
    adapter: str


models = bentoml.use_arguments(Models)


class GPT2Service(compat.WrappableService):
    """BentoML's app inside this project's middleware. Requests pass the middleware in reverse order of wrapping."""

    def wrap(self, app: Starlette) -> ASGIApp:
        compat.limit_headers(lineage().run.id)
        compat.remove_timeout(app)
        compat.remove_redirects(app)
        compat.alias_path(app, DOCUMENT, FASTAPI_DOCUMENT)  # where generators of clients look for it
        if not settings().tracing:
            compat.remove_tracing(app)
        paths = _paths()
        compat.limit_metric_labels(app, path_label(paths))
        wrapped: ASGIApp = HeadMiddleware(app)
        wrapped = ErrorShapeMiddleware(wrapped, paths)
        tokens, origins = (settings().api_token, settings().admin_token), settings().cors_origins
        wrapped = AuthMiddleware(wrapped, *tokens, PROBES, admin.router.routes, origins)
        wrapped = UnhandledErrorMiddleware(wrapped)
        wrapped = AccessLogMiddleware(wrapped, skip_paths=PROBES)
        wrapped = DrainMiddleware(wrapped, PROBES, compat.stop_listening)
        if origins:  # outside of all that may respond: the page can read errors too
            wrapped = CORSMiddleware(wrapped, origins, ("GET", "POST"), ("*",), expose_headers=("*",))
        return RequestIdMiddleware(wrapped, lineage().run.id)

    def complete_spec(self, paths: dict[str, Any]) -> None:
        """Put this model's limits into the schemas."""
        config = read_json(Path(bentoml.models.get(models.base).path, "config.json"))
        for path in paths.values():
            if isinstance(path.post, dict):
                set_limits(path.post, config["n_positions"], config["vocab_size"])


@bentoml.service(
    name="gpt2-instruct",
    workers=1,
    logging={"access": {"enabled": False}},  # AccessLogMiddleware writes the access log
    service_class=GPT2Service,
)
@bentoml.asgi_app(app, path="/")
class GPT2Instruct:
    base = bentoml.models.BentoModel(models.base)
    adapter = bentoml.models.BentoModel(models.adapter)

    def __init__(self) -> None:
        # Imported here because these modules import torch: BentoML's parent process would need 1 s and 200 MB more.
        from bentos.generation import TextGenerator
        from bentos.metrics import Metrics
        from bentos.request_log import RequestLog
        from bentos.shared_adapters import Follower

        verify_models()
        given = settings()
        log = RequestLog(given.request_log, given.request_log_text) if given.request_log else None
        self.generator = TextGenerator(
            self.base.path,
            self.adapter.path,
            Metrics(),
            weights=given.weights,
            adapters_dir=given.adapters_dir,
            request_log=log,
            base_sha256=lineage().base.sha256,
            accept_other_base=given.accept_other_base,
            follow_adapters=given.follow_adapters,
        )
        self.follower = Follower(given.adapters_dir, self.generator.adapters.follow) if given.follow_adapters else None
        app.state.served = Served(self.generator, lineage(), int(time()), given.multi_turn, log)
        # Exclude all objects so far from garbage collection. Full collections then are short and frequent: reference
        # cycles of finished requests do not grow to 100 MB, and no pause is long.
        gc.collect()
        gc.freeze()

    @bentoml.on_deployment
    @staticmethod
    def check() -> None:
        """Validate settings and models in BentoML's parent process: it would restart failing workers forever."""
        try:
            if log := settings().request_log:
                _check_writable("GPT2_REQUEST_LOG", Path(log))
            lineage()
            verify_models()
        except (ValueError, OSError) as error:
            raise SystemExit(f"Error: {error}") from None

    @bentoml.on_startup
    async def follow_adapters(self) -> None:
        if self.follower is not None:
            self._following = asyncio.create_task(self.follower.run())

    @bentoml.on_shutdown
    async def close(self) -> None:
        if self.follower is not None:
            self._following.cancel()
        self.generator.close()

    async def __is_alive__(self) -> bool:
        return self.generator.engine.is_alive

    async def __is_ready__(self) -> bool:
        return self.follower is None or self.follower.ready

    async def __metrics__(self, text: str) -> str:
        following = "" if self.follower is None else self.follower.metrics_text()
        return text + self.generator.metrics_text() + following


def verify_models() -> None:
    """Check base and adapter against their tags: a tag's version is the start of the sha256 of the content.

    Raises:
        ValueError: the content of a model has another digest.
    """
    for tag in (models.base, models.adapter):
        directory = bentoml.models.get(tag).path
        verify_directory(directory, tag.partition(":")[2], model_files(directory))


def _check_writable(name: str, file: Path) -> None:
    """Raise ValueError if the file of a setting cannot be written. Creates the file if it does not exist."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.open("ab").close()
    except OSError as error:
        raise ValueError(f"{name} is {str(file)!r}, which cannot be written: {error.strerror}") from None


@cache
def settings() -> Settings:
    """Read the settings of this process, once."""
    return Settings.from_environment(os.environ)


@cache
def lineage() -> Lineage:
    return Lineage.from_json_file(LINEAGE)


def _paths() -> list[str]:
    return ["/", *app.openapi()["paths"], *BENTOML_PATHS]
