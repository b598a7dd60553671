"""The only module that imports vLLM, beside `worker.py`, which vLLM loads into its workers.

tests/contract holds every symbol named here against the installed vLLM and every version that pyproject.toml allows.
This module is imported late: after everything that can be checked without vLLM, and after `cli.py` has set the
variables that vLLM reads at import.
"""

import contextlib
import uuid
from argparse import Namespace
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from fastapi import FastAPI
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.entrypoints.launchers.api_server.app_state import init_app_state
from vllm.entrypoints.launchers.api_server.routers import register_api_routers
from vllm.entrypoints.launchers.utils.server_utils import lifespan
from vllm.entrypoints.openai.models.protocol import LoRAModulePath
from vllm.entrypoints.serve.exception_handling.register import init_exception_handler
from vllm.entrypoints.serve.middleware.register import init_entrypoints_middleware
from vllm.lora.request import LoRARequest
from vllm.lora.resolver import LoRAResolver, LoRAResolverRegistry
from vllm.platforms import current_platform
from vllm.reasoning import ReasoningParserManager
from vllm.sampling_params import SamplingParams
from vllm.tool_parsers import ToolParserManager
from vllm.usage.usage_lib import UsageContext
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.executor.multiproc_executor import MultiprocExecutor
from vllm.v1.metrics.loggers import StatLoggerBase
from vllm.v1.metrics.prometheus import get_prometheus_registry
from vllm.version import __version__ as vllm_version

try:
    from vllm.entrypoints.common.cli_args import make_arg_parser
except ModuleNotFoundError:  # 0.32, which the CPU builds stay at
    from vllm.entrypoints.launchers.cli_args import make_arg_parser

from lowbit_core.errors import EngineError
from lowbit_server.config import Device
from lowbit_server.engine.adapters import Adapters
from lowbit_server.engine.interface import EngineFacts, LayerKind, Rounded
from lowbit_server.engine.kv_scales import scales_from_workers
from lowbit_server.engine.memory import DeviceMemory, merge_workers
from lowbit_server.engine.throughput import Throughput
from lowbit_server.lifecycle import in_thread
from lowbit_server.shadow.divergence import LogProbs
from lowbit_server.shadow.sampler import Answer, Sampler

WORKER_EXTENSION = "lowbit_server.engine.worker.WorkerExtension"
SHADOW_ID = "shadow-"  # begins the engine's id of what this module asks by itself
PROCESS_STOP_S = 15  # time for the engine's processes to free their memory once all requests have ended

__all__ = [
    "Engine",
    "engine_device",
    "known_parsers",
    "runs_fp8_blocks",
    "runs_quantized_experts",
    "start_engine",
    "start_follower",
]


def engine_device() -> Device:
    """The kind of device that the installed build of vLLM runs on."""
    return "cpu" if current_platform.is_cpu() else "gpu"


def known_parsers() -> dict[str, list[str]]:
    """The parsers that vLLM has, by the flag that names one."""
    return {
        "--tool-call-parser": ToolParserManager.list_registered(),
        "--reasoning-parser": ReasoningParserManager.list_registered(),
    }


def runs_quantized_experts(bits: int, group_size: int, rounded: Rounded = "none") -> bool:
    """Whether vLLM has a kernel on this machine for symmetric experts of these bits, this group size and such inputs.

    The checks that vLLM makes when it builds such a layer, without those on the layer itself (routing, activation).
    """
    from vllm.model_executor.layers.fused_moe.oracle import fp8, int8, int_wna16  # seconds: only where asked
    from vllm.model_executor.layers.quantization.utils import quant_utils

    if rounded == "int":
        keys = (quant_utils.kInt8StaticChannelSym, quant_utils.kInt8DynamicTokenSym)
        return _runs([int8.backend_to_kernel_cls(one) for one in int8.Int8MoeBackend], keys)
    if rounded == "float":  # asked of CPUs; the others' kernels do not import there
        keys = (quant_utils.kFp8StaticChannelSym, quant_utils.kFp8DynamicTokenSym)
        cpus = (fp8.Fp8MoeBackend.CPU_W8A8, fp8.Fp8MoeBackend.CPU)
        return _runs([fp8.backend_to_kernel_cls(one) for one in cpus], keys)
    four_bits = quant_utils.kInt4Static32 if group_size == 32 else quant_utils.kInt4Static
    weights = {4: four_bits, 8: quant_utils.kInt8Static}.get(bits)
    backends = [int_wna16.backend_to_kernel_cls(one) for one in int_wna16._get_priority_backends()]
    return weights is not None and _runs(backends, (weights, None))


