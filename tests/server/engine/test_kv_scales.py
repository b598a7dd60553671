"""KV scales in the files against those of the running layers."""

import struct
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from lowbit_core.errors import CheckpointError, EngineError
from lowbit_server.engine.kv_scales import (
    KVProof,
    KVScale,
    Scale,
    prove_kv_scales,
    read_checkpoint_scales,
    scales_from_workers,
)

if TYPE_CHECKING:
    from tests.server.conftest import MakeCheckpoint


def _float32(value: Scale) -> float:
    assert isinstance(value, float)
    return float(struct.unpack("<f", struct.pack("<f", value))[0])


def _as_float32(scale: KVScale) -> KVScale:
    return KVScale(scale.layer, _float32(scale.k_scale), _float32(scale.v_scale))


def test_scales_are_read_from_safetensors_as_float32(
    make_checkpoint: "MakeCheckpoint", scales: dict[int, KVScale]
) -> None:
    found = read_checkpoint_scales(make_checkpoint())
    assert found == {layer: _as_float32(scale) for layer, scale in scales.items()}


def test_bfloat16_scales_are_read_too(tmp_path: Path) -> None:
    header = b'{"model.layers.3.self_attn.k_scale":{"dtype":"BF16","shape":[1],"data_offsets":[0,2]},'
    header += b'"model.layers.3.self_attn.v_scale":{"dtype":"BF16","shape":[1],"data_offsets":[2,4]}}'
    data = struct.pack("<f", 0.5)[2:] + struct.pack("<f", 2.0)[2:]
    (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + data)
    assert read_checkpoint_scales(tmp_path) == {3: KVScale(3, 0.5, 2.0)}


def test_file_that_is_no_safetensors_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(b"\xff" * 20)
    with pytest.raises(CheckpointError, match="is not a safetensors file"):
        read_checkpoint_scales(tmp_path)


def test_equal_scales_are_proven(scales: dict[int, KVScale]) -> None:
    running = [_as_float32(scale) for scale in scales.values()]
    proof = prove_kv_scales(scales, running, quant_method="compressed-tensors")
    assert proof == KVProof("checkpoint", layers=2)


def test_dropped_scale_names_layer_and_both_values(scales: dict[int, KVScale]) -> None:
    running = [scales[0], replace(scales[1], k_scale=1.0)]
    with pytest.raises(EngineError) as raised:
        prove_kv_scales(scales, running, quant_method="compressed-tensors")
    assert str(raised.value) == (
        "layer 1: the engine runs with k_scale 1, the checkpoint says 0.1; "
        "its quality would be lower than was measured, so it is not served"
    )


def test_scale_that_the_engine_invented_is_refused() -> None:
    with pytest.raises(EngineError, match="the engine runs with v_scale 2, the checkpoint says 1"):
        prove_kv_scales({}, [KVScale(0, 1.0, 2.0)], quant_method="compressed-tensors")


def test_layer_that_the_engine_does_not_report_is_refused(scales: dict[int, KVScale]) -> None:
    with pytest.raises(EngineError, match=r"runs layers \[1\] without an FP8 cache"):
        prove_kv_scales(scales, [scales[0]], quant_method="compressed-tensors")


def test_awq_format_runs_with_unit_scales_and_says_so(scales: dict[int, KVScale]) -> None:
    units = [KVScale(0, 1.0, 1.0), KVScale(1, 1.0, 1.0)]
    assert prove_kv_scales(scales, units, quant_method="awq") == KVProof("unit", layers=2)


def test_bfloat16_cache_needs_no_scales(scales: dict[int, KVScale]) -> None:
    plain = [replace(scale, fp8=False) for scale in scales.values()]
    assert prove_kv_scales(scales, plain, quant_method="compressed-tensors").scales == "unused"


def test_layers_that_the_checkpoint_keeps_without_fp8_have_to_run_so(scales: dict[int, KVScale]) -> None:
    mixed = [scales[0], KVScale(1, 1.0, 1.0, fp8=False)]
    proof = prove_kv_scales(scales, mixed, quant_method="compressed-tensors", skipped=[1])
    assert proof == KVProof("checkpoint", layers=1)
    with pytest.raises(
        EngineError, match="layer 1: the engine keeps its keys and values in FP8, the checkpoint"
    ):
        prove_kv_scales(scales, [scales[0], scales[1]], quant_method="compressed-tensors", skipped=[1])


def test_layers_with_scales_that_run_without_fp8_are_refused(scales: dict[int, KVScale]) -> None:
    mixed = [scales[0], replace(scales[1], fp8=False)]
    with pytest.raises(EngineError, match=r"runs layers \[1\] without an FP8 cache"):
        prove_kv_scales(scales, mixed, quant_method="compressed-tensors")


def test_scales_of_heads_are_read_and_proven_one_by_one(tmp_path: Path) -> None:
    header = b'{"model.layers.0.self_attn.k_scale":{"dtype":"F32","shape":[2,1,1],"data_offsets":[0,8]},'
    header += b'"model.layers.0.self_attn.v_scale":{"dtype":"F32","shape":[2,1,1],"data_offsets":[8,16]}}'
    data = struct.pack("<4f", 0.5, 0.25, 2.0, 4.0)
    (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + data)
    stored = read_checkpoint_scales(tmp_path)
    assert stored == {0: KVScale(0, (0.5, 0.25), (2.0, 4.0))}
    whole = {"layer": 0, "k_scale": [0.5, 0.25], "v_scale": [2.0, 4.0], "kv_dtype": "fp8"}
    parts = [[whole | {"k_scale": [k], "v_scale": [v]}] for k, v in ((0.5, 2.0), (0.25, 4.0))]
    repeated = [part for part in parts for _ in range(2)]  # four ranks, two heads
    for reports in ([[whole]], parts, repeated):
        running = scales_from_workers(reports)
        assert prove_kv_scales(stored, running, quant_method="compressed-tensors").scales == "checkpoint"
    for wrong in ([[whole | {"k_scale": [0.25, 0.5]}]], [[whole | {"k_scale": 0.5}]], parts[::-1]):
        with pytest.raises(EngineError, match=r"k_scale .*, the checkpoint says 0.5 0.25"):
            prove_kv_scales(stored, scales_from_workers(wrong), quant_method="compressed-tensors")


def test_workers_must_agree_on_a_layer() -> None:
    one = {"layer": 0, "k_scale": 0.5, "v_scale": 0.5, "kv_dtype": "fp8"}
    assert scales_from_workers([[one], [one]]) == (KVScale(0, 0.5, 0.5),)
    assert scales_from_workers([[one | {"kv_dtype": "auto"}]]) == (KVScale(0, 0.5, 0.5, fp8=False),)
    with pytest.raises(EngineError, match="two workers hold different KV scales for layer 0"):
        scales_from_workers([[one], [one | {"k_scale": 0.25}]])
