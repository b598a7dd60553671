"""Files in blocks of floats are what llm-compressor writes: names, types, shapes, and the configuration of each scheme.

The listing is llm-compressor's own, of the same tiny model (benchmarks/formats/peer_files.py).
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from benchmarks.formats.peer_files import listing
from tests.quantize.small_runs import CPU, recipe_with

from lowbit_quantize.pipeline import quantize

ROOT = Path(__file__).resolve().parents[3]
PEER = json.loads((ROOT / "benchmarks/formats/results/llmcompressor_files.json").read_text())["presets"]
EQUAL = ("NVFP4", "NVFP4A16", "MXFP4", "MXFP4A16", "MXFP8")
# How it found its scales, and an answer of a later release about zero points, which symmetric weights have not.
OF_ITS_RUN = ("observer", "observer_kwargs", "zp_dtype")


def ours(base: Path, out: Path, preset: str) -> dict[str, Any]:
    rule: dict[str, Any] = {"match": "*", "scheme": preset, "methods": ["rtn"]}
    rules = [rule] if preset in EQUAL else [rule, {"match": "*.down_proj", "scheme": "none"}]
    quantize(str(base), recipe_with(*rules), out, CPU)
    return listing(out)


def group_of(found: dict[str, Any]) -> dict[str, Any]:
    """What the only group says but its targets, which we name one by one."""
    (group,) = found["quantization_config"]["config_groups"].values()
    said: dict[str, Any] = {key: value for key, value in group.items() if key != "targets"}
    for part in ("weights", "input_activations"):
        if said[part] is not None:
            said[part] = {key: value for key, value in said[part].items() if key not in OF_ITS_RUN}
    return said


@pytest.mark.parametrize("preset", EQUAL)
def test_names_types_shapes_and_configuration_are_the_peers(
    tiny_model: Callable[[str], Path], preset: str, tmp_path: Path
) -> None:
    found, peer = ours(tiny_model("llama"), tmp_path / "out", preset), PEER[preset]
    assert found["tensors"] == peer["tensors"]
    assert group_of(found) == group_of(peer)
    for key in ("format", "quant_method", "quantization_status", "kv_cache_scheme"):
        assert found["quantization_config"][key] == peer["quantization_config"][key]


@pytest.mark.parametrize("preset", ["W4AFP8", "W4A8"])
def test_integers_with_rounded_inputs_are_packed_as_vllm_loads_them(
    tiny_model: Callable[[str], Path], preset: str, tmp_path: Path
) -> None:
    """llm-compressor 0.14 leaves a code in each byte, which vLLM 0.32's classes for GPUs do not load."""
    found, peer = ours(tiny_model("llama"), tmp_path / "out", preset), PEER[preset]
    said, theirs = group_of(found), group_of(peer)
    assert (said.pop("format"), theirs.pop("format")) == ("pack-quantized", "int-quantized")
    assert said == theirs
    name = "model.layers.0.self_attn.q_proj"
    assert peer["tensors"][f"{name}.weight"] == ["I8", [128, 128]]
    assert found["tensors"][f"{name}.weight_packed"] == ["I32", [128, 16]]
    assert found["tensors"][f"{name}.weight_scale"] == peer["tensors"][f"{name}.weight_scale"]
