"""A node that follows: it stays while it is needed, and not a second longer; arguments of several nodes."""

import asyncio
import socket
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

import pytest

from lowbit_core.errors import ConfigError, EngineError
from lowbit_server.checkpoint import open_checkpoint
from lowbit_server.config import ServeConfig, refuse_uneven_nodes
from lowbit_server.engine.arguments import derive_engine_arguments
from lowbit_server.engine.follower import MISSED_CHECKS, answers, stay

if TYPE_CHECKING:
    from tests.server.conftest import FakeEngine, MakeCheckpoint

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


def test_arguments_of_nodes_reach_the_engine_and_one_node_has_none(make_checkpoint: "MakeCheckpoint") -> None:
    alone = ServeConfig(make_checkpoint())
    several = ServeConfig(
        alone.directory,
        tensor_parallel_size=2,
        pipeline_parallel_size=2,
        nnodes=2,
        node_rank=1,
        master_addr="leader",
        master_port=29000,
    )
    checkpoint = open_checkpoint(alone)
    one = derive_engine_arguments(alone, checkpoint, "gpu")
    two = derive_engine_arguments(several, checkpoint, "gpu")
    assert {name: value for name, value in two.items() if one.get(name) != value} == {
        "tensor_parallel_size": 2,
        "pipeline_parallel_size": 2,
        "distributed_executor_backend": "mp",
        "nnodes": 2,
        "node_rank": 1,
        "master_addr": "leader",
        "master_port": 29000,
    }
    assert "nnodes" not in one


@pytest.mark.parametrize(
    ("tensor", "pipeline", "tokens"),
    [(1, 1, 1024), (2, 1, 2048), (4, 1, 2048), (1, 2, 2048), (2, 2, 4096)],
)
def test_context_follows_from_the_fullest_devices_part_of_the_cache(
    make_checkpoint: "MakeCheckpoint", tensor: int, pipeline: int, tokens: int
) -> None:
    # Two layers with two KV heads of 32, in FP8: 256 bytes a token. Four devices hold each KV head twice.
    config = ServeConfig(
        make_checkpoint(config={"max_position_embeddings": 65536}),
        kv_cache_memory_bytes=256 * 1024 + 256 * 128 // (min(tensor, 2) * pipeline),  # and the null block
        tensor_parallel_size=tensor,
        pipeline_parallel_size=pipeline,
    )
    assert derive_engine_arguments(config, open_checkpoint(config), "gpu")["max_model_len"] == tokens


@pytest.mark.parametrize(
    ("nnodes", "rank", "message"),
    [
        (
            3,
            0,
            "--tensor-parallel-size 2 x --pipeline-parallel-size 2 = 4 devices do not divide among --nnodes 3",
        ),
        (2, 2, "--node-rank 2 is none of --nnodes 2: they are counted from 0"),
    ],
)
def test_nodes_that_do_not_fit_are_refused(
    make_checkpoint: "MakeCheckpoint", nnodes: int, rank: int, message: str
) -> None:
    config = ServeConfig(
        make_checkpoint(), tensor_parallel_size=2, pipeline_parallel_size=2, nnodes=nnodes, node_rank=rank
    )
    with pytest.raises(ConfigError) as raised:
        refuse_uneven_nodes(config)
    assert str(raised.value) == message


def test_stages_that_the_cpu_engine_would_fail_in_are_refused(make_checkpoint: "MakeCheckpoint") -> None:
    config = ServeConfig(make_checkpoint(), pipeline_parallel_size=2, enforce_eager=True)
    with pytest.raises(ConfigError, match="fails at the first request on a CPU"):
        derive_engine_arguments(config, open_checkpoint(config), "cpu")
    assert derive_engine_arguments(config, open_checkpoint(config), "gpu")["pipeline_parallel_size"] == 2
