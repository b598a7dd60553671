"""What this machine's engine cannot run, or would run wrong, is refused in one line before it starts."""

import json
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from lowbit_core.errors import CheckpointError, ConfigError
from lowbit_server.checkpoint import Checkpoint, open_checkpoint
from lowbit_server.config import ServeConfig
from lowbit_server.engine.preflight import (
    Machine,
    quantized_experts,
    refuse_unfit_machine,
    refuse_unknown_parsers,
)

if TYPE_CHECKING:
    from tests.server.conftest import MakeCheckpoint

GROUP = {
    "targets": ["Linear"],
    "weights": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 64},
}
PLAIN = {"targets": ["re:^no$"], "weights": {"num_bits": 8, "type": "float", "strategy": "channel"}}
PACKED = {
    "quant_method": "compressed-tensors",
    "config_groups": {"plain_experts": PLAIN, "group_0": GROUP},
}
LATENT = {"kv_lora_rank": 512, "qk_rope_head_dim": 64}
YARN = {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}

OpenWith = Callable[..., Checkpoint]


@pytest.fixture
def open_with(make_checkpoint: "MakeCheckpoint") -> OpenWith:
    """A checkpoint with the configuration given and, if asked, an empty tensor of that name."""

    def open_it(config: dict[str, Any], tensor: str = "") -> Checkpoint:
        directory = make_checkpoint(manifest=False, config=config)
        if tensor:
            write_names(directory / "model-2.safetensors", tensor)
        return open_checkpoint(ServeConfig(directory))

    return open_it


def write_names(path: Path, name: str) -> None:
    header = json.dumps({name: {"dtype": "I32", "shape": [0], "data_offsets": [0, 0]}}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header)


def machine(experts: bool, fp8_blocks: bool = True) -> Machine:
    """A machine that runs quantized experts, and FP8 in blocks, or not."""
    return Machine(lambda _bits, _group_size, _rounded: experts, lambda: fp8_blocks)


ABLE, UNABLE = machine(True), machine(False)


@pytest.mark.parametrize(
    ("quantization", "tensor", "bits_and_group_size"),
    [
        (PACKED, "model.layers.1.mlp.experts.3.down_proj.weight_packed", (4, 64)),
        (PACKED, "model.layers.1.block_sparse_moe.experts.0.w1.weight_packed", (4, 64)),
        (
            {"quant_method": "awq", "bits": 4, "group_size": 128},
            "model.layers.0.mlp.experts.0.up_proj.qweight",
            (4, 128),
        ),
    ],
)
def test_int4_experts_need_a_kernel(
    open_with: OpenWith, quantization: dict[str, Any], tensor: str, bits_and_group_size: tuple[int, int]
) -> None:
    checkpoint = open_with({"quantization_config": quantization}, tensor)
    found = quantized_experts(checkpoint)
    assert found is not None
    assert ((found.bits, found.group_size), found.tensor) == (bits_and_group_size, tensor)
    config = ServeConfig(checkpoint.directory)
    with pytest.raises(CheckpointError, match="has 4-bit experts in groups of") as refused:
        refuse_unfit_machine(config, checkpoint, "cpu", UNABLE)
    assert "\n" not in str(refused.value)
    assert "scheme: none" in str(refused.value)
    refuse_unfit_machine(config, checkpoint, "cpu", ABLE)
    refuse_unfit_machine(config, checkpoint, "gpu", UNABLE)  # vLLM has several kernels there and picks one


@pytest.mark.parametrize(
    "tensor",
    ["model.layers.1.mlp.experts.3.down_proj.weight", "model.layers.1.self_attn.q_proj.weight_packed"],
)
def test_experts_in_bfloat16_run_anywhere(open_with: OpenWith, tensor: str) -> None:
    checkpoint = open_with({"quantization_config": PACKED}, tensor)
    assert quantized_experts(checkpoint) is None
    refuse_unfit_machine(ServeConfig(checkpoint.directory), checkpoint, "cpu", UNABLE)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_packed_weights_of_other_than_four_bits_are_refused_on_a_cpu(open_with: OpenWith, bits: int) -> None:
    weights = {"num_bits": bits, "type": "int", "strategy": "group", "group_size": 64}
    group = {"targets": ["model.layers.0.mlp.up_proj"], "weights": weights, "format": "pack-quantized"}
    checkpoint = open_with({"quantization_config": {"config_groups": {"group_0": group}}})
    refuse_unfit_machine(ServeConfig(checkpoint.directory), checkpoint, "gpu", ABLE)
    if bits == 4:
        refuse_unfit_machine(ServeConfig(checkpoint.directory), checkpoint, "cpu", ABLE)
        return
    with pytest.raises(
        CheckpointError, match=f"has weights of {bits} bits, for which .* no kernel on a CPU"
    ) as refused:
        refuse_unfit_machine(ServeConfig(checkpoint.directory), checkpoint, "cpu", ABLE)
    assert "\n" not in str(refused.value)


