"""What our code needs of vLLM: symbols, parameters, and attributes that are read by name.

A symbol that moved between the versions that we allow is a row with several places, the newest first.
"""

MAKE_ARG_PARSER = (
    "vllm.entrypoints.common.cli_args:make_arg_parser",
    "vllm.entrypoints.launchers.cli_args:make_arg_parser",  # 0.32
)
FRONTEND_ARGUMENTS = (
    "vllm.entrypoints.common.cli_args:FrontendArgs",
    "vllm.entrypoints.launchers.cli_args:FrontendArgs",  # 0.32
)
SYMBOLS: list[tuple[str, ...]] = [
    ("vllm.engine.arg_utils:AsyncEngineArgs.from_cli_args",),
    ("vllm.engine.arg_utils:AsyncEngineArgs.create_engine_config",),
    ("vllm.entrypoints.launchers.api_server.app_state:init_app_state",),
    ("vllm.entrypoints.launchers.api_server.routers:register_api_routers",),
    MAKE_ARG_PARSER,
    ("vllm.entrypoints.launchers.utils.server_utils:lifespan",),
    ("vllm.entrypoints.serve.exception_handling.register:init_exception_handler",),
    ("vllm.entrypoints.serve.middleware.register:init_entrypoints_middleware",),
    ("vllm.model_executor.kernels.linear:_POSSIBLE_FP8_BLOCK_KERNELS",),
    ("vllm.platforms.interface:PlatformEnum",),
    ("vllm.model_executor.layers.fused_moe.modular_kernel:FusedMoEExperts._supports_current_device",),
    ("vllm.model_executor.layers.fused_moe.modular_kernel:FusedMoEExperts._supports_quant_scheme",),
    ("vllm.model_executor.layers.fused_moe.oracle.fp8:Fp8MoeBackend.CPU",),
    ("vllm.model_executor.layers.fused_moe.oracle.fp8:Fp8MoeBackend.CPU_W8A8",),
    ("vllm.model_executor.layers.fused_moe.oracle.fp8:backend_to_kernel_cls",),
    ("vllm.model_executor.layers.fused_moe.oracle.int8:Int8MoeBackend",),
    ("vllm.model_executor.layers.fused_moe.oracle.int8:backend_to_kernel_cls",),
    ("vllm.model_executor.layers.fused_moe.oracle.int_wna16:_get_priority_backends",),
    ("vllm.model_executor.layers.fused_moe.oracle.int_wna16:backend_to_kernel_cls",),
    ("vllm.model_executor.layers.quantization.utils.quant_utils:kFp8DynamicTokenSym",),
    ("vllm.model_executor.layers.quantization.utils.quant_utils:kFp8StaticChannelSym",),
    ("vllm.model_executor.layers.quantization.utils.quant_utils:kInt4Static",),
    ("vllm.model_executor.layers.quantization.utils.quant_utils:kInt4Static32",),
    ("vllm.model_executor.layers.quantization.utils.quant_utils:kInt8DynamicTokenSym",),
    ("vllm.model_executor.layers.quantization.utils.quant_utils:kInt8Static",),
    ("vllm.model_executor.layers.quantization.utils.quant_utils:kInt8StaticChannelSym",),
    ("vllm.entrypoints.openai.models.protocol:LoRAModulePath",),
    ("vllm.entrypoints.openai.models.serving:OpenAIServingModels.show_available_models",),
    ("vllm.lora.request:LoRARequest",),
    ("vllm.lora.resolver:LoRAResolverRegistry.register_resolver",),
    ("vllm.platforms:current_platform.is_cpu",),
    ("vllm.reasoning:ReasoningParserManager.list_registered",),
    ("vllm.sampling_params:SamplingParams",),
    ("vllm.tool_parsers:ToolParserManager.list_registered",),
    ("vllm.usage.usage_lib:UsageContext.OPENAI_API_SERVER",),
    ("vllm.utils.argparse_utils:FlexibleArgumentParser",),
    ("vllm.utils.mem_utils:MemorySnapshot",),
    ("vllm.v1.engine.async_llm:AsyncLLM.collective_rpc",),
    ("vllm.v1.engine.async_llm:AsyncLLM.errored",),
    ("vllm.v1.engine.async_llm:AsyncLLM.get_supported_tasks",),
    ("vllm.v1.engine.async_llm:AsyncLLM.reset_mm_cache",),
    ("vllm.v1.engine.async_llm:AsyncLLM.shutdown",),
    ("vllm.v1.executor.multiproc_executor:MultiprocExecutor.shutdown",),
    ("vllm.v1.metrics.loggers:StatLoggerBase.record",),
    ("vllm.v1.metrics.prometheus:get_prometheus_registry",),
    ("vllm.v1.metrics.stats:FinishedRequestStats.num_cached_tokens",),
    ("vllm.v1.metrics.stats:FinishedRequestStats.num_prompt_tokens",),
    ("vllm.v1.metrics.stats:FinishedRequestStats.request_id",),
    ("vllm.v1.metrics.stats:IterationStats.num_prompt_tokens",),
    ("vllm.version:__version__",),
]

