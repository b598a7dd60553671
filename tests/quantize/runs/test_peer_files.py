"""Our files are llm-compressor's in names, types and shapes, and say the same of every linear.

What it writes of the same tiny model lies in benchmarks/formats/results/llmcompressor_files.json, which
benchmarks/formats/peer_files.py made in its own environment.
"""

import json
from pathlib import Path
from typing import Any

import pytest
from benchmarks.formats.peer_files import GROUP, INTEGERS, PRESETS, SIZES, listing
from tests.quantize.small_runs import CPU, recipe_with
from tests.tiny_models import write_tiny_model

from lowbit_quantize.catalog import CATALOG
from lowbit_quantize.pipeline import quantize

ROOT = Path(__file__).resolve().parents[3]
LISTED = json.loads((ROOT / "benchmarks/formats/results/llmcompressor_files.json").read_text())
PEER: dict[str, Any] = LISTED["schemes"]
PACKED_HERE = ("W4AFP8", "W4A8")
EQUAL = [scheme for scheme in PEER if scheme not in PACKED_HERE]
# How it found its scales, and an answer of a later release about zero points, which symmetric weights have not.
OF_ITS_RUN = ("observer", "observer_kwargs", "zp_dtype")
GENERAL = ("format", "kv_cache_scheme", "quant_method", "quantization_status")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("base"), "llama", **LISTED["sizes"])


def ours(base: Path, out: Path, scheme: str) -> dict[str, Any]:
    rule: dict[str, Any] = {"match": "*", "scheme": scheme, "methods": ["rtn"]}
    if scheme in INTEGERS:
        rule["group_size"] = LISTED["group_size"]
    quantize(str(base), recipe_with(rule), out, CPU)
    return listing(out)


def linears_of(found: dict[str, Any]) -> dict[str, Any]:
    """What a configuration says of each linear of the decoder, by its name: theirs go by type, ours by name."""
    names = {name.rpartition(".")[0] for name in found["tensors"] if "_proj." in name}
    quantization, said = found["quantization_config"], {}
    for group in quantization["config_groups"].values():
        for name in names:
            if name in group["targets"] or "Linear" in group["targets"]:
                assert name not in said
                said[name] = {
                    key: _without(value)
                    for key, value in group.items()
                    if key not in ("targets", "output_activations")
                }
    assert said.keys() == names
    assert not names & set(quantization["ignore"])
    assert "lm_head" in quantization["ignore"]
    return said


def _without(arguments: Any) -> Any:
    if not isinstance(arguments, dict):
        return arguments
    return {key: value for key, value in arguments.items() if key not in OF_ITS_RUN}


def test_the_listing_has_every_scheme_of_its_script_and_those_are_ours() -> None:
    assert list(PEER) == [*INTEGERS, *PRESETS]
    assert PEER.keys() <= {preset.name for preset in CATALOG.presets}
    assert (LISTED["sizes"], LISTED["group_size"]) == (SIZES, GROUP)


@pytest.mark.parametrize("scheme", EQUAL)
def test_names_types_shapes_and_configuration_are_the_peers(base: Path, scheme: str, tmp_path: Path) -> None:
    found, peer = ours(base, tmp_path / "out", scheme), PEER[scheme]
    assert found["tensors"] == peer["tensors"]
    assert linears_of(found) == linears_of(peer)
    for key in GENERAL:
        assert found["quantization_config"][key] == peer["quantization_config"][key]


@pytest.mark.parametrize("scheme", PACKED_HERE)
def test_integers_with_rounded_inputs_are_packed_as_vllm_loads_them(
    base: Path, scheme: str, tmp_path: Path
) -> None:
    """llm-compressor 0.14 leaves a code in each byte, which vLLM 0.32's classes for GPUs do not load."""
    found, peer = ours(base, tmp_path / "out", scheme), PEER[scheme]
    said, theirs = linears_of(found), linears_of(peer)
    assert said.keys() == theirs.keys()
    for name in said:
        assert (said[name].pop("format"), theirs[name].pop("format")) == ("pack-quantized", "int-quantized")
        outputs, inputs = peer["tensors"][f"{name}.weight"][1]
        assert peer["tensors"][f"{name}.weight"][0] == "I8"
        assert found["tensors"][f"{name}.weight_packed"] == ["I32", [outputs, inputs // 8]]
        assert found["tensors"][f"{name}.weight_scale"] == peer["tensors"][f"{name}.weight_scale"]
    assert said == theirs