def test_scales_of_heads_are_refused_on_a_cpu_unless_the_cache_is_bfloat16(open_with: OpenWith) -> None:
    scheme = {"num_bits": 8, "type": "float", "strategy": "attn_head", "symmetric": True}
    checkpoint = open_with({"quantization_config": {"config_groups": {}, "kv_cache_scheme": scheme}})
    with pytest.raises(CheckpointError, match="has KV scales for each head") as refused:
        refuse_unfit_machine(ServeConfig(checkpoint.directory), checkpoint, "cpu", ABLE)
    assert "\n" not in str(refused.value)
    plain = ServeConfig(checkpoint.directory, kv_cache_dtype="bfloat16")
    refuse_unfit_machine(plain, checkpoint, "cpu", ABLE)
    refuse_unfit_machine(ServeConfig(checkpoint.directory), checkpoint, "gpu", ABLE)


def test_the_engine_is_not_asked_about_a_model_without_quantized_experts(open_with: OpenWith) -> None:
    def asked(*_: object) -> bool:
        raise AssertionError("a dense model has no experts to ask about")

    checkpoint = open_with({})
    refuse_unfit_machine(ServeConfig(checkpoint.directory), checkpoint, "cpu", Machine(asked, asked))


def eight_bits(kind: str, target: str, strategy: str = "channel", **inputs: Any) -> dict[str, Any]:
    """A configuration of weights and inputs of eight bits."""
    numbers = {"num_bits": 8, "type": kind}
    group = {
        "targets": [target],
        "weights": numbers | {"strategy": strategy},
        "input_activations": numbers | {"strategy": "token", "dynamic": True} | inputs,
    }
    return {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}}


@pytest.mark.parametrize("target", [r"re:^model[.]layers[.]1[.]mlp[.]experts[.]\d+[.](down_proj)$", "Linear"])
@pytest.mark.parametrize(
    ("kind", "words"),
    [("int", "experts in int8 with their inputs"), ("float", "experts in FP8 with their inputs")],
)
def test_experts_whose_inputs_are_rounded_need_a_kernel_too(
    open_with: OpenWith, kind: str, words: str, target: str
) -> None:
    asked: list[tuple[int, int, str]] = []

    def refusing(bits: int, group_size: int, rounded: str) -> bool:
        asked.append((bits, group_size, rounded))
        return False

    tensor = "model.layers.1.mlp.experts.3.down_proj.weight_scale"
    checkpoint = open_with({"quantization_config": eight_bits(kind, target)}, tensor)
    config = ServeConfig(checkpoint.directory)
    with pytest.raises(CheckpointError, match=words) as refused:
        refuse_unfit_machine(config, checkpoint, "cpu", Machine(refusing, lambda: True))
    assert asked == [(8, -1, kind)]
    assert "\n" not in str(refused.value)
    assert "scheme: none" in str(refused.value)
    refuse_unfit_machine(config, checkpoint, "cpu", ABLE)
    refuse_unfit_machine(config, checkpoint, "gpu", UNABLE)


@pytest.mark.parametrize(
    "quantization",
    [
        eight_bits("int", "model.layers.0.self_attn.q_proj"),  # of other linears
        eight_bits("float", "Linear", strategy="block"),  # for which the engine has kernels of its own
        eight_bits("int", "Linear", num_bits=4),
        {"quant_method": "modelopt"},
    ],
)
def test_scales_of_experts_that_are_not_known_are_left_to_the_engine(
    open_with: OpenWith, quantization: dict[str, Any]
) -> None:
    tensor = "model.layers.1.mlp.experts.3.down_proj.weight_scale"
    assert quantized_experts(open_with({"quantization_config": quantization}, tensor)) is None


def test_latent_attention_with_plain_positions_is_refused_on_a_cpu(open_with: OpenWith) -> None:
    checkpoint = open_with({**LATENT, "quantization_config": {}})
    config = ServeConfig(checkpoint.directory)
    with pytest.raises(CheckpointError, match="its answers would be wrong"):
        refuse_unfit_machine(config, checkpoint, "cpu", ABLE)
    refuse_unfit_machine(config, checkpoint, "gpu", ABLE)
    stretched = replace(checkpoint, config=checkpoint.config | YARN)
    refuse_unfit_machine(config, stretched, "cpu", ABLE)


