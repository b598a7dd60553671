"""Our files are llm-compressor's in names, shapes and types, and say the same of every linear.

What it writes of the same model lies in benchmarks/formats/results/llmcompressor.json, which
benchmarks/formats/llmcompressor_listing.py made in its own environment.
"""

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from tests.quantize.small_runs import CPU, recipe_with
from tests.tiny_models import write_tiny_model

from lowbit_quantize.pipeline import quantize

ROOT = Path(__file__).resolve().parents[3]
LISTED: dict[str, Any] = json.loads((ROOT / "benchmarks/formats/results/llmcompressor.json").read_text())
OF_THE_TOOL = ("observer", "observer_kwargs")  # how it looks for scales, which no reader asks
GENERAL = ("format", "kv_cache_scheme", "quant_method", "quantization_status")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("base"), "llama", **LISTED["sizes"])


def linears_of(tensors: dict[str, Any], quantization: dict[str, Any]) -> dict[str, Any]:
    """What a configuration says of each linear of the decoder, by its name."""
    names = {name.rpartition(".")[0] for name in tensors if "_proj." in name}
    found: dict[str, Any] = {}
    for group in quantization["config_groups"].values():
        for name in names:
            if name in group["targets"] or "Linear" in group["targets"]:
                assert name not in found
                found[name] = {
                    key: _without(group.get(key)) for key in ("weights", "input_activations", "format")
                }
    assert not names & set(quantization["ignore"])
    return found


def _without(arguments: Any) -> Any:
    if not isinstance(arguments, dict):
        return arguments
    return {key: value for key, value in arguments.items() if key not in OF_THE_TOOL}


@pytest.mark.parametrize("scheme", LISTED["schemes"])
def test_names_shapes_types_and_configuration_are_the_same(base: Path, scheme: str, tmp_path: Path) -> None:
    theirs, rule = LISTED["schemes"][scheme], {"match": "*", "scheme": scheme, "methods": ["rtn"]}
    if scheme != "FP8_BLOCK":
        rule["group_size"] = LISTED["group_size"]
    quantize(str(base), recipe_with(rule), tmp_path / "out", CPU)
    ours: dict[str, Any] = {}
    for path in (tmp_path / "out").glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (not a dict)
                view = file.get_slice(name)
                ours[name] = [view.get_dtype(), view.get_shape()]
    assert ours == theirs["tensors"]
    said = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    wanted = theirs["quantization_config"]
    assert linears_of(ours, said) == linears_of(ours, wanted)
    assert {key: said[key] for key in GENERAL} == {key: wanted[key] for key in GENERAL}
    assert "lm_head" in said["ignore"]
    assert "lm_head" in wanted["ignore"]
