"""Another tool's unpacked weights against the reference, weight by weight. Runs in the tool's own environment."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import safe_open

Tensors = dict[str, torch.Tensor]


def checkpoint_tensors(directory: Path) -> Tensors:
    """Every tensor of a checkpoint by name."""
    tensors = {}
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            tensors.update({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    return tensors


def compared(unpack: Callable[[Tensors, torch.dtype], torch.Tensor]) -> None:
    """Compare each linear of `--checkpoint` with `--reference` and print the counts as one JSON object.

    `unpack` gives the weight, (in, out), that the tool makes of a linear's tensors with its scales in a dtype:
    float16 as the format has them, where every product is rounded once, and float32, where none is.
    """
    parser = argparse.ArgumentParser(description="Unpack a checkpoint with the tool's own code and compare.")
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--reference", type=Path, required=True)
    arguments = parser.parse_args()
    tensors = checkpoint_tensors(arguments.checkpoint)
    counts = {
        "linears": 0,
        "weights": 0,
        "float32_different": 0,
        "float16_different": 0,
        "negative_scales": 0,
    }
    with safe_open(arguments.reference, framework="pt") as reference:
        for name in reference.keys():  # noqa: SIM118
            linear = {key.rpartition(".")[2]: tensors[key] for key in tensors if key.startswith(f"{name}.")}
            expected = reference.get_tensor(name).T.contiguous()  # (in, out) float32
            counts["linears"] += 1
            counts["weights"] += expected.numel()
            counts["negative_scales"] += int((linear["scales"] < 0).sum())
            counts["float32_different"] += different(unpack(linear, torch.float32), expected)
            counts["float16_different"] += different(unpack(linear, torch.float16), expected.half())
    print(json.dumps(counts))


def different(found: torch.Tensor, expected: torch.Tensor) -> int:
    """How many weights differ in any bit."""
    if found.dtype != expected.dtype or found.shape != expected.shape:
        raise SystemExit(
            f"{found.dtype} {tuple(found.shape)} against {expected.dtype} {tuple(expected.shape)}"
        )
    integers = {torch.float32: torch.int32, torch.float16: torch.int16}[found.dtype]
    return int((found.contiguous().view(integers) != expected.view(integers)).sum())
