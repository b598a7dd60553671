"""The HTTP server: one socket, bound early, that answers from the start of loading to the end of the drain.

SIGTERM or SIGINT closes the listening socket, waits for the responses in flight for at most the drain timeout, and
returns. A second signal ends the wait at once.
"""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass

import uvicorn
from starlette.types import ASGIApp

from lowbit_core.errors import EngineError
from lowbit_core.log import get_logger
from lowbit_server.config import ServeConfig
from lowbit_server.flags import UNIX
from lowbit_server.http.certificates import Certificates
from lowbit_server.http.endings import DEFAULT_TIMES, Times
from lowbit_server.http.listeners import listen
from lowbit_server.http.parser import bounded_http
from lowbit_server.lifecycle import DrainState, Liveness

WATCH_S = 1.0

log = get_logger("serve")


class _Server(uvicorn.Server):
    """uvicorn without its signal handlers, with which the process would end by the signal instead of with status 0."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    def cut_off(self) -> None:
        """End at once, and every connection with it."""
        self.should_exit = self.force_exit = True
        for connection in list(self.server_state.connections):
            connection.transport.abort()


@dataclass(frozen=True)
class Serving:
    """A server that answers; `task` ends when it has stopped."""

    server: _Server
    task: "asyncio.Task[None]"


@contextlib.asynccontextmanager
async def serving(
    app: ASGIApp, listener: socket.socket, config: ServeConfig, times: Times = DEFAULT_TIMES
) -> AsyncIterator[Serving]:
    """Answer on `listener` until the block ends, which cuts off what still runs; ConfigError if the port is taken."""
    from_unix = listener.family == socket.AF_UNIX
    named = [one for one in config.forwarded_allow_ips if one != UNIX]
    proxies = ["*"] if from_unix and UNIX in config.forwarded_allow_ips else named
    certificates = _certificates(config)
    server = _Server(
        uvicorn.Config(
            app,
            http=bounded_http(config.max_header_bytes, times),
            ws="none",
            lifespan="off",
            log_level="warning",
            access_log=False,
            timeout_keep_alive=times.idle_s,
            timeout_graceful_shutdown=config.drain_timeout_s,
            ssl_context_factory=None
            if certificates is None
            else lambda _config, _default: certificates.context,
            server_header=False,
            proxy_headers=bool(proxies),
            forwarded_allow_ips=proxies,
        )
    )
    server.config.load()
    listen(listener)
    task = asyncio.create_task(server.serve(sockets=[listener]))
    renewal = None if certificates is None else asyncio.create_task(certificates.watch())
    try:
        yield Serving(server, task)
    finally:
        if renewal is not None:
            renewal.cancel()
        server.cut_off()
        await task


def _certificates(config: ServeConfig) -> Certificates | None:
    if config.ssl_certfile is None or config.ssl_keyfile is None:
        return None
    return Certificates(config.ssl_certfile, config.ssl_keyfile)


async def serve_until_stopped(serving: Serving, engine: Liveness, state: DrainState) -> None:
    """Wait until a stop is asked for, then drain; EngineError when the engine dies first."""
    watch = asyncio.create_task(_stop_when_asked_or_dead(serving.server, engine, state))
    try:
        await serving.task
    finally:
        watch.cancel()
    if engine.dead:
        raise EngineError("the engine died while serving; its log above says why")


async def _stop_when_asked_or_dead(server: _Server, engine: Liveness, state: DrainState) -> None:
    while not state.draining and not engine.dead:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(state.requested.wait(), WATCH_S)
    server.should_exit = True
    if state.draining:
        log.info("stopping: no new requests; running ones may finish")
        await state.hurried.wait()
        log.warning("stopping at once: a second signal; requests that still run are cut off")
        server.cut_off()
