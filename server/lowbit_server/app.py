"""`lowbit serve`, top to bottom: start the engine, prove it, build the app around it, serve, drain.

The order of things only: what concerns vLLM is in `engine/vllm_engine.py`.
"""

import contextlib
import logging
import os
import socket
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from typing import Any

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp

from lowbit_core import __version__
from lowbit_core.cpu_speeds import ZENTORCH_EXTRA, instructions, lacks_zentorch
from lowbit_core.log import get_logger
from lowbit_server.checkpoint import Checkpoint, served_names
from lowbit_server.config import Device, ServeConfig, base_url
from lowbit_server.cost.energy import EnergyMeter, read_rapl
from lowbit_server.cost.price import Cost
from lowbit_server.cost.usage_book import UsageBook
from lowbit_server.cost.usage_file import open_usage_file
from lowbit_server.engine.adapters import Adapters, open_adapters
from lowbit_server.engine.arguments import derive_engine_arguments
from lowbit_server.engine.forecast import refuse_what_does_not_fit
from lowbit_server.engine.input_scales import prove_input_scales, read_input_scales
from lowbit_server.engine.interface import EngineFacts, ServingEngine
from lowbit_server.engine.kv_scales import prove_kv_scales, read_checkpoint_scales
from lowbit_server.engine.memory import MemoryReader, host_memory_bytes
from lowbit_server.engine.nvml import GpuMemory, Nvml
from lowbit_server.engine.preflight import Machine, refuse_unfit_machine, refuse_unknown_parsers
from lowbit_server.engine.throughput import Throughput
from lowbit_server.gateway.keys import KeyStore
from lowbit_server.gateway.middleware import AdminPort, Gateway
from lowbit_server.gateway.openapi import describe_answers
from lowbit_server.gateway.request_limits import Models, ServerLimits
from lowbit_server.gateway.request_tracker import RequestTracker
from lowbit_server.http.entrance import Entrance
from lowbit_server.http.listeners import bind, listener_of
from lowbit_server.http.loading import Loading
from lowbit_server.http.serving import serve_until_stopped, serving
from lowbit_server.lifecycle import DrainState, end_children, unless_stopped
from lowbit_server.live import Live, proof_document
from lowbit_server.metrics import LowbitCollector
from lowbit_server.page.page import Page
from lowbit_server.predictions import add_predictions_route
from lowbit_server.production import Production
from lowbit_server.report import (
    Service,
    checkpoint_document,
    kernels_in_words,
    kv_scales_in_words,
    model_card,
    slower_than_bf16,
)
from lowbit_server.routes import (
    add_checkpoint_route,
    add_health_routes,
    add_metrics_route,
    add_models_routes,
    add_page_routes,
    keep_allowed_routes,
)
from lowbit_server.shadow.base_endpoint import BaseEndpoint
from lowbit_server.shadow.sampler import Sampler
from lowbit_server.shadow.worker import Shadow

log = get_logger("serve")


@dataclass(frozen=True)
class Parts:
    """What a server is made of before its engine starts; everything that can be refused has been."""

    config: ServeConfig
    checkpoint: Checkpoint
    device: Device
    engine_arguments: dict[str, Any]
    names: tuple[str, ...]
    adapters: Adapters
    nvml: Nvml
    usage: UsageBook | None
    keys: KeyStore | None
    throughput: Throughput
    tracker: RequestTracker
    production: Production
    state: DrainState

    @property
    def is_draining(self) -> Callable[[], bool]:
        return lambda: self.state.draining

    def gateway(self, app: FastAPI) -> Gateway:
        """The loaded app behind its limits and keys."""
        models = Models(
            self.names[0], lambda name: name in self.names or self.adapters.path_of(name) is not None
        )
        return Gateway(
            app, _limits(self.config), self.keys, self.tracker, models, is_draining=self.is_draining,
            admin_elsewhere=self.config.admin_port is not None, usage=self.usage,
        )  # fmt: skip


