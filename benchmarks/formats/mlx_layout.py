"""The export `mlx` read by MLX itself: its own dequantization, and mlx-lm's loader and models.

    python benchmarks/formats/mlx_layout.py --mlx-python PYTHON [--model CHECKPOINT --name NAME] [--json FILE]

PYTHON is of an environment where `pip install "mlx[cpu]==0.32.4" mlx-lm==0.32.2 numpy` was done (Linux will do).
Tiny models are quantized and exported. `unpack_mlx.py`, run by PYTHON, compares every linear's weights by
`mx.dequantize` with our float32 ones, loads the directory as mlx-lm does (nothing missing, nothing too many), and
compares its logits in float32 with those of transformers on the same weights. `--model` adds a finished checkpoint.
Exits 1 where a weight differs or logits do by more than float32's noise.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks" / "quantizers")]
from provenance import hardware, versions  # noqa: E402
from tests.quantize.small_runs import CPU, recipe_with  # noqa: E402
from tests.tiny_models import write_tiny_model  # noqa: E402

from lowbit_quantize.catalog import CATALOG  # noqa: E402
from lowbit_quantize.export.checkpoint import Checkpoint  # noqa: E402
from lowbit_quantize.export.exporter import export  # noqa: E402
from lowbit_quantize.export.mlx import STACKED, Mlx, stacked  # noqa: E402
from lowbit_quantize.pipeline import quantize  # noqa: E402
from lowbit_quantize.schemes.scheme import Quantized  # noqa: E402

UNPACK = Path(__file__).with_name("unpack_mlx.py")
IDS = torch.arange(3, 33).unsqueeze(0)
NOISE = 1e-3  # of logits in float32, summed in another order, beside their size
FOUR: dict[str, Any] = {"match": "*", "scheme": "W4A16", "group_size": 64, "methods": ["rtn"]}
EIGHT = {**FOUR, "scheme": "W8A16"}
MIX = [
    FOUR,
    {**EIGHT, "match": "*.down_proj", "group_size": 32},
    {**FOUR, "match": "*.o_proj", "group_size": 32},
    {"match": "*.0.mlp.*", "scheme": "none"},
]
WINDOWS = [*["sliding_attention"] * 5, "full_attention"]  # as mlx-lm's model has them
SIZES: dict[str, dict[str, Any]] = {"gemma3_text": {"num_hidden_layers": 6, "layer_types": WINDOWS}}
CASES: dict[str, tuple[str, list[dict[str, Any]]]] = {
    "llama, 4 bits": ("llama", [FOUR]),
    "llama, 8 bits by channel": ("llama", [{**EIGHT, "group_size": "channel"}]),
    "llama, a mix": ("llama", MIX),
    "mistral": ("mistral", [FOUR]),
    "qwen2": ("qwen2", [FOUR]),
    "qwen3": ("qwen3", [FOUR]),
    "phi3": ("phi3", [FOUR]),
    "gemma3_text": ("gemma3_text", [FOUR]),
    "olmo2": ("olmo2", [FOUR]),
    "qwen2_moe": ("qwen2_moe", [FOUR]),
    "qwen3_moe": ("qwen3_moe", [FOUR]),
    "qwen3_moe, experts as they are": ("qwen3_moe", [FOUR, {"match": "*.experts.*", "scheme": "none"}]),
    "mixtral": ("mixtral", [FOUR]),
    "olmoe": ("olmoe", [FOUR]),
    "glm4_moe": ("glm4_moe", [FOUR]),
}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mlx-python", required=True)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--name", default="--model", help="what the result calls it")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    found = {}
    for name, (family, rules) in CASES.items():
        with tempfile.TemporaryDirectory() as temporary:
            place = Path(temporary)
            base = write_tiny_model(place / "base", family, **SIZES.get(family, {}))
            quantize(str(base), recipe_with(*rules), place / "checkpoint", CPU)
            found[name] = _case(place / "checkpoint", place, arguments.mlx_python)
        print(name, json.dumps(found[name]))
    if arguments.model:
        with tempfile.TemporaryDirectory() as temporary:
            found[arguments.name] = _case(arguments.model, Path(temporary), arguments.mlx_python)
        print(arguments.name, json.dumps(found[arguments.name]))
    if arguments.json:
        facts = {"hardware": hardware(), "versions": versions(sys.executable)}
        arguments.json.write_text(json.dumps({**facts, "cases": found}, indent=1) + "\n")
    wrong = [name for name, one in found.items() if one["different"] or one["logits_error"] > NOISE]
    return 1 if wrong else 0


def _case(directory: Path, place: Path, python: str) -> dict[str, Any]:
    export(directory, Mlx(), place / "out")
    checkpoint = Checkpoint(directory, CATALOG)
    weights = dict(_weights(checkpoint))
    linears = {f"{name}.weight": weights[f"{name}.weight"] for name in checkpoint.schemes}
    expected = stacked(linears, STACKED.get(checkpoint.manifest.base.model_type, {}))
    logits = _logits(checkpoint, weights, place / "plain")
    save_file({**expected, "logits": logits, "ids": IDS}, place / "expected.safetensors")
    told = subprocess.run(
        [python, str(UNPACK), str(place / "out"), str(place / "expected.safetensors")],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    ).stdout
    result: dict[str, Any] = json.loads(told.splitlines()[-1])
    return result


def _weights(checkpoint: Checkpoint) -> Iterator[tuple[str, torch.Tensor]]:
    """What is served, float32, by its name in the model."""
    for shard in checkpoint.shards:
        for name, found in checkpoint.read(shard):
            if isinstance(found, Quantized):
                yield f"{name}.weight", found.dequantize()
            else:
                yield name, found.float()


def _logits(checkpoint: Checkpoint, weights: dict[str, torch.Tensor], plain: Path) -> torch.Tensor:
    """By transformers, on a directory of these weights that says nothing of quantization."""
    plain.mkdir()
    config = {key: value for key, value in checkpoint.config.items() if key != "quantization_config"}
    (plain / "config.json").write_text(json.dumps(config))
    save_file(weights, plain / "model.safetensors", metadata={"format": "pt"})
    model = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32).eval()
    with torch.inference_mode():
        logits: torch.Tensor = model(IDS).logits
    return logits.contiguous()


if __name__ == "__main__":
    sys.exit(main())
