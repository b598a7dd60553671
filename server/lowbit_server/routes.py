"""The routes that the server answers: OpenAI's, which are vLLM's code, and a few of our own.

vLLM registers many more (elastic expert parallelism, other vendors' protocols, profiling). What is not named
here is taken away, so a new vLLM does not open a route that nobody asked for.
"""

from collections.abc import Callable
from typing import Any, Protocol

from fastapi import FastAPI, Response
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST

from lowbit_server.memory import MemoryReader
from lowbit_server.metrics import LowbitCollector, exposition

OPENAI_ROUTES = frozenset(
    {
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/models",
        "/v1/responses",
        "/v1/responses/{response_id}",
        "/v1/responses/{response_id}/cancel",
        "/tokenize",
        "/detokenize",
    }
)
OPERATIONS_ROUTES = frozenset({"/health", "/version", "/openapi.json"})


class Liveness(Protocol):
    """What the health routes need from the engine."""

    @property
    def dead(self) -> bool: ...


def keep_allowed_routes(app: FastAPI) -> None:
    """Take every route away that is not in the two lists above."""
    allowed = OPENAI_ROUTES | OPERATIONS_ROUTES
    app.router.routes[:] = [route for route in app.router.routes if getattr(route, "path", None) in allowed]


def add_health_routes(app: FastAPI, engine: Liveness, is_draining: Callable[[], bool]) -> None:
    """`/livez`: restart me if this fails. `/readyz`: send me requests while this succeeds."""

    @app.get("/livez", tags=["health"])
    async def livez() -> JSONResponse:
        return _status("dead", 503) if engine.dead else _status("alive", 200)

    @app.get("/readyz", tags=["health"])
    async def readyz() -> JSONResponse:
        if engine.dead:
            return _status("dead", 503)
        return _status("draining", 503) if is_draining() else _status("ready", 200)


def _status(status: str, code: int) -> JSONResponse:
    return JSONResponse({"status": status}, status_code=code)


def add_metrics_route(app: FastAPI, registry: Any, collector: LowbitCollector, memory: MemoryReader) -> None:
    """`/metrics`: vLLM's metrics and ours in one exposition."""

    @app.get("/metrics", tags=["lowbit"])
    async def metrics() -> Response:
        await memory.refresh()
        return Response(exposition(registry, collector), media_type=CONTENT_TYPE_LATEST)


def add_checkpoint_route(app: FastAPI, document: Callable[[], dict[str, Any]], memory: MemoryReader) -> None:
    """`/lowbit/checkpoint`: the checkpoint as measured and the engine as it runs."""

    @app.get("/lowbit/checkpoint", tags=["lowbit"])
    async def checkpoint() -> JSONResponse:
        await memory.refresh()
        return JSONResponse(document())
