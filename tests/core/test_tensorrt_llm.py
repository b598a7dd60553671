"""The rules by which TensorRT-LLM reads compressed-tensors, on configurations as this project and others write them."""

from typing import Any

import pytest

from lowbit_core.tensorrt_llm import tensorrt_llm_reads

TOKEN = {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True}
CHANNEL = {"num_bits": 8, "type": "float", "strategy": "channel"}
TENSOR = {"num_bits": 8, "type": "float", "strategy": "tensor"}
INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128}
NVFP4 = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}
CACHE = {"num_bits": 8, "type": "float", "strategy": "tensor"}


def one(weights: Any, inputs: Any = None, **more: Any) -> dict[str, Any]:
    return {
        "config_groups": {
            "group_0": {"weights": weights, "input_activations": inputs, "targets": ["Linear"]}
        },
        **more,
    }


@pytest.mark.parametrize(
    ("said", "algorithm"),
    [
        (one(CHANNEL, TOKEN), "FP8_PER_CHANNEL_PER_TOKEN"),
        (one(CHANNEL, TOKEN, kv_cache_scheme=CACHE), "FP8_PER_CHANNEL_PER_TOKEN"),
        (
            one(
                {**CHANNEL, "strategy": "block", "block_structure": [128, 128]},
                {**TOKEN, "strategy": "group", "group_size": 128},
            ),
            "FP8_BLOCK_SCALES",
        ),
        (one(NVFP4, NVFP4), "NVFP4"),
        (one({**NVFP4, "strategy": "group", "group_size": 32}), "W4A16_MXFP4"),
    ],
)
def test_it_reads(said: dict[str, Any], algorithm: str) -> None:
    assert tensorrt_llm_reads(said) == (algorithm, "")


@pytest.mark.parametrize(
    ("said", "why"),
    [
        ({}, "no config_groups"),
        (one(INT4), "no 4-bit weights whose inputs are not rounded"),
        (one({**CHANNEL, "type": "int"}, {**TOKEN, "type": "int"}), "8-bit integers as FP8"),
        (one(TENSOR, {**TENSOR, "dynamic": False}), "no 8-bit weights by tensor with inputs by tensor"),
        (one(CHANNEL, TENSOR), "by channel with inputs by tensor"),
        (one(CHANNEL), "no 8-bit weights whose inputs are not rounded"),
        (one({**NVFP4, "group_size": 32}, NVFP4), "no 4-bit weights by tensor_group"),
        (one({**NVFP4, "strategy": "group", "group_size": 16}), "groups of 32 only"),
        (one(CHANNEL, TOKEN, kv_cache_scheme={**CACHE, "type": "int"}), "KV cache is not FP8"),
    ],
)
def test_it_does_not_read(said: dict[str, Any], why: str) -> None:
    algorithm, reason = tensorrt_llm_reads(said)
    assert algorithm is None
    assert why in reason


def test_several_groups_are_named_module_by_module() -> None:
    group = {"weights": CHANNEL, "input_activations": TOKEN}
    for targets, algorithm in (
        (["model.layers.0.mlp.up_proj"], "MIXED_PRECISION"),
        (["re:.*mlp.*"], "MIXED_PRECISION"),
        (["Linear"], None),
    ):
        groups = {"a": {**group, "targets": targets}, "b": {**group, "targets": ["re:.*self_attn.*"]}}
        assert tensorrt_llm_reads({"config_groups": groups})[0] == algorithm