PARAMETERS: list[tuple[tuple[str, ...], set[str]]] = [
    (
        ("vllm.v1.engine.async_llm:AsyncLLM.from_vllm_config",),
        {
            "vllm_config", "usage_context", "stat_loggers", "enable_log_requests", "disable_log_stats",
        },
    ),
    (("vllm.v1.engine.async_llm:AsyncLLM.shutdown",), {"timeout"}),
    (("vllm.v1.engine.async_llm:AsyncLLM.abort",), {"request_id", "internal"}),
    (("vllm.v1.engine.async_llm:AsyncLLM.add_request",), {"request_id", "prompt"}),
    (("vllm.v1.engine.async_llm:AsyncLLM.generate",), {"prompt", "sampling_params", "request_id"}),
    (("vllm.v1.engine.async_llm:AsyncLLM.collective_rpc",), {"method"}),
    (("vllm.engine.arg_utils:AsyncEngineArgs.create_engine_config",), {"usage_context", "headless"}),
    (
        ("vllm.entrypoints.launchers.api_server.app_state:init_app_state",),
        {"engine_client", "state", "args", "supported_tasks"},
    ),
    (
        ("vllm.entrypoints.launchers.api_server.routers:register_api_routers",),
        {"args", "app", "supported_tasks", "model_config"},
    ),
    (("vllm.entrypoints.serve.middleware.register:init_entrypoints_middleware",), {"args", "app"}),
    (
        ("vllm.v1.metrics.loggers:StatLoggerBase.record",),
        {"scheduler_stats", "iteration_stats", "mm_cache_stats", "engine_idx"},
    ),
    (("vllm.lora.resolver:LoRAResolver.resolve_lora",), {"base_model_name", "lora_name"}),
    (
        FRONTEND_ARGUMENTS,
        {
            "allowed_origins", "lora_modules", "tool_call_parser", "enable_auto_tool_choice", "tool_strict_level",
        },
    ),
    (
        ("vllm.engine.arg_utils:AsyncEngineArgs",),
        {
            "model", "served_model_name", "dtype", "kv_cache_dtype", "kv_cache_memory_bytes", "load_format",
            "kv_cache_dtype_skip_layers",
            "gpu_memory_utilization", "max_model_len", "max_num_seqs", "max_num_queued_reqs",
            "max_num_queued_tokens", "scheduling_policy", "tensor_parallel_size", "pipeline_parallel_size",
            "distributed_executor_backend", "nnodes", "node_rank", "master_addr", "master_port", "enforce_eager",
            "shutdown_timeout", "worker_extension_cls", "trust_remote_code", "reasoning_parser", "enable_lora",
            "otlp_traces_endpoint", "override_generation_config", "max_loras", "max_lora_rank",
            "structured_outputs_config", "max_logprobs",
        },
    ),
]  # fmt: skip

# Read by name in the worker process (lowbit_server/engine/worker.py) or from the engine's configuration.
ATTRIBUTES: list[tuple[str, str]] = [
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
    ("vllm.v1.engine.output_processor", "self.request_states"),
    ("vllm.v1.engine.output_processor", "self.external_req_ids"),
    ("vllm.v1.engine.output_processor", "self.parent_requests"),
    ("vllm.v1.engine.output_processor", "self.external_req_id"),
    ("vllm.v1.engine.output_processor", "self.prompt_len"),
    ("vllm.v1.engine.output_processor", "self.prompt_token_ids"),
    ("vllm.v1.engine.output_processor", "self.detokenizer"),
    ("vllm.v1.engine.output_processor", "self.lora_request"),
    ("vllm.v1.engine.output_processor", "self.num_cached_tokens"),
    ("vllm.v1.engine.detokenizer", "def output_token_ids"),
    ("vllm.v1.engine.parallel_sampling", "self.child_requests"),
    ("vllm.v1.metrics.stats", "scheduled_ts"),
    # What the gateway reads in answers and streams.
    ("vllm.renderers.params", 'parameter="input_tokens"'),
    ("vllm.renderers.params", 'parameter="input_text"'),
    ("vllm.v1.engine.input_processor", "longer than the maximum model length"),
    ("vllm.entrypoints.generate.base.serving", 'PRIORITY_HEADER = "X-Vllm-Priority"'),
    ("vllm.exceptions", "currently busy"),
    ("vllm.exceptions", "backlog limit"),
]
