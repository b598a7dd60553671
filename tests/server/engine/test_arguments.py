"""The engine arguments that follow from a checkpoint, the flags and the device."""

from typing import TYPE_CHECKING, Any

import pytest

from lowbit_core.errors import ConfigError
from lowbit_core.manifest import read_manifest, write_manifest
from lowbit_server.checkpoint import open_checkpoint
from lowbit_server.config import Device, ServeConfig
from lowbit_server.engine.arguments import DEFAULT_CPU_KV_CACHE_BYTES, derive_engine_arguments

if TYPE_CHECKING:
    from tests.server.conftest import MakeCheckpoint

BYTES_PER_TOKEN_FP8 = 2 * 2 * 2 * 32  # layers × (keys and values) × KV heads × head size, one byte each
NO_KV_SCHEME = {"quantization_config": {"quant_method": "awq"}}


def _arguments(config: ServeConfig, device: Device = "cpu") -> dict[str, Any]:
    return derive_engine_arguments(config, open_checkpoint(config), device)


def test_engine_arguments_follow_from_the_checkpoint(make_checkpoint: "MakeCheckpoint") -> None:
    directory = make_checkpoint()
    assert _arguments(ServeConfig(directory)) == {
        "model": str(directory),
        "served_model_name": ["Tiny-Chat"],
        "dtype": "bfloat16",
        "kv_cache_dtype": "auto",
        "max_model_len": None,
        "tensor_parallel_size": 1,
        "pipeline_parallel_size": 1,
        "enforce_eager": False,
        "shutdown_timeout": 30,
        "max_num_queued_reqs": 1024,
        "allowed_origins": [],
        "load_format": "safetensors",
        "trust_remote_code": False,
        "kv_cache_memory_bytes": DEFAULT_CPU_KV_CACHE_BYTES,
    }


def test_float32_checkpoint_leaves_the_dtype_to_the_engine(make_checkpoint: "MakeCheckpoint") -> None:
    assert _arguments(ServeConfig(make_checkpoint(config={"dtype": "float32"})))["dtype"] == "auto"


def test_fp8_cache_is_asked_for_where_the_format_cannot_declare_it(make_checkpoint: "MakeCheckpoint") -> None:
    directory = make_checkpoint(config=NO_KV_SCHEME)
    assert _arguments(ServeConfig(directory))["kv_cache_dtype"] == "fp8"
    assert _arguments(ServeConfig(directory, kv_cache_dtype="bfloat16"))["kv_cache_dtype"] == "bfloat16"


def test_context_shrinks_to_what_the_cache_holds_and_fp8_holds_twice_as_much(
    make_checkpoint: "MakeCheckpoint",
) -> None:
    directory = make_checkpoint()
    kv_bytes = 9 * 128 * BYTES_PER_TOKEN_FP8  # nine blocks, one of them the engine's null block
    fp8 = _arguments(ServeConfig(directory, kv_cache_memory_bytes=kv_bytes))
    bfloat16 = _arguments(ServeConfig(directory, kv_cache_memory_bytes=kv_bytes, kv_cache_dtype="bfloat16"))
    assert (fp8["max_model_len"], bfloat16["max_model_len"]) == (8 * 128, 3 * 128)


def test_layers_that_were_measured_without_fp8_keep_their_type_and_take_twice_the_bytes(
    make_checkpoint: "MakeCheckpoint",
) -> None:
    directory = make_checkpoint()
    manifest = read_manifest(directory)
    assert manifest
    assert manifest.kv_cache
    first = manifest.kv_cache.model_copy(update={"skip_layers": [1]})
    write_manifest(directory, manifest.model_copy(update={"kv_cache": first}))
    kv_bytes = 10 * 128 * BYTES_PER_TOKEN_FP8
    mixed = _arguments(ServeConfig(directory, kv_cache_memory_bytes=kv_bytes))
    plain = _arguments(ServeConfig(directory, kv_cache_memory_bytes=kv_bytes, kv_cache_dtype="bfloat16"))
    assert mixed["kv_cache_dtype_skip_layers"] == ["1"]
    assert (mixed["max_model_len"], plain["max_model_len"]) == (5 * 128, 4 * 128)
    assert "kv_cache_dtype_skip_layers" not in plain


def test_context_that_cannot_fit_is_refused_before_loading(make_checkpoint: "MakeCheckpoint") -> None:
    directory = make_checkpoint()
    kv_bytes = 9 * 128 * BYTES_PER_TOKEN_FP8
    with pytest.raises(ConfigError, match=r"--max-model-len 1025 does not fit: .* hold 1024 tokens"):
        _arguments(ServeConfig(directory, kv_cache_memory_bytes=kv_bytes, max_model_len=1025))
    with pytest.raises(ConfigError, match="raise --kv-cache-gib"):
        _arguments(ServeConfig(directory, kv_cache_memory_bytes=BYTES_PER_TOKEN_FP8))
    with pytest.raises(ConfigError) as raised:
        _arguments(ServeConfig(directory, max_model_len=4096))
    assert str(raised.value) == "--max-model-len 4096 is more than the model's 2048 positions"


