"""`lowbit serve`, top to bottom: start the engine, prove it, build the app around it, serve, drain.

It knows the order of things and nothing of vLLM: `engine.py` does that.
"""

import contextlib
import logging
import time
from collections.abc import Callable
from typing import Any, Protocol

from fastapi import FastAPI

from lowbit_core import __version__
from lowbit_core.log import get_logger
from lowbit_server.config import Checkpoint, ServeConfig, derive_engine_arguments
from lowbit_server.drain import DrainState, address, bind, interruptible_start, serve_until_stopped
from lowbit_server.exchanges import Exchanges
from lowbit_server.gateway import Gateway, Limits
from lowbit_server.keys import KeyStore
from lowbit_server.memory import DeviceMemory, MemoryReader
from lowbit_server.metrics import LowbitCollector
from lowbit_server.preflight import refuse_unfit_machine
from lowbit_server.proof import prove_kv_scales, read_checkpoint_scales
from lowbit_server.report import EngineFacts, Service, checkpoint_document, kv_scales_in_words
from lowbit_server.routes import (
    add_checkpoint_route,
    add_health_routes,
    add_metrics_route,
    keep_allowed_routes,
)
from lowbit_server.startup import answering_that_it_loads
from lowbit_server.throughput import Throughput

log = get_logger("serve")


class ServingEngine(Protocol):
    """What the app needs from the engine; tests hand in one that is not vLLM."""

    @property
    def lifespan(self) -> Any: ...
    @property
    def dead(self) -> bool: ...
    def metrics_registry(self) -> Any: ...
    async def attach_openai_api(self, app: FastAPI) -> None: ...
    async def memory(self) -> tuple[DeviceMemory, ...]: ...
    async def facts(self) -> EngineFacts: ...


async def serve(config: ServeConfig, checkpoint: Checkpoint) -> None:
    """Serve a checked checkpoint until SIGTERM or SIGINT; raises EngineError when the engine fails it."""
    from lowbit_server.engine import (
        engine_device,
        runs_quantized_experts,
        start_engine,
    )  # vLLM: seconds, and only when needed

    device = engine_device()
    refuse_unfit_machine(config, checkpoint, device, runs_quantized_experts)
    keys = KeyStore(config.api_keys) if config.api_keys else None
    arguments = derive_engine_arguments(config, checkpoint, device)
    if keys is not None and keys.uses_priorities:
        arguments["scheduling_policy"] = "priority"
    if checkpoint.latent and (checkpoint.declares_fp8_kv or checkpoint.measured_with_fp8_kv):
        log.warning("the engine reads no FP8 cache for latent attention: it caches in the model's own dtype")
    throughput, state, began = Throughput(), DrainState(), time.monotonic()
    exchanges = Exchanges(write_log=not config.no_request_log)
    throughput.on_finished = exchanges.engine_finished
    async with contextlib.AsyncExitStack() as stack:
        listener = stack.enter_context(bind(config.host, config.port))
        with interruptible_start(), answering_that_it_loads(listener, config):
            log.info("starting vLLM on the %s with %s", device, _readable(arguments))
            engine = await stack.enter_async_context(start_engine(arguments, throughput))
            service = await inspect_engine(engine, config, checkpoint)
            app = await build_app(engine, service, throughput, exchanges, lambda: state.draining)
            limits = Limits(config.max_body_bytes, config.max_output_tokens, config.request_timeout_s)
            app.add_middleware(
                Gateway, limits=limits, keys=keys, exchanges=exchanges, is_draining=lambda: state.draining
            )
        log.info("ready in %.1f s", time.monotonic() - began)
        scheme = "https" if config.ssl_certfile else "http"
        log.info("serving %s at %s://%s/v1", service.model, scheme, address(config.host, config.port))
        await serve_until_stopped(app, listener, engine, state, config)
    log.info("stopped")


async def inspect_engine(engine: ServingEngine, config: ServeConfig, checkpoint: Checkpoint) -> Service:
    """Read back what the engine runs with and prove that the checkpoint's KV scales are in force."""
    facts = await engine.facts()
    log.info(
        "KV cache: %s tokens in %s, context %d",
        f"{facts.kv_tokens:,}",
        facts.kv_cache_dtype,
        facts.max_model_len,
    )
    proof = prove_kv_scales(
        read_checkpoint_scales(checkpoint.directory),
        facts.kv_scales,
        kv_dtype=facts.kv_cache_dtype,
        quant_method=checkpoint.quantization.get("quant_method"),
    )
    service = Service(config.served_model_name or checkpoint.name, checkpoint, facts, proof)
    log.log(logging.WARNING if proof.scales == "unit" else logging.INFO, kv_scales_in_words(service))
    return service


async def build_app(
    engine: ServingEngine,
    service: Service,
    throughput: Throughput,
    exchanges: Exchanges,
    is_draining: Callable[[], bool],
) -> FastAPI:
    """Our app: vLLM's OpenAI routes, health, one exposition of metrics, and the checkpoint's facts."""
    app = FastAPI(
        title="Lowbit", version=__version__, lifespan=engine.lifespan, docs_url=None, redoc_url=None
    )
    await engine.attach_openai_api(app)
    keep_allowed_routes(app)
    memory = MemoryReader(engine.memory, await engine.memory())
    collector = LowbitCollector(service, throughput, exchanges, lambda: memory.devices, is_draining)
    add_health_routes(app, engine, is_draining)
    add_metrics_route(app, engine.metrics_registry(), collector, memory)
    add_checkpoint_route(app, lambda: checkpoint_document(service, memory.devices), memory)
    return app


def _readable(arguments: dict[str, Any]) -> str:
    told = {name: value for name, value in arguments.items() if name != "model" and value is not None}
    return ", ".join(f"{name}={value}" for name, value in told.items())
