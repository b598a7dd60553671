"""The export `modelopt` held against ModelOpt's own packer and configuration, fed our codes and scales.

    python benchmarks/formats/modelopt_layout.py --packages DIR [--json benchmarks/formats/results/modelopt.json]

DIR is where `pip install --target DIR --no-deps nvidia-modelopt==0.47.0 omegaconf antlr4-python3-runtime==4.9.3
nvidia-ml-py pulp` has put ModelOpt: it runs on this environment's torch. A tiny model is quantized in each scheme and
exported; every linear's tensors are compared with `to_quantized_weight` of the dequantized weight and our scale, and
`config.json` with `convert_hf_quant_config_format` of `hf_quant_config.json`. Exits 1 where a byte differs.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks" / "quantizers")]
from provenance import hardware, versions  # noqa: E402
from tests.quantize.small_runs import CPU, recipe_with  # noqa: E402
from tests.tiny_models import write_tiny_model  # noqa: E402

from lowbit_quantize.catalog import CATALOG  # noqa: E402
from lowbit_quantize.export.checkpoint import Checkpoint  # noqa: E402
from lowbit_quantize.export.exporter import export  # noqa: E402
from lowbit_quantize.export.modelopt import FILE, ModelOpt  # noqa: E402
from lowbit_quantize.pipeline import quantize  # noqa: E402

FORMATS = {
    "W4A16": "int4_awq", "FP8": "fp8", "FP8_DYNAMIC": "fp8_pc_pt", "NVFP4": "nvfp4", "NVFP4A16": "w4a16_nvfp4",
    "MXFP8": "mxfp8",
}  # fmt: skip
GROUPED = {"scheme": "W4A16", "group_size": 64, "methods": ["rtn"]}
CASES: dict[str, list[dict[str, Any]]] = {
    "W4A16_AWQ": [{"match": "*", **GROUPED}],
    "FP8": [{"match": "*", "scheme": "FP8"}],
    "FP8_PER_CHANNEL_PER_TOKEN": [{"match": "*", "scheme": "FP8_DYNAMIC"}],
    "NVFP4": [{"match": "*", "scheme": "NVFP4", "methods": ["gptq"]}],
    "W4A16_NVFP4": [{"match": "*", "scheme": "NVFP4A16", "methods": ["gptq"]}],
    "MXFP8": [{"match": "*", "scheme": "MXFP8", "methods": ["gptq"]}],
    "MIXED_PRECISION": [{"match": "*", **GROUPED}, {"match": "*.down_proj", "scheme": "FP8"}],
}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--packages", type=Path, required=True)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    sys.path.append(str(arguments.packages))
    found = {name: _case(name, rules) for name, rules in CASES.items()}
    for name, one in found.items():
        print(name, json.dumps(one))
    if arguments.json:
        facts = {"modelopt": "0.47.0", "hardware": hardware(), "versions": versions(sys.executable)}
        arguments.json.write_text(json.dumps({**facts, "cases": found}, indent=1) + "\n")
    return 0 if all(one["different"] == 0 and one["same_config"] for one in found.values()) else 1


def _case(name: str, rules: list[dict[str, Any]]) -> dict[str, Any]:
    from modelopt.torch.export.convert_hf_config import convert_hf_quant_config_format
    from modelopt.torch.export.quant_utils import to_quantized_weight

    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        base = write_tiny_model(place / "base", "llama")
        recipe = recipe_with(*rules, kv_cache={"dtype": "fp8"})
        quantize(str(base), recipe, place / "checkpoint", CPU)
        export(place / "checkpoint", ModelOpt(), place / "out")
        checkpoint = Checkpoint(place / "checkpoint", CATALOG)
        tensors: dict[str, torch.Tensor] = {}
        for path in (place / "out").glob("*.safetensors"):
            tensors |= load_file(path)
        different = numbers = 0
        for linear, scheme in checkpoint.schemes.items():
            ours, scale = tensors[f"{linear}.weight"], tensors[f"{linear}.weight_scale"]
            weight = checkpoint.linear(linear).dequantize()
            second = tensors.get(f"{linear}.weight_scale_2")
            theirs = to_quantized_weight(weight, scale, FORMATS[scheme.name], second, scheme.group_size)
            different += int((ours.view(torch.uint8) != theirs.view(torch.uint8)).sum())
            numbers += weight.numel()
        said = json.loads((place / "out" / FILE).read_text())
        config = json.loads((place / "out" / "config.json").read_text())["quantization_config"]
        return {
            "algorithm": said["quantization"]["quant_algo"],
            "linears": len(checkpoint.schemes),
            "weights": numbers,
            "different": different,
            "same_config": convert_hf_quant_config_format(said) == config
            and said["quantization"]["quant_algo"] == name,
            "cache_scales": sum(key.endswith(("k_proj.k_scale", "v_proj.v_scale")) for key in tensors),
        }


if __name__ == "__main__":
    sys.exit(main())
