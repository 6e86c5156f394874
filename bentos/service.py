"""The service: HTTP in, HTTP out, lineage beside it. `deploy/bento.py` builds it.

BentoML serves health and metrics, and builds and runs it; the routes are in `bentos/routes.py`.
"""

import gc
import json
import os
from pathlib import Path
from time import time
from typing import Any

import bentoml
from _bentoml_sdk import Service
from _bentoml_sdk.service.openapi import generate_spec
from bentoml._internal.server.http.traffic import TimeoutMiddleware
from pydantic import BaseModel
from starlette.types import ASGIApp

from bentos.errors import OneErrorShape
from bentos.gate import Gate
from bentos.routes import app
from bentos.schemas import set_limits

LINEAGE = Path(__file__).parent.parent / "lineage.json"

# BentoML would record a span for each message of each request, and send it nowhere: a fifth of what HTTP costs.
os.environ.setdefault("OTEL_SDK_DISABLED", "true")


class Models(BaseModel):
    """Exact tags in the model store, fixed when the Bento is built."""

    base: str
    adapter: str


class GatedService(Service[Any]):
    """A BentoML service with a `Gate` before all of it."""

    gate: Gate

    @property
    def openapi_spec(self) -> Any:
        """With this model's limits. BentoML says 3.0, whose schemas are another dialect than FastAPI's."""
        config = json.loads(Path(bentoml.models.get(models.base).path, "config.json").read_text(encoding="utf-8"))
        limits = {name: config[name] for name in ("n_positions", "vocab_size")} | {
            "n_prompt": config["n_positions"] - 1
        }
        spec = generate_spec(self, openapi_version="3.1.0")
        for path in spec.paths.values():
            if isinstance(path.post, dict):
                set_limits(path.post, limits)
        return spec

    def to_asgi(self, is_main: bool = True) -> ASGIApp:
        tokens = {"api": os.environ.get("GPT2_API_TOKEN", ""), "admin": os.environ.get("GPT2_ADMIN_TOKEN", "")}
        paths = app.openapi()["paths"]
        run_id = json.loads(LINEAGE.read_text(encoding="utf-8"))["run"]["id"]
        asgi = super().to_asgi(is_main)
        # its timer stays for a minute after each answer, 1 KB of it; the deadline of the routes ends the work too
        asgi.user_middleware = [each for each in asgi.user_middleware if each.cls is not TimeoutMiddleware]
        GatedService.gate = Gate(OneErrorShape(asgi), paths, run_id, tokens)
        return GatedService.gate


models = bentoml.use_arguments(Models)


@bentoml.service(
    name="gpt2-instruct",
    workers=1,
    logging={"access": {"enabled": False}},  # the gate writes one
    service_class=GatedService,
)
@bentoml.asgi_app(app, path="/")
class GPT2Instruct:
    base = bentoml.models.BentoModel(models.base)
    adapter = bentoml.models.BentoModel(models.adapter)

    def __init__(self) -> None:
        # here: BentoML's parent process reads this file too, and need not load torch for it (a second, 200 MB)
        from bentos.answering import Answerer
        from bentos.request_log import RequestLog

        environment = os.environ.get
        log = RequestLog(environment("GPT2_REQUEST_LOG", ""), environment("GPT2_REQUEST_LOG_TEXT", "hash"))
        weights, adapters = environment("GPT2_WEIGHTS", "auto"), environment("GPT2_ADAPTERS_DIR", "")
        self.answerer = Answerer(self.base.path, self.adapter.path, weights, adapters, log)
        app.state.answerer, app.state.started = self.answerer, int(time())
        app.state.lineage = json.loads(LINEAGE.read_text(encoding="utf-8"))
        GatedService.gate.drain_at_sigterm()
        # What is loaded now stays. Without it a full collection is soon done, and so it is done more often: the cycles
        # of answered requests do not add up to 100 MB, and no pause is long.
        gc.collect()
        gc.freeze()

    @bentoml.on_shutdown
    def close(self) -> None:
        self.answerer.close()

    async def __is_ready__(self) -> bool:
        return not GatedService.gate.draining

    async def __metrics__(self, text: str) -> str:
        from bentos import metrics

        return text + metrics.gauges(self.answerer.gauges)
