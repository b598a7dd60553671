"""The socket, the signals, and the stop: a whole HTTP server without an engine."""

import asyncio
import os
import signal
import socket
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import pytest
from fastapi import FastAPI
from fastapi.responses import StreamingResponse

from lowbit_core.errors import ConfigError, EngineError
from lowbit_server.config import ServeConfig, address
from lowbit_server.http.listeners import bind
from lowbit_server.http.serving import serve_until_stopped, serving
from lowbit_server.lifecycle import DrainState

if TYPE_CHECKING:
    from tests.server.conftest import FakeEngine


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with bind("127.0.0.1", 0) as bound:
        yield bound


def drain_for(seconds: int) -> ServeConfig:
    return ServeConfig(Path("unused"), drain_timeout_s=seconds)


def _url(listener: socket.socket, path: str) -> str:
    return f"http://127.0.0.1:{listener.getsockname()[1]}{path}"


async def _serve(
    app: FastAPI, listener: socket.socket, engine: "FakeEngine", state: DrainState, config: ServeConfig
) -> None:
    state.listen_to_signals()
    async with serving(app, listener, config) as server:
        await serve_until_stopped(server, engine, state)


def _slow_app() -> FastAPI:
    app = FastAPI()

    async def chunks() -> AsyncIterator[bytes]:
        for number in range(5):
            yield b"%d" % number
            await asyncio.sleep(0.1)

    @app.get("/slow")
    async def slow() -> StreamingResponse:
        return StreamingResponse(chunks())

    return app


async def _until_up(listener: socket.socket) -> None:
    async with httpx.AsyncClient() as client:
        while True:
            try:
                await client.get(_url(listener, "/openapi.json"))
            except httpx.ConnectError:
                await asyncio.sleep(0.01)
            else:
                return


async def test_sigterm_lets_the_running_stream_finish(listener: socket.socket, engine: "FakeEngine") -> None:
    state, slow = DrainState(), _url(listener, "/slow")
    server = asyncio.create_task(_serve(_slow_app(), listener, engine, state, drain_for(5)))
    await _until_up(listener)
    async with httpx.AsyncClient() as client, client.stream("GET", slow) as response:
        os.kill(os.getpid(), signal.SIGTERM)
        assert b"".join([chunk async for chunk in response.aiter_bytes()]) == b"01234"
    await asyncio.wait_for(server, 5)
    assert state.draining
    async with httpx.AsyncClient() as client:
        with pytest.raises(httpx.ConnectError):
            await client.get(slow)


async def test_stream_longer_than_the_drain_timeout_is_cut(
    listener: socket.socket, engine: "FakeEngine"
) -> None:
    state = DrainState()
    app = FastAPI()

    @app.get("/endless")
    async def endless() -> None:
        await asyncio.Event().wait()

    server = asyncio.create_task(_serve(app, listener, engine, state, drain_for(1)))
    await _until_up(listener)
    async with httpx.AsyncClient() as client:
        waiting = asyncio.create_task(client.get(_url(listener, "/endless")))
        await asyncio.sleep(0.1)
        state.requested.set()
        await asyncio.wait_for(server, 5)
        (outcome,) = await asyncio.gather(waiting, return_exceptions=True)
    assert not isinstance(outcome, httpx.Response) or outcome.status_code >= 500


async def test_a_second_signal_ends_the_drain_at_once(listener: socket.socket, engine: "FakeEngine") -> None:
    app = FastAPI()

    @app.get("/endless")
    async def endless() -> None:
        await asyncio.Event().wait()

    server = asyncio.create_task(_serve(app, listener, engine, DrainState(), drain_for(600)))
    await _until_up(listener)
    async with httpx.AsyncClient() as client:
        waiting = asyncio.create_task(client.get(_url(listener, "/endless")))
        await asyncio.sleep(0.1)
        os.kill(os.getpid(), signal.SIGTERM)
        await asyncio.sleep(0.3)
        assert not server.done()
        os.kill(os.getpid(), signal.SIGTERM)
        await asyncio.wait_for(server, 5)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)


async def test_dead_engine_ends_the_server_with_an_error(
    listener: socket.socket, engine: "FakeEngine"
) -> None:
    server = asyncio.create_task(_serve(FastAPI(), listener, engine, DrainState(), drain_for(5)))
    await _until_up(listener)
    engine.dead = True
    with pytest.raises(EngineError, match="the engine died while serving"):
        await asyncio.wait_for(server, 5)


def test_taken_port_is_one_line(listener: socket.socket) -> None:
    listener.listen()
    port = listener.getsockname()[1]
    with pytest.raises(ConfigError) as raised, bind("127.0.0.1", port):
        pass
    assert str(raised.value) == (
        f"cannot listen on 127.0.0.1:{port}: Address already in use; choose another --port"
    )


async def test_port_taken_while_the_engine_started_is_the_same_line(
    listener: socket.socket, engine: "FakeEngine"
) -> None:
    with bind("127.0.0.1", listener.getsockname()[1]) as faster:
        faster.listen()
        with pytest.raises(ConfigError, match="Address already in use; choose another --port"):
            await _serve(FastAPI(), listener, engine, DrainState(), drain_for(5))


def test_ipv6_address_is_bracketed() -> None:
    assert address("::1", 8000) == "[::1]:8000"
