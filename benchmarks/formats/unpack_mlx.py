"""Runs in MLX's environment: an exported directory against what it should hold; one JSON object on stdout.

    python unpack_mlx.py DIRECTORY EXPECTED

EXPECTED is a safetensors file: each linear's weights in float32, token ids, and logits for them.
"""

import json
import sys
from importlib.metadata import version
from pathlib import Path

import mlx.core as mx
from mlx_lm.utils import load_model


def main(directory: Path, expected: dict[str, mx.array]) -> dict[str, object]:
    config = json.loads((directory / "config.json").read_text())["quantization"]
    stored: dict[str, mx.array] = {}
    for file in directory.glob("*.safetensors"):
        stored |= mx.load(str(file))
    logits, ids = expected.pop("logits"), expected.pop("ids")
    different = numbers = 0
    apart = []
    for name, weight in ((key.removesuffix(".weight"), one) for key, one in expected.items()):
        said = config.get(name, config)
        codes, scales, biases = (stored[f"{name}.{part}"] for part in ("weight", "scales", "biases"))
        exact = mx.dequantize(
            codes, scales.astype(mx.float32), biases.astype(mx.float32), said["group_size"], said["bits"]
        )
        different += int((exact != weight).sum())
        numbers += weight.size
        rounded = mx.dequantize(codes, scales, biases, said["group_size"], said["bits"]).astype(mx.float32)
        apart.append(float(((rounded - weight).square().sum() / weight.square().sum()).sqrt()))
    model, _ = load_model(directory, strict=True)
    model.set_dtype(mx.float32)
    size = float(logits.square().mean().sqrt())
    error = float(mx.abs(model(ids) - logits).max()) / size
    return {
        "linears": len(expected),
        "weights": numbers,
        "different": different,
        "rounded_in_16_bits": round(
            max(apart), 5
        ),  # the largest relative distance of a linear, were it unpacked so
        "logits_error": round(error, 7),  # the largest, beside the root mean square of them all
        "mlx": version("mlx"),
        "mlx_lm": version("mlx-lm"),
    }


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), mx.load(sys.argv[2]))))
