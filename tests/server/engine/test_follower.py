"""A node that follows: it stays while it is needed, and not longer."""

import asyncio
import socket
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

import pytest

from lowbit_core.errors import EngineError
from lowbit_server.engine.follower import MISSED_CHECKS, answers, stay

if TYPE_CHECKING:
    from tests.server.conftest import FakeEngine

QUICK_S = 0.001
LONG_S = 60.0


def leader(*up: bool) -> Callable[[], Awaitable[bool]]:
    """Answers as said, look by look; the last answer stands."""
    looks = iter(up)

    async def look() -> bool:
        return next(looks, up[-1])

    return look


async def test_a_node_that_is_asked_to_stop_stays_until_the_leader_is_gone(engine: "FakeEngine") -> None:
    stop, looks = asyncio.Event(), 0

    async def gone_after_twenty_looks() -> bool:
        nonlocal looks
        looks += 1
        return looks < 20

    stop.set()
    await asyncio.wait_for(stay(engine, gone_after_twenty_looks, stop, LONG_S, QUICK_S), 5)
    assert looks == 20


async def test_a_node_stays_no_longer_than_the_drain(engine: "FakeEngine") -> None:
    stop = asyncio.Event()
    stop.set()
    await asyncio.wait_for(stay(engine, leader(True), stop, 0.05, QUICK_S), 5)


async def test_a_leader_that_is_gone_unasked_ends_the_node(engine: "FakeEngine") -> None:
    missed_once = (*[False] * (MISSED_CHECKS - 1), True)
    with pytest.raises(EngineError, match="the leader is gone"):
        await asyncio.wait_for(stay(engine, leader(*missed_once, False), asyncio.Event(), LONG_S, QUICK_S), 5)


async def test_a_worker_that_dies_ends_the_node(engine: "FakeEngine") -> None:
    engine.dead = True
    with pytest.raises(EngineError, match="a worker of this node died"):
        await stay(engine, leader(True), asyncio.Event(), LONG_S, QUICK_S)


async def test_a_leader_answers_while_its_port_is_open() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
        assert not await answers("127.0.0.1", port)
        listener.listen()
        assert await answers("127.0.0.1", port)
    assert not await answers("127.0.0.1", port)