def runs_fp8_blocks() -> bool:
    """Whether vLLM has a kernel on this CPU for FP8 weights in blocks."""
    from vllm.model_executor.kernels import linear  # seconds: only where asked
    from vllm.platforms.interface import PlatformEnum

    kernels = linear._POSSIBLE_FP8_BLOCK_KERNELS[PlatformEnum.CPU]
    return any(kernel.is_supported()[0] for kernel in kernels)


def _runs(backends: Iterable[Iterable[Any]], keys: tuple[Any, Any]) -> bool:
    """Whether a kernel of some backends runs here and takes these numbers of weights and inputs."""
    return any(
        kernel._supports_current_device() and kernel._supports_quant_scheme(*keys)
        for kernels in backends
        for kernel in kernels
    )


class _ThroughputLogger(StatLoggerBase):  # type: ignore[misc]  # vLLM has no type information here
    """Hands each step's token counts to `Throughput`, and what has finished to the sampler."""

    def __init__(self, throughput: Throughput, sampler: Sampler | None) -> None:
        self._throughput, self._sampler = throughput, sampler

    def record(
        self,
        scheduler_stats: Any,
        iteration_stats: Any,
        mm_cache_stats: Any = None,
        engine_idx: int = 0,
    ) -> None:
        if iteration_stats is not None:
            self._throughput.record(
                prompt_tokens=iteration_stats.num_prompt_tokens,
                generation_tokens=iteration_stats.num_generation_tokens,
            )
            for request in iteration_stats.finished_requests:
                if request.request_id is not None:
                    counts = request.num_prompt_tokens, request.num_generation_tokens
                    self._throughput.on_finished(request.request_id, *counts, request.num_cached_tokens)
                    if self._sampler is not None:
                        self._sampler.finished(request.request_id)

    def log_engine_initialized(self) -> None:
        """No log line: app.py reports the start."""


class _CountedEngine(AsyncLLM):  # type: ignore[misc]  # vLLM has no type information here
    """AsyncLLM that reports what an aborted request had used: vLLM's own statistics leave it out.

    Of requests that the sampler draws it is told how to read their tokens.
    """

    throughput: Throughput
    sampler: Sampler | None

    async def add_request(self, request_id: str, prompt: Any, *arguments: Any, **named: Any) -> Any:
        """vLLM's own, for every prompt of a request."""
        queue = await super().add_request(request_id, prompt, *arguments, **named)
        sampler = self.sampler
        if sampler is not None and not request_id.startswith(SHADOW_ID) and sampler.draws():
            states = list(self._states([request_id], internal=False))
            if len(states) == 1 and _is_plain_text(prompt, states[0]):
                sampler.watch(request_id, partial(_answer, states[0]))
        return queue

    async def abort(self, request_id: str | Iterable[str], internal: bool = False) -> None:
        """vLLM's own, for a client that has left or a deadline."""
        ids = [request_id] if isinstance(request_id, str) else list(request_id)
        for state in self._states(ids, internal):
            if state.stats is not None and state.stats.scheduled_ts:
                counts = state.prompt_len, state.stats.num_generation_tokens
                self.throughput.on_finished(state.external_req_id, *counts, state.num_cached_tokens)
            if self.sampler is not None:
                self.sampler.aborted(state.external_req_id)
        await super().abort(ids, internal)

    def _states(self, ids: Iterable[str], internal: bool) -> Iterator[Any]:
        """The sequences that `abort_requests` will end: those of these ids, and the choices of these parents."""
        found = self.output_processor
        for one in ids:
            for name in (one,) if internal else found.external_req_ids.get(one, ()):
                parent = found.parent_requests.get(name)
                for sequence in parent.child_requests if parent is not None else (name,):
                    if (state := found.request_states.get(sequence)) is not None:
                        yield state


