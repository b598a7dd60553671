"""Each vLLM symbol that the server relies on, by name: an upgrade that moves one fails here, in seconds."""

import importlib
import inspect
from importlib.util import find_spec

import pytest
from fastapi import FastAPI

from lowbit_server.gateway.middleware import WORK_PATHS
from lowbit_server.gateway.response import QUEUE_FULL
from lowbit_server.routes import CLOSED_ROUTES, OPENAI_ROUTES, OPERATIONS_ROUTES, keep_allowed_routes

pytestmark = pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed")

SYMBOLS = [
    "vllm.engine.arg_utils:AsyncEngineArgs.from_cli_args",
    "vllm.engine.arg_utils:AsyncEngineArgs.create_engine_config",
    "vllm.entrypoints.launchers.api_server.app_state:init_app_state",
    "vllm.entrypoints.launchers.api_server.routers:register_api_routers",
    "vllm.entrypoints.launchers.cli_args:make_arg_parser",
    "vllm.entrypoints.launchers.utils.server_utils:lifespan",
    "vllm.entrypoints.serve.exception_handling.register:init_exception_handler",
    "vllm.entrypoints.serve.middleware.register:init_entrypoints_middleware",
    "vllm.model_executor.layers.fused_moe.modular_kernel:FusedMoEExperts._supports_current_device",
    "vllm.model_executor.layers.fused_moe.modular_kernel:FusedMoEExperts._supports_quant_scheme",
    "vllm.model_executor.layers.fused_moe.oracle.int_wna16:_get_priority_backends",
    "vllm.model_executor.layers.fused_moe.oracle.int_wna16:backend_to_kernel_cls",
    "vllm.model_executor.layers.quantization.utils.quant_utils:kInt4Static",
    "vllm.model_executor.layers.quantization.utils.quant_utils:kInt4Static32",
    "vllm.model_executor.layers.quantization.utils.quant_utils:kInt8Static",
    "vllm.entrypoints.openai.models.protocol:LoRAModulePath",
    "vllm.entrypoints.openai.models.serving:OpenAIServingModels.show_available_models",
    "vllm.lora.request:LoRARequest",
    "vllm.lora.resolver:LoRAResolverRegistry.register_resolver",
    "vllm.platforms:current_platform.is_cpu",
    "vllm.reasoning:ReasoningParserManager.list_registered",
    "vllm.tool_parsers:ToolParserManager.list_registered",
    "vllm.usage.usage_lib:UsageContext.OPENAI_API_SERVER",
    "vllm.utils.argparse_utils:FlexibleArgumentParser",
    "vllm.utils.mem_utils:MemorySnapshot",
    "vllm.v1.engine.async_llm:AsyncLLM.collective_rpc",
    "vllm.v1.engine.async_llm:AsyncLLM.errored",
    "vllm.v1.engine.async_llm:AsyncLLM.get_supported_tasks",
    "vllm.v1.engine.async_llm:AsyncLLM.reset_mm_cache",
    "vllm.v1.engine.async_llm:AsyncLLM.shutdown",
    "vllm.v1.executor.multiproc_executor:MultiprocExecutor.shutdown",
    "vllm.v1.metrics.loggers:StatLoggerBase.record",
    "vllm.v1.metrics.prometheus:get_prometheus_registry",
    "vllm.v1.metrics.stats:FinishedRequestStats.num_prompt_tokens",
    "vllm.v1.metrics.stats:FinishedRequestStats.request_id",
    "vllm.v1.metrics.stats:IterationStats.num_prompt_tokens",
    "vllm.version:__version__",
]

PARAMETERS = [
    (
        "vllm.v1.engine.async_llm:AsyncLLM.from_vllm_config",
        {"vllm_config", "stat_loggers", "disable_log_stats"},
    ),
    ("vllm.v1.engine.async_llm:AsyncLLM.shutdown", {"timeout"}),
    (
        "vllm.entrypoints.launchers.api_server.routers:register_api_routers",
        {"args", "app", "supported_tasks", "model_config"},
    ),
    (
        "vllm.engine.arg_utils:AsyncEngineArgs",
        {
            "model",
            "served_model_name",
            "dtype",
            "kv_cache_dtype",
            "kv_cache_memory_bytes",
            "gpu_memory_utilization",
            "max_model_len",
            "max_num_seqs",
            "max_num_queued_reqs",
            "max_num_queued_tokens",
            "scheduling_policy",
            "tensor_parallel_size",
            "pipeline_parallel_size",
            "distributed_executor_backend",
            "nnodes",
            "node_rank",
            "master_addr",
            "master_port",
            "enforce_eager",
            "shutdown_timeout",
            "worker_extension_cls",
        },
    ),
]

