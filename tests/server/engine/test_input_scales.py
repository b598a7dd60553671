"""Static scales of inputs in the files against those of the running layers."""

import json
import struct
from pathlib import Path

import pytest

from lowbit_core.errors import EngineError
from lowbit_server.engine.input_scales import prove_input_scales, read_input_scales

ATTENTION = "model.layers.0.self_attn"
STORED = {f"{ATTENTION}.q_proj": 0.25, f"{ATTENTION}.k_proj": 0.25, "model.layers.0.mlp.down_proj": 0.1}
RUNNING = [
    {"linears": [f"{ATTENTION}.q_proj", f"{ATTENTION}.k_proj"], "scale": 0.25},
    {"linears": ["model.layers.0.mlp.down_proj"], "scale": struct.unpack("<f", struct.pack("<f", 0.1))[0]},
]


def test_scales_are_read_by_linear(tmp_path: Path) -> None:
    header = json.dumps(
        {f"{name}.input_scale": {"dtype": "F32", "shape": [1], "data_offsets": [4 * i, 4 * i + 4]}
         for i, name in enumerate(STORED)}
    ).encode()  # fmt: skip
    data = struct.pack("<3f", *STORED.values())
    (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + data)
    assert read_input_scales(tmp_path) == pytest.approx(STORED)


def test_equal_scales_are_proven() -> None:
    assert prove_input_scales(STORED, RUNNING) == 3
    assert prove_input_scales({}, []) == 0


def test_fused_linears_run_with_the_largest_of_their_scales() -> None:
    stored = STORED | {f"{ATTENTION}.k_proj": 0.125}
    assert prove_input_scales(stored, RUNNING) == 3
    with pytest.raises(
        EngineError, match=r"q_proj: the engine divides inputs by 0\.25, the checkpoint says 0\.5"
    ):
        prove_input_scales(stored | {f"{ATTENTION}.k_proj": 0.5}, RUNNING)


def test_a_linear_that_the_engine_does_not_report_is_refused() -> None:
    with pytest.raises(EngineError, match=r"no input scale for model\.layers\.0\.mlp\.down_proj"):
        prove_input_scales(STORED, RUNNING[:1])


def test_of_another_tools_checkpoint_only_what_a_layer_reports_is_proven() -> None:
    experts = {"model.layers.0.mlp.experts.0.up_proj": 0.5}
    assert prove_input_scales(STORED | experts, RUNNING, all_reported=False) == 3
    with pytest.raises(EngineError, match="divides inputs by"):
        prove_input_scales(STORED | {f"{ATTENTION}.q_proj": 0.5}, RUNNING, all_reported=False)