def test_gpu_fits_its_own_memory_and_the_cpu_refuses_the_gpus_flag(make_checkpoint: "MakeCheckpoint") -> None:
    config = ServeConfig(make_checkpoint(), gpu_memory_utilization=0.5)
    arguments = _arguments(config, "gpu")
    assert (arguments["max_model_len"], arguments["gpu_memory_utilization"]) == (-1, 0.5)
    assert "kv_cache_memory_bytes" not in arguments
    with pytest.raises(ConfigError, match="give --kv-cache-gib"):
        _arguments(config, "cpu")


@pytest.mark.parametrize("scheme", [{}, NO_KV_SCHEME])
def test_a_latent_cache_is_counted_in_the_models_dtype_whatever_the_checkpoint_says(
    make_checkpoint: "MakeCheckpoint", scheme: dict[str, Any]
) -> None:
    latent = {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "max_position_embeddings": 1 << 20}
    directory = make_checkpoint(config=latent | scheme)
    bytes_per_token = (
        2 * (512 + 64) * 2
    )  # layers × latent, two bytes each: the engine reads no FP8 scheme here
    arguments = _arguments(ServeConfig(directory, kv_cache_memory_bytes=bytes_per_token * 128 * 5))
    assert (arguments["kv_cache_dtype"], arguments["max_model_len"]) == ("auto", 4 * 128)
    with pytest.raises(ConfigError, match="caches latent attention in the model's dtype only"):
        _arguments(ServeConfig(directory, kv_cache_dtype="fp8"))


def test_parsers_adapters_and_traces_reach_the_engine(make_checkpoint: "MakeCheckpoint") -> None:
    flags: dict[str, Any] = {
        "tool_call_parser": "hermes",
        "reasoning_parser": "qwen3",
        "otlp_traces_endpoint": "http://c:4318",
    }
    directory = make_checkpoint()
    found = _arguments(
        ServeConfig(directory, lora_dir=directory, max_lora_rank=64, max_output_tokens=9, **flags)
    )
    assert {name: found[name] for name in flags} == flags
    assert found["enable_auto_tool_choice"]
    assert (found["enable_lora"], found["max_loras"], found["max_lora_rank"]) == (True, 4, 64)
    assert found["override_generation_config"] == {"max_new_tokens": 9}


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


def test_stages_that_the_cpu_engine_would_fail_in_are_refused(make_checkpoint: "MakeCheckpoint") -> None:
    config = ServeConfig(make_checkpoint(), pipeline_parallel_size=2, enforce_eager=True)
    with pytest.raises(ConfigError, match="fails at the first request on a CPU"):
        derive_engine_arguments(config, open_checkpoint(config), "cpu")
    assert derive_engine_arguments(config, open_checkpoint(config), "gpu")["pipeline_parallel_size"] == 2


def test_several_names_reach_the_engine_in_their_order(make_checkpoint: "MakeCheckpoint") -> None:
    config = ServeConfig(make_checkpoint(), served_model_name=("org/smol", "smol"))
    assert _arguments(config)["served_model_name"] == ["org/smol", "smol"]


def test_with_keys_priorities_are_in_force_from_the_start(make_checkpoint: "MakeCheckpoint") -> None:
    """The file may get one later, and the engine's policy cannot change."""
    directory = make_checkpoint()
    assert "scheduling_policy" not in _arguments(ServeConfig(directory))
    assert _arguments(ServeConfig(directory, api_keys=directory / "keys"))["scheduling_policy"] == "priority"


def test_whitespace_and_strict_tools_are_the_engines_own_switches(make_checkpoint: "MakeCheckpoint") -> None:
    directory = make_checkpoint()
    none = _arguments(ServeConfig(directory, json_whitespace="none"))["structured_outputs_config"]
    assert none == {"backend": "xgrammar", "disable_any_whitespace": True}
    strict = ServeConfig(directory, strict_tools="parameter", tool_call_parser="hermes")
    assert _arguments(strict)["tool_strict_level"] == "parameter"
    with pytest.raises(
        ConfigError, match="--strict-tools binds calls of tools, which --tool-call-parser turns on"
    ):
        _arguments(ServeConfig(directory, strict_tools="function"))


def test_only_a_shadow_needs_more_log_probabilities_than_the_engine_gives(
    make_checkpoint: "MakeCheckpoint",
) -> None:
    directory = make_checkpoint()
    assert "max_logprobs" not in _arguments(ServeConfig(directory))
    assert _arguments(ServeConfig(directory, shadow="http://base"))["max_logprobs"] == 100
