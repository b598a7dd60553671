"""Refusals before the engine starts, and the engine arguments that follow from a checkpoint and the flags."""

import argparse
import os
from typing import TYPE_CHECKING, Any

import pytest

from lowbit_core.errors import CheckpointError, ConfigError
from lowbit_core.manifest import MANIFEST_NAME, PROGRESS_NAME
from lowbit_server.checkpoint import open_checkpoint
from lowbit_server.cli import add_serve_arguments, config_from, prepare_environment, run
from lowbit_server.config import Device, ServeConfig
from lowbit_server.engine.arguments import DEFAULT_CPU_KV_CACHE_BYTES, derive_engine_arguments

if TYPE_CHECKING:
    from tests.server.conftest import MakeCheckpoint

BYTES_PER_TOKEN_FP8 = 2 * 2 * 2 * 32  # layers × (keys and values) × KV heads × head size, one byte each
NO_KV_SCHEME = {"quantization_config": {"quant_method": "awq"}}


def _parse(words: list[str], environment: dict[str, str] | None = None) -> ServeConfig:
    parser = argparse.ArgumentParser()
    add_serve_arguments(parser, environment or {})
    return config_from(parser.parse_args(words))


def _arguments(config: ServeConfig, device: Device = "cpu") -> dict[str, Any]:
    return derive_engine_arguments(config, open_checkpoint(config), device)


def test_defaults_of_flags_are_those_of_the_class() -> None:
    config = _parse(["ckpt"])
    assert config == ServeConfig(directory=config.directory)


def test_flag_wins_over_environment_and_environment_over_default() -> None:
    environment = {"LOWBIT_PORT": "9000", "LOWBIT_HOST": "::1", "LOWBIT_ENFORCE_EAGER": "true"}
    config = _parse(["ckpt", "--port", "9001"], environment)
    assert (config.port, config.host, config.enforce_eager) == (9001, "::1", True)


@pytest.mark.parametrize(
    ("flag", "text", "allowed"),
    [
        ("--port", "0", "a whole number from 1 to 65535"),
        ("--max-num-seqs", "many", "a whole number from 1 to 65536"),
        ("--kv-cache-gib", "nan", "a number of GiB above 0"),
        ("--gpu-memory-utilization", "1.5", "a number above 0 and at most 1"),
        ("--kv-cache-dtype", "int4", "one of auto, fp8, bfloat16"),
    ],
)
def test_wrong_value_is_one_line_whether_flag_or_variable(flag: str, text: str, allowed: str) -> None:
    variable = "LOWBIT_" + flag[2:].replace("-", "_").upper()
    message = f"{flag} (or {variable}) is {text!r}; it must be {allowed}"
    for words, environment in (([flag, text], {}), ([], {variable: text})):
        with pytest.raises(ConfigError) as raised:
            _parse(["ckpt", *words], environment)
        assert str(raised.value) == message


def test_service_link_of_kubernetes_is_not_taken_for_our_port() -> None:
    assert _parse(["ckpt"], {"LOWBIT_PORT": "tcp://10.0.0.7:8000"}).port == ServeConfig.port


def test_flags_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(ConfigError, match="say the same thing; give one of them"):
        _parse(["ckpt", "--kv-cache-gib", "1", "--kv-cache-memory-bytes", "1"])
    with pytest.raises(ConfigError, match="LOWBIT_ALLOW_REJECTED=maybe: give 1 or 0"):
        _parse(["ckpt"], {"LOWBIT_ALLOW_REJECTED": "maybe"})
    with pytest.raises(ConfigError, match="give the checkpoint directory: lowbit serve DIR"):
        _parse([])


def test_rejected_checkpoint_is_refused_with_the_gates_reason(make_checkpoint: "MakeCheckpoint") -> None:
    directory = make_checkpoint(accepted=False)
    with pytest.raises(CheckpointError) as raised:
        open_checkpoint(ServeConfig(directory))
    assert str(raised.value) == (
        f"{directory} was rejected by its quality gate (mean KLD 0.0835 is above 0.05); "
        "quantize it again with a milder recipe, or give --allow-rejected (lowbit.json: gate)"
    )
    assert open_checkpoint(ServeConfig(directory, allow_rejected=True)).manifest is not None


def test_missing_file_is_refused(make_checkpoint: "MakeCheckpoint") -> None:
    directory = make_checkpoint()
    (directory / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"is incomplete: model\.safetensors is missing"):
        open_checkpoint(ServeConfig(directory))


def test_one_flipped_bit_is_refused_unless_hashes_are_skipped(make_checkpoint: "MakeCheckpoint") -> None:
    directory = make_checkpoint()
    path = directory / "model.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(bytes(raw))
    with pytest.raises(CheckpointError, match="does not match its SHA-256"):
        open_checkpoint(ServeConfig(directory))
    open_checkpoint(ServeConfig(directory, skip_hash_check=True))


def test_weight_file_that_the_manifest_does_not_list_is_refused(make_checkpoint: "MakeCheckpoint") -> None:
    directory = make_checkpoint()
    (directory / "extra.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError) as raised:
        open_checkpoint(ServeConfig(directory))
    assert str(raised.value) == (
        f"{directory} holds extra.safetensors, which lowbit.json does not list: remove what was added"
    )


def test_unfinished_run_is_refused(make_checkpoint: "MakeCheckpoint") -> None:
    directory = make_checkpoint()
    (directory / MANIFEST_NAME).rename(directory / PROGRESS_NAME)
    with pytest.raises(CheckpointError, match="unfinished quantize run"):
        open_checkpoint(ServeConfig(directory))


def test_directory_without_manifest_opens_with_unknown_quality(make_checkpoint: "MakeCheckpoint") -> None:
    directory = make_checkpoint(manifest=False)
    checkpoint = open_checkpoint(ServeConfig(directory))
    assert checkpoint.manifest is None
    assert checkpoint.name == "tiny-w4a16"


def test_refusal_comes_before_vllm_is_imported(make_checkpoint: "MakeCheckpoint") -> None:
    directory = make_checkpoint(accepted=False)
    parser = argparse.ArgumentParser()
    add_serve_arguments(parser, {})
    with pytest.raises(CheckpointError):
        run(parser.parse_args([str(directory)]))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"num_hidden_layers": None}, "config.json: num_hidden_layers: Input should be a valid integer"),
        ({"hidden_size": 0}, "config.json: hidden_size: Input should be greater than 0"),
    ],
)
def test_config_without_a_shape_names_the_field(
    make_checkpoint: "MakeCheckpoint", config: dict[str, Any], message: str
) -> None:
    directory = make_checkpoint(config=config)
    with pytest.raises(CheckpointError) as raised:
        open_checkpoint(ServeConfig(directory))
    assert str(raised.value) == message


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
def test_a_latent_cache_is_reckoned_in_the_models_dtype_whatever_the_checkpoint_says(
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


@pytest.mark.parametrize(("given", "warned"), [(None, False), ("0", False), ("1", True)])
def test_activations_are_not_rounded_unless_the_user_says_so_and_is_warned(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, given: str | None, warned: bool
) -> None:
    """On CPUs with AMX vLLM's default rounds them to 8 bits, which no proof covers."""
    monkeypatch.setattr(os, "environ", {} if given is None else {"VLLM_CPU_INT4_W4A8": given})
    monkeypatch.setattr("lowbit_server.cli.log.propagate", True)
    prepare_environment("INFO")
    assert os.environ["VLLM_CPU_INT4_W4A8"] == (given or "0")
    assert any("was not measured" in record.getMessage() for record in caplog.records) == warned