def prepare(config: ServeConfig, checkpoint: Checkpoint) -> Parts:
    """Check that this machine can serve the checkpoint so, and make all but the engine; raises ConfigError."""
    from lowbit_server.engine import vllm_engine as vllm  # takes seconds: only when needed

    device = vllm.engine_device()
    refuse_unfit_machine(
        config, checkpoint, device, Machine(vllm.runs_quantized_experts, vllm.runs_fp8_blocks)
    )
    nvml = Nvml()
    refuse_what_does_not_fit(config, checkpoint, device, host_memory_bytes(), nvml.read())
    refuse_unknown_parsers(config, vllm.known_parsers())
    names = served_names(config, checkpoint)
    adapters = open_adapters(config, names)
    usage = UsageBook(open_usage_file(config.usage_file)) if config.usage_file else None
    keys = KeyStore(config.api_keys, counts_months=usage is not None) if config.api_keys else None
    tracker, throughput = RequestTracker(write_log=not config.no_request_log, usage=usage), Throughput()
    production = _production(config, nvml, usage, keys, tracker)
    throughput.on_finished = tracker.engine_finished
    throughput.on_step = production.cost.add if production.cost else None
    arguments = _engine_arguments(config, checkpoint, device)
    return Parts(
        config, checkpoint, device, arguments, names, adapters, nvml, usage, keys, throughput, tracker, production,
        DrainState(),
    )  # fmt: skip


async def serve(config: ServeConfig, checkpoint: Checkpoint, held: socket.socket | None = None) -> None:
    """Serve a checked checkpoint until SIGTERM or SIGINT; raises EngineError when the engine fails it.

    `held`: the socket to listen on, where it has been opened.
    """
    parts, began = prepare(config, checkpoint), time.monotonic()
    async with contextlib.AsyncExitStack() as stack:
        stack.callback(end_children)
        if parts.usage is not None:
            await stack.enter_async_context(parts.usage.kept())
        listener = stack.enter_context(listener_of(config) if held is None else held)
        admin = stack.enter_context(bind(config.host, config.admin_port)) if config.admin_port else None
        parts.state.listen_to_signals()
        loading, page = Loading(), with_page(config)
        front, operators = (
            Entrance(one, config.root_path, config.max_body_bytes, dict(config.aliases))
            for one in (page(loading), loading)
        )
        server = await stack.enter_async_context(serving(with_cors(front, config), listener, config))
        if admin is not None:
            await stack.enter_async_context(serving(operators, admin, config))
        engines = await stack.enter_async_context(contextlib.AsyncExitStack())  # ends before the servers
        engine, app = await unless_stopped(_load(parts, engines, loading), parts.state.requested)
        app.state.server = server.server  # vLLM's error handler asks it to stop when the engine is dead
        await engines.enter_async_context(app.router.lifespan_context(app))
        operators.open(AdminPort(app))
        front.open(page(parts.gateway(app)))
        log.info(
            "ready in %.1f s: %s at %s", time.monotonic() - began, ", ".join(parts.names), base_url(config)
        )
        await serve_until_stopped(server, engine, parts.state)
    log.info("stopped")


async def _load(
    parts: Parts, engines: contextlib.AsyncExitStack, loading: Loading
) -> tuple[ServingEngine, FastAPI]:
    """Start the engine, prove it, and build the app around it."""
    from lowbit_server.engine import vllm_engine as vllm

    config, production = parts.config, parts.production
    sampler = Sampler(config.shadow_share, production.shadow.take) if production.shadow else None
    log.info("starting vLLM on the %s with %s", parts.device, _readable(parts.engine_arguments))
    engine = await engines.enter_async_context(
        vllm.start_engine(parts.engine_arguments, parts.throughput, parts.adapters, sampler)
    )
    loading.next_stage()
    service = await inspect_engine(engine, config, parts.checkpoint)
    loading.next_stage()
    await engines.enter_async_context(production.kept(engine, service.facts.max_model_len))
    page, gpus = not config.no_page, parts.nvml.read
    return engine, await build_app(
        engine, service, parts.throughput, parts.tracker, gpus, parts.is_draining, production, page=page
    )


def _production(
    config: ServeConfig, nvml: Nvml, usage: UsageBook | None, keys: KeyStore | None, tracker: RequestTracker
) -> Production:
    gpus = config.tensor_parallel_size * config.pipeline_parallel_size // config.nnodes
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    shadow = None
    if config.shadow is not None:
        base = BaseEndpoint(config.shadow, config.shadow_key_file)
        shadow = Shadow(base, lambda: tracker.active == 0, config.shadow_max_tokens)
    return Production(
        EnergyMeter((lambda: nvml.energy(visible, gpus), read_rapl)),
        Cost(config.price_per_hour) if config.price_per_hour else None,
        usage,
        (lambda: keys.with_quota) if keys is not None else tuple,
        shadow,
    )