def _is_plain_text(prompt: Any, state: Any) -> bool:
    """Whether the base model would read the same tokens: no picture, no embeddings, no adapter, and it generates."""
    if isinstance(prompt, dict):
        more = prompt.get("type", "token") != "token" or "multi_modal_data" in prompt
    else:
        more = bool(getattr(prompt, "mm_features", None))
    text = None not in (state.prompt_token_ids, state.detokenizer)
    return text and not more and state.lora_request is None


def _answer(state: Any) -> Answer:
    return Answer(tuple(state.prompt_token_ids), tuple(state.detokenizer.output_token_ids))


class _AdapterResolver(LoRAResolver):  # type: ignore[misc]  # vLLM has no type information here
    """Finds the adapter that a request names."""

    def __init__(self, adapters: Adapters) -> None:
        self._adapters = adapters

    async def resolve_lora(self, base_model_name: str, lora_name: str) -> Any:
        path = self._adapters.path_of(lora_name)
        return path and LoRARequest(
            lora_name=lora_name, lora_int_id=1, lora_path=str(path)
        )  # vLLM numbers it


class Engine:
    """A running vLLM engine; the `ServingEngine` of interface.py."""

    def __init__(self, client: AsyncLLM, arguments: Namespace) -> None:
        self._client = client
        self._arguments = arguments
        self._models: Any = None
        self.lifespan = lifespan  # logs statistics while the app is up

    @property
    def dead(self) -> bool:
        """Whether the engine's processes or its output loop have ended."""
        return bool(self._client.errored)

    async def attach_openai_api(self, app: FastAPI) -> None:
        """Register vLLM's routers, error handlers and middleware on `app` and fill the state they read."""
        tasks = await self._client.get_supported_tasks()
        app.state.args = self._arguments
        register_api_routers(self._arguments, app, tasks, self._client.model_config)
        init_exception_handler(app)
        init_entrypoints_middleware(self._arguments, app, tasks)
        await init_app_state(self._client, app.state, self._arguments, tasks)
        self._models = app.state.openai_serving_models

    async def models(self) -> list[dict[str, Any]]:
        """The model and its loaded adapters, as vLLM lists them."""
        return list((await self._models.show_available_models()).model_dump()["data"])

    def metrics_registry(self) -> Any:
        """The Prometheus registry that holds vLLM's metrics."""
        return get_prometheus_registry()

    async def memory(self) -> tuple[DeviceMemory, ...]:
        """Memory by device, as every worker reports it now."""
        return merge_workers(await self._client.collective_rpc("lowbit_memory"))

    async def score(self, tokens: Sequence[int], first: int, top: int) -> list[LogProbs]:
        """Log-probabilities of the `top` likeliest tokens, and of the one that is there, at `tokens[first:]`.

        One request of the engine's own; cancelled, it ends it.
        """
        asked = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=top, detokenize=False)
        name = f"{SHADOW_ID}{uuid.uuid4().hex}"
        found: Any = None
        async for output in self._client.generate({"prompt_token_ids": list(tokens)}, asked, name):
            found = output.prompt_logprobs or found
        return [{token: one.logprob for token, one in position.items()} for position in found[first:]]

    async def facts(self) -> EngineFacts:
        """What the engine runs with, read back from it."""
        caches = await self._client.collective_rpc("lowbit_kv_scales")
        inputs = await self._client.collective_rpc("lowbit_input_scales")
        layers = await self._client.collective_rpc("lowbit_layers")
        config = self._client.vllm_config
        return EngineFacts(
            vllm=vllm_version,
            device=engine_device(),
            quantization=config.model_config.quantization,
            dtype=str(config.model_config.dtype).removeprefix("torch."),
            kv_cache_dtype=_kv_dtype(caches, config.model_config.dtype),
            kv_tokens=config.cache_config.kv_cache_size_tokens,
            max_model_len=config.model_config.max_model_len,
            max_num_seqs=config.scheduler_config.max_num_seqs,
            kv_scales=scales_from_workers(caches),
            input_scales=tuple(layer for worker in inputs for layer in worker),
            layers=tuple(LayerKind(**kind) for kind in layers[0]),
        )


