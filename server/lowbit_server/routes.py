"""The routes that the server answers: OpenAI's, which are vLLM's code, and a few of its own.

vLLM registers many more (elastic expert parallelism, other vendors' protocols, profiling). Those that
gateway/route_table.py does not name are removed, so that a new vLLM does not open one that nobody asked for.
"""

from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import FastAPI, HTTPException, Response
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST

from lowbit_server.engine.memory import MemoryReader
from lowbit_server.gateway.route_table import is_allowed
from lowbit_server.lifecycle import Liveness
from lowbit_server.live import Live
from lowbit_server.metrics import LowbitCollector, exposition


def keep_allowed_routes(app: FastAPI) -> None:
    """Remove every route of vLLM that the table does not name, with each of its methods."""
    app.router.routes[:] = [route for route in app.router.routes if _allowed(route)]


def _allowed(route: Any) -> bool:
    return is_allowed(getattr(route, "path", ""), frozenset(getattr(route, "methods", None) or {"MOUNT"}))


def add_health_routes(app: FastAPI, engine: Liveness, is_draining: Callable[[], bool]) -> None:
    """`/startupz`: loaded. `/livez`: restart me if it fails. `/readyz`, `/ping`: send me requests while it succeeds."""

    @app.get("/livez", tags=["health"])
    async def livez() -> JSONResponse:
        return _status("dead", 503) if engine.dead else _status("alive", 200)

    @app.get("/startupz", tags=["health"])
    async def startupz() -> JSONResponse:
        return _status("started", 200)

    @app.get("/readyz", tags=["health"])
    async def readyz() -> JSONResponse:
        if engine.dead:
            return _status("dead", 503)
        return _status("draining", 503) if is_draining() else _status("ready", 200)

    @app.get("/ping", tags=["clouds"])
    async def ping() -> Response:
        return Response(status_code=503 if engine.dead or is_draining() else 200)


def _status(status: str, code: int) -> JSONResponse:
    return JSONResponse({"status": status}, status_code=code)


def add_metrics_route(app: FastAPI, registry: Any, collector: LowbitCollector, memory: MemoryReader) -> None:
    """`/metrics`: vLLM's metrics and Lowbit's on one page."""

    @app.get("/metrics", tags=["lowbit"])
    async def metrics() -> Response:
        await memory.refresh()
        return Response(exposition(registry, collector), media_type=CONTENT_TYPE_LATEST)


Models = Callable[[], Awaitable[list[dict[str, Any]]]]


def add_models_routes(app: FastAPI, models: Models, facts: dict[str, Any]) -> None:
    """`/v1/models`: vLLM's list without this machine's paths, and with the checkpoint's facts."""

    async def listed() -> list[dict[str, Any]]:
        cards = await models()
        return [
            card | {"root": card["id"]} | ({} if card.get("parent") else {"lowbit": facts}) for card in cards
        ]

    @app.get("/v1/models", tags=["models"])
    async def all_models() -> JSONResponse:
        return JSONResponse({"object": "list", "data": await listed()})

    @app.get("/v1/models/{model:path}", tags=["models"])
    async def one_model(model: str) -> JSONResponse:
        card = next((card for card in await listed() if card["id"] == model), None)
        if card is None:
            raise HTTPException(404, f"there is no model {model!r} here; /v1/models lists those there are")
        return JSONResponse(card)


def add_page_routes(app: FastAPI, live: Live, proof: dict[str, Any], memory: MemoryReader) -> None:
    """`/lowbit/live` and `/lowbit/proof`: what the page at `/` shows, for any key."""

    @app.get("/lowbit/live", tags=["lowbit"])
    async def load() -> JSONResponse:
        await memory.refresh()
        return JSONResponse(live.document(), headers={"cache-control": "no-store"})

    @app.get("/lowbit/proof", tags=["lowbit"])
    async def proven() -> JSONResponse:
        return JSONResponse(proof)


def add_checkpoint_route(app: FastAPI, document: Callable[[], dict[str, Any]], memory: MemoryReader) -> None:
    """`/lowbit/checkpoint`: the checkpoint as it was measured, and the engine as it runs."""

    @app.get("/lowbit/checkpoint", tags=["lowbit"])
    async def checkpoint() -> JSONResponse:
        await memory.refresh()
        return JSONResponse(document())