def _engine_arguments(config: ServeConfig, checkpoint: Checkpoint, device: Device) -> dict[str, Any]:
    if checkpoint.latent and (checkpoint.declares_fp8_kv or checkpoint.measured_with_fp8_kv):
        log.warning("the engine has no FP8 cache for latent attention: it caches in the model's own dtype")
    return derive_engine_arguments(config, checkpoint, device)


def with_cors(app: ASGIApp, config: ServeConfig) -> ASGIApp:
    """CORS goes before the gateway: browsers send a preflight without a key, and must be able to read refusals."""
    if not config.cors_origins:
        return app
    return CORSMiddleware(
        app, allow_origins=config.cors_origins, allow_methods=["*"], allow_headers=["*"], expose_headers=["*"]
    )


def with_page(config: ServeConfig) -> Callable[[ASGIApp], ASGIApp]:
    """What puts the page before an app, or leaves the app as it is where the page is turned off."""
    if config.no_page:
        return lambda app: app
    return Page(config.root_path, keys=config.api_keys is not None).before


def _limits(config: ServeConfig) -> ServerLimits:
    return ServerLimits(**{field.name: getattr(config, field.name) for field in fields(ServerLimits)})


async def inspect_engine(engine: ServingEngine, config: ServeConfig, checkpoint: Checkpoint) -> Service:
    """Read back what the engine runs with, and check that the checkpoint's scales are in force."""
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
        quant_method=checkpoint.quantization.get("quant_method"),
        skipped=checkpoint.layers_without_fp8_kv,
    )
    service = Service(served_names(config, checkpoint)[0], checkpoint, facts, proof)
    log.log(logging.WARNING if proof.scales == "unit" else logging.INFO, kv_scales_in_words(service))
    static, ours = read_input_scales(checkpoint.directory), checkpoint.manifest is not None
    if proven := prove_input_scales(static, facts.input_scales, all_reported=ours):
        log.info(
            "input scales: %d of %d linears that have one run with the checkpoint's", proven, len(static)
        )
    _log_kernels(facts)
    return service


def _log_kernels(facts: EngineFacts) -> None:
    for line in kernels_in_words(facts.layers):
        log.info(line)
    if facts.device == "cpu":
        for line in slower_than_bf16(facts.layers, instructions()):
            log.warning(line)
        if lacks_zentorch():
            log.warning("this AMD processor has faster kernels that are not installed: %s", ZENTORCH_EXTRA)


async def build_app(
    engine: ServingEngine,
    service: Service,
    throughput: Throughput,
    tracker: RequestTracker,
    gpus: Callable[[], Iterable[GpuMemory]],
    is_draining: Callable[[], bool],
    production: Production,
    *,
    page: bool = True,
) -> FastAPI:
    """The whole app: vLLM's OpenAI routes, health, metrics, the checkpoint's facts, and what the page asks for."""
    app = FastAPI(
        title="Lowbit", version=__version__, lifespan=engine.lifespan, docs_url=None, redoc_url=None
    )
    await engine.attach_openai_api(app)
    keep_allowed_routes(app)
    describe_answers(app)
    add_models_routes(app, engine.models, model_card(service))
    memory = MemoryReader(engine.memory, await engine.memory())
    collector = LowbitCollector(
        service, throughput, tracker, lambda: memory.devices, gpus, is_draining, production
    )
    add_health_routes(app, engine, is_draining)
    add_metrics_route(app, engine.metrics_registry(), collector, memory)
    add_predictions_route(app)
    add_checkpoint_route(app, lambda: checkpoint_document(service, memory.devices), memory)
    if page:
        sources = engine.metrics_registry(), lambda: memory.devices, is_draining, production.joules
        live = Live(service, throughput, tracker, *sources)
        add_page_routes(app, live, proof_document(service), memory)
    return app


def _readable(arguments: dict[str, Any]) -> str:
    told = {name: value for name, value in arguments.items() if name != "model" and value is not None}
    return ", ".join(f"{name}={value}" for name, value in told.items())