def _kv_dtype(workers: list[list[dict[str, Any]]], model_dtype: Any) -> str:
    """The layers' cache dtype, which each layer resolves from `auto` itself; several are joined by `+`."""
    own = str(model_dtype).removeprefix("torch.")
    found = sorted({own if layer["kv_dtype"] == "auto" else layer["kv_dtype"] for layer in workers[0]})
    return "+".join(found) or own


def _namespace(arguments: Mapping[str, Any]) -> Namespace:
    """vLLM's defaults with `arguments` on top; an unknown name is a programming error."""
    namespace: Namespace = make_arg_parser(FlexibleArgumentParser()).parse_args([])
    for name, value in arguments.items():
        if not hasattr(namespace, name):
            raise EngineError(f"vLLM {vllm_version} has no engine argument {name!r}")
        kind: Any = type(getattr(namespace, name))
        several = hasattr(kind, "__dataclass_fields__")  # a configuration object of vLLM's
        setattr(namespace, name, kind(**value) if several else value)
    return namespace


@contextlib.asynccontextmanager
async def start_engine(
    arguments: Mapping[str, Any],
    throughput: Throughput,
    adapters: Adapters,
    sampler: Sampler | None = None,
) -> AsyncIterator[Engine]:
    """Start vLLM, and stop it and its processes when the block ends.

    Raises EngineError when it does not start; vLLM has then logged the cause.
    """
    modules = [LoRAModulePath(name, str(path)) for name, path in adapters.modules]
    namespace = _namespace(
        {**arguments, "worker_extension_cls": WORKER_EXTENSION, "lora_modules": modules or None}
    )
    if adapters.directory is not None:
        LoRAResolverRegistry.register_resolver("lowbit", _AdapterResolver(adapters))
    try:
        client = await in_thread(lambda: _start(namespace, throughput, sampler))
    except Exception as error:
        raise EngineError(f"vLLM {vllm_version} did not start: {_one_line(error)}") from error
    try:
        await client.reset_mm_cache()  # as vLLM's own server does, to drop start-up dummy data
        yield Engine(client, namespace)
    finally:
        client.shutdown(timeout=PROCESS_STOP_S)


class Follower:
    """This node's workers, of an engine that another node leads."""

    def __init__(self, executor: MultiprocExecutor) -> None:
        self._executor = executor

    @property
    def dead(self) -> bool:
        """Whether one of this node's workers has ended by itself."""
        return bool(self._executor.is_failed)


@contextlib.asynccontextmanager
async def start_follower(arguments: Mapping[str, Any]) -> AsyncIterator[Follower]:
    """Start this node's workers, wait until the leader has joined, and stop them when the block ends.

    What `vllm serve --headless` does. Raises EngineError when they do not start or the leader does not come.
    """
    namespace = _namespace({**arguments, "worker_extension_cls": WORKER_EXTENSION})
    try:
        executor = await in_thread(lambda: _start_workers(namespace))
    except Exception as error:
        raise EngineError(f"vLLM {vllm_version} did not start: {_one_line(error)}") from error
    try:
        yield Follower(executor)
    finally:
        executor.shutdown()


def _start(namespace: Namespace, throughput: Throughput, sampler: Sampler | None) -> AsyncLLM:
    engine_arguments = AsyncEngineArgs.from_cli_args(namespace)
    config = engine_arguments.create_engine_config(usage_context=UsageContext.OPENAI_API_SERVER)
    client = _CountedEngine.from_vllm_config(
        vllm_config=config,
        usage_context=UsageContext.OPENAI_API_SERVER,
        stat_loggers=[lambda _config, _engine: _ThroughputLogger(throughput, sampler)],
        enable_log_requests=False,
        disable_log_stats=False,
    )
    client.throughput, client.sampler = throughput, sampler
    return client


def _start_workers(namespace: Namespace) -> MultiprocExecutor:
    engine_arguments = AsyncEngineArgs.from_cli_args(namespace)
    return MultiprocExecutor(
        engine_arguments.create_engine_config(usage_context=UsageContext.OPENAI_API_SERVER, headless=True)
    )


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
