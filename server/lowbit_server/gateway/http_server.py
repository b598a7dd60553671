"""The HTTP server: one socket, bound early, and a stop that lets running requests finish.

SIGTERM or SIGINT closes the listening socket, waits for the responses in flight for at most the drain
timeout, and returns. A second signal ends the wait at once.
"""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Iterator
from typing import Literal

import uvicorn
from fastapi import FastAPI
from starlette.types import ASGIApp

from lowbit_core.errors import ConfigError, EngineError
from lowbit_core.log import get_logger
from lowbit_server.config import ServeConfig, address
from lowbit_server.gateway.http_parser import bounded_http
from lowbit_server.lifecycle import SIGNALS, DrainState, Liveness

WATCH_S = 1.0
BACKLOG = 2048  # connections that wait for accept(), as uvicorn's default
KEEP_ALIVE_S = 65  # longer than the 60 s of common load balancers, so that they close idle connections first

log = get_logger("serve")


def bind(host: str, port: int) -> socket.socket:
    """Bind the port before the engine starts; raises ConfigError when it is taken or not allowed.

    `listen` comes later: until then a client is refused at once instead of waiting.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise _port_is_taken(host, port, error) from error
    return listener


def listen(listener: socket.socket) -> None:
    """Open the port; raises ConfigError when another program opened it since it was bound."""
    try:
        listener.listen(BACKLOG)
    except OSError as error:
        host, port = listener.getsockname()[:2]
        raise _port_is_taken(host, port, error) from error


def _port_is_taken(host: str, port: int, error: OSError) -> ConfigError:
    return ConfigError(
        f"cannot listen on {address(host, port)}: {error.strerror or error}; choose another --port"
    )


class _Server(uvicorn.Server):
    """uvicorn without its signal handlers, with which the process would end by the signal instead of with status 0."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def serve_until_stopped(
    app: FastAPI,
    listener: socket.socket,
    engine: Liveness,
    state: DrainState,
    config: ServeConfig,
    front: ASGIApp | None = None,
) -> None:
    """Serve `app`, behind `front` where there is one, until a signal, then drain.

    Raises EngineError when the engine dies first. A second signal ends the drain at once.
    """
    server = _server(front or app, config)
    app.state.server = server  # vLLM's error handler asks it to stop when the engine is dead
    listen(listener)
    loop = asyncio.get_running_loop()
    for number in SIGNALS:
        loop.add_signal_handler(number, _ask_to_stop, server, state)
    watch = asyncio.create_task(_stop_when_asked_or_dead(server, engine, state))
    try:
        await server.serve(sockets=[listener])
    finally:
        watch.cancel()
    if engine.dead:
        raise EngineError("the engine died while serving; its log above says why")


def _server(app: ASGIApp, config: ServeConfig, lifespan: Literal["on", "off"] = "on") -> _Server:
    return _Server(
        uvicorn.Config(
            app,
            http=bounded_http(config.max_header_bytes),
            ws="none",
            lifespan=lifespan,
            log_level="warning",
            access_log=False,
            timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=config.drain_timeout_s,
            ssl_certfile=config.ssl_certfile,
            ssl_keyfile=config.ssl_keyfile,
            server_header=False,
        )
    )


@contextlib.asynccontextmanager
async def serving_operators(
    app: ASGIApp, listener: socket.socket | None, config: ServeConfig
) -> AsyncIterator[None]:
    """Serve `app` on the operators' own port, also while the other port drains."""
    if listener is None:
        yield
        return
    server = _server(app, config, "off")
    listen(listener)
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    try:
        yield
    finally:
        server.should_exit = server.force_exit = True
        await serving


def _ask_to_stop(server: uvicorn.Server, state: DrainState) -> None:
    if state.draining:
        log.warning("stopping at once: a second signal; requests that still run are cut off")
        server.force_exit = True
    state.requested.set()


async def _stop_when_asked_or_dead(server: uvicorn.Server, engine: Liveness, state: DrainState) -> None:
    while not state.draining and not engine.dead:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(state.requested.wait(), WATCH_S)
    if state.draining:
        log.info("stopping: no new requests; running ones may finish")
    server.should_exit = True