@pytest.mark.parametrize(
    ("inputs", "runs"),
    [
        ({"num_bits": 8, "type": "float", "dynamic": False}, False),
        ({"num_bits": 8, "type": "float"}, False),  # not dynamic unless it says so
        ({"num_bits": 8, "type": "float", "dynamic": True}, True),
        ({"num_bits": 8, "type": "int", "dynamic": False}, True),
        (None, True),
    ],
)
def test_static_fp8_is_refused_on_a_cpu(
    open_with: OpenWith, inputs: dict[str, Any] | None, runs: bool
) -> None:
    weights = {"num_bits": 8, "type": inputs["type"] if inputs else "int", "strategy": "channel"}
    groups = {"group_0": {**GROUP, "weights": weights, "input_activations": inputs}, "group_1": GROUP}
    checkpoint = open_with({"quantization_config": PACKED | {"config_groups": groups}})
    config = ServeConfig(checkpoint.directory)
    if runs:
        refuse_unfit_machine(config, checkpoint, "cpu", ABLE)
    else:
        with pytest.raises(CheckpointError, match="or quantize with FP8_DYNAMIC or W8A8"):
            refuse_unfit_machine(config, checkpoint, "cpu", ABLE)
    refuse_unfit_machine(config, checkpoint, "gpu", ABLE)


FLOAT = {"num_bits": 4, "type": "float", "symmetric": True}
INTEGER = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 128}
FP8_BY_TOKEN = {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True}


@pytest.mark.parametrize(
    ("weights", "inputs", "words"),
    [
        (FLOAT | {"strategy": "tensor_group", "group_size": 16}, None, "4-bit floats in blocks"),
        (
            FLOAT | {"strategy": "group", "group_size": 32},
            FLOAT | {"dynamic": True},
            "4-bit floats in blocks",
        ),
        (FLOAT | {"num_bits": 8, "strategy": "group", "group_size": 32}, None, "8-bit floats in blocks"),
        (INTEGER, FP8_BY_TOKEN, "integers with FP8 inputs"),
        (INTEGER, FP8_BY_TOKEN | {"type": "int"}, None),
        (FLOAT | {"num_bits": 8, "strategy": "channel"}, FP8_BY_TOKEN, None),
    ],
    ids=["NVFP4A16", "MXFP4", "MXFP8", "W4AFP8", "W4A8", "FP8_DYNAMIC"],
)
def test_floats_in_blocks_and_hoppers_integers_are_refused_on_a_cpu(
    open_with: OpenWith, weights: dict[str, Any], inputs: dict[str, Any] | None, words: str | None
) -> None:
    group = {**GROUP, "weights": weights, "input_activations": inputs}
    checkpoint = open_with({"quantization_config": PACKED | {"config_groups": {"group_0": group}}})
    config = ServeConfig(checkpoint.directory)
    if words is None:
        refuse_unfit_machine(config, checkpoint, "cpu", ABLE)
    else:
        with pytest.raises(
            CheckpointError, match=f"has {words}, for which this engine has no kernel on a CPU;"
        ):
            refuse_unfit_machine(config, checkpoint, "cpu", ABLE)
    refuse_unfit_machine(config, checkpoint, "gpu", ABLE)


BLOCKS = {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [128, 128]}
GROUPS_OF_128 = {"num_bits": 8, "type": "float", "strategy": "group", "group_size": 128, "dynamic": True}


@pytest.mark.parametrize(
    "quantization",
    [
        PACKED
        | {"config_groups": {"group_0": {**GROUP, "weights": BLOCKS, "input_activations": GROUPS_OF_128}}},
        {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"},
    ],
    ids=["compressed-tensors", "fp8"],
)
def test_fp8_in_blocks_is_refused_on_a_cpu_without_amx(
    open_with: OpenWith, quantization: dict[str, Any]
) -> None:
    checkpoint = open_with({"quantization_config": quantization})
    config = ServeConfig(checkpoint.directory)
    refuse_unfit_machine(config, checkpoint, "cpu", ABLE)
    with pytest.raises(
        CheckpointError, match=r"FP8 weights in blocks, .* no kernel on a CPU without AMX"
    ) as refused:
        refuse_unfit_machine(config, checkpoint, "cpu", machine(True, fp8_blocks=False))
    assert "\n" not in str(refused.value)
    assert "quantize with FP8_DYNAMIC or W8A8" in str(refused.value)
    refuse_unfit_machine(config, checkpoint, "gpu", machine(True, fp8_blocks=False))


def test_an_fp8_cache_is_refused_where_latent_attention_would_drop_its_scales(open_with: OpenWith) -> None:
    checkpoint = open_with(LATENT | YARN)
    with pytest.raises(CheckpointError, match="would run with 1"):
        refuse_unfit_machine(ServeConfig(checkpoint.directory, kv_cache_dtype="fp8"), checkpoint, "gpu", ABLE)
    refuse_unfit_machine(ServeConfig(checkpoint.directory), checkpoint, "gpu", ABLE)


def test_an_unknown_parser_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    known = {"--tool-call-parser": ["hermes", "pythonic"], "--reasoning-parser": ["qwen3"]}
    refuse_unknown_parsers(ServeConfig(tmp_path, tool_call_parser="hermes", reasoning_parser="qwen3"), known)
    with pytest.raises(
        ConfigError, match="--tool-call-parser qwen is not known; choose one of hermes, pythonic"
    ):
        refuse_unknown_parsers(ServeConfig(tmp_path, tool_call_parser="qwen"), known)
