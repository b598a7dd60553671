"""`lowbit serve --node-rank N` with N above 0: a node that holds a part of the model and answers no requests.

Node 0, the leader, has the API and the scheduler and directs this node's workers. They are not told when the leader
ends, so this module watches the port where the workers of all nodes met (`--master-port`), which closes with the
leader's last process. At SIGTERM the leader may still be answering and needs this node for every token, so the node
stays until the leader has ended, at most for the drain timeout.
"""

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable

from lowbit_core.errors import EngineError
from lowbit_core.log import get_logger
from lowbit_server.checkpoint import Checkpoint
from lowbit_server.config import ServeConfig, address
from lowbit_server.engine.arguments import derive_engine_arguments
from lowbit_server.engine.forecast import refuse_what_does_not_fit
from lowbit_server.engine.memory import host_memory_bytes
from lowbit_server.engine.nvml import Nvml
from lowbit_server.engine.preflight import Machine, refuse_unfit_machine
from lowbit_server.lifecycle import DrainState, Liveness, end_children, unless_stopped

WATCH_S = 1.0
CONNECT_S = 5.0
MISSED_CHECKS = 5  # in a row without an answer: the leader is gone, not busy

log = get_logger("serve")


async def follow(config: ServeConfig, checkpoint: Checkpoint) -> None:
    """Run this node until the leader ends or a signal comes; raises EngineError when the engine or the leader fails."""
    from lowbit_server.engine.vllm_engine import (
        engine_device,
        runs_fp8_blocks,
        runs_quantized_experts,
        start_follower,
    )  # vLLM: seconds

    device = engine_device()
    refuse_unfit_machine(config, checkpoint, device, Machine(runs_quantized_experts, runs_fp8_blocks))
    refuse_what_does_not_fit(config, checkpoint, device, host_memory_bytes(), Nvml().read())
    leader = address(config.master_addr, config.master_port)
    log.info("node %d of %d on the %s, led by %s", config.node_rank, config.nnodes, device, leader)
    began, state = time.monotonic(), DrainState()
    state.listen_to_signals()
    arguments = derive_engine_arguments(config, checkpoint, device)
    async with contextlib.AsyncExitStack() as stack:
        stack.callback(end_children)
        starting = stack.enter_async_context(start_follower(arguments))
        workers = await unless_stopped(starting, state.requested)
        log.info("ready in %.1f s", time.monotonic() - began)
        await stay(
            workers,
            lambda: answers(config.master_addr, config.master_port),
            state.requested,
            config.drain_timeout_s,
        )
    log.info("stopped")


async def stay(
    workers: Liveness,
    leader_answers: Callable[[], Awaitable[bool]],
    stop: asyncio.Event,
    drain_timeout_s: float,
    watch_s: float = WATCH_S,
) -> None:
    """Return once `stop` is set and the leader is gone or the drain is over; raises EngineError if one dies before."""
    missed = 0
    while not stop.is_set():
        if workers.dead:
            raise EngineError("a worker of this node died; its log above says why")
        missed = 0 if await leader_answers() else missed + 1
        if missed == MISSED_CHECKS:
            raise EngineError("the leader is gone: its --master-port does not answer any more")
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(stop.wait(), watch_s)
    log.info("stopping: this node stays for the leader's running requests")
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(drain_timeout_s):
            while await leader_answers():
                await asyncio.sleep(watch_s)


async def answers(host: str, port: int) -> bool:
    """Whether a process listens at this address."""
    try:
        async with asyncio.timeout(CONNECT_S):
            _, writer = await asyncio.open_connection(host, port)
    except OSError:  # a TimeoutError is one
        return False
    writer.close()
    return True