# Read by name in the worker process (lowbit_server/engine/worker.py) or from the engine's configuration.
ATTRIBUTES = [
    ("vllm.config.compilation", "static_forward_context"),
    ("vllm.config.cache", "kv_cache_size_tokens"),
    ("vllm.v1.executor.multiproc_executor", "self.is_failed"),
    ("vllm.model_executor.layers.attention.attention", "_k_scale_float"),
    ("vllm.model_executor.layers.attention.attention", "_v_scale_float"),
    ("vllm.model_executor.layers.attention.attention", "self.kv_cache_dtype"),
    ("vllm.v1.worker.gpu_model_runner", "self.kv_caches"),
    ("vllm.v1.worker.gpu_model_runner", "def get_model"),
    ("vllm.v1.metrics.stats", "self.num_generation_tokens"),
    ("vllm.v1.worker.gpu_worker", "self.cudagraph_memory_estimate"),
    ("vllm.utils.mem_utils", "self.torch_peak"),
]


def _resolve(symbol: str) -> object:
    module, _, path = symbol.partition(":")
    found: object = importlib.import_module(module)
    for name in path.split("."):
        found = getattr(found, name)
    return found


@pytest.mark.parametrize("symbol", SYMBOLS)
def test_symbol_exists(symbol: str) -> None:
    _resolve(symbol)


@pytest.mark.parametrize(("symbol", "names"), PARAMETERS)
def test_callable_takes_the_parameters_we_pass(symbol: str, names: set[str]) -> None:
    found = _resolve(symbol)
    assert callable(found)
    assert names <= inspect.signature(found).parameters.keys()


@pytest.mark.parametrize(("module", "text"), ATTRIBUTES)
def test_attribute_read_by_name_is_still_set_there(module: str, text: str) -> None:
    spec = find_spec(module)
    assert spec is not None
    assert spec.origin is not None
    with open(spec.origin, encoding="utf-8") as source:
        assert text in source.read()


def test_worker_extension_hides_nothing_of_vllms_worker() -> None:
    worker = _resolve("vllm.v1.worker.gpu_worker:Worker")
    extension = _resolve("lowbit_server.engine.worker:WorkerExtension")
    ours = {name for name in vars(extension) if not name.startswith("__")}
    assert ours == {"lowbit_kv_scales", "lowbit_memory", "lowbit_layer_methods", "lowbit_layer_kernels"}
    assert not ours & set(dir(worker))


def test_version_is_the_pinned_one() -> None:
    assert _resolve("vllm.version:__version__") == "0.32.0"


def test_a_full_queue_reads_as_the_gateway_expects() -> None:
    exceptions = importlib.import_module("vllm.exceptions")
    for error, mark in zip(
        (exceptions.QueueOverflowError(), exceptions.MaxQueuedTokensError()), QUEUE_FULL, strict=True
    ):
        assert error.http_status == 503
        assert mark.decode() in str(error)


def test_every_route_of_vllm_is_decided() -> None:
    parser = importlib.import_module("vllm.utils.argparse_utils").FlexibleArgumentParser()
    arguments = importlib.import_module("vllm.entrypoints.launchers.cli_args").make_arg_parser(parser)
    routers = importlib.import_module("vllm.entrypoints.launchers.api_server.routers")
    app = FastAPI()
    app.state.args = arguments.parse_args([])
    routers.register_api_routers(
        app.state.args, app, ("generate", "embed", "transcription", "realtime"), None
    )
    registered = {route.path for route in app.router.routes if hasattr(route, "path")}
    decided = OPENAI_ROUTES | OPERATIONS_ROUTES | CLOSED_ROUTES
    assert registered - decided == set()
    assert CLOSED_ROUTES - registered == set()
    keep_allowed_routes(app)
    posted = {
        getattr(route, "path", "") for route in app.router.routes if "POST" in getattr(route, "methods", ())
    }
    assert posted - {"/v1/responses/{response_id}/cancel"} <= WORK_PATHS  # embeddings come with such a model
    assert {route.path for route in app.router.routes if hasattr(route, "path")} <= (
        OPENAI_ROUTES | OPERATIONS_ROUTES
    )


def test_this_machine_is_asked_for_expert_kernels_as_vllm_asks_it() -> None:
    runs = _resolve("lowbit_server.engine.vllm_engine:runs_quantized_experts")
    assert callable(runs)
    cpu = _resolve("vllm.platforms:current_platform.is_cpu")
    assert callable(cpu)
    assert runs(4, 64) in (True, False)
    if cpu():
        assert not runs(8, 64)  # vLLM has no kernel for 8-bit experts on a CPU
