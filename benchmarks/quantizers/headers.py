"""What safetensors files say of their tensors without opening one, and bits counted by it. Standard library only."""

import json
import math
from pathlib import Path
from typing import Any


def bits_a_weight(checkpoint: Path, base: Path) -> float:
    """Bits that a checkpoint has for each weight of its quantized linears in `base`, scales and all.

    Where nothing is quantized, for each weight of the layers' matrices.
    """
    sizes: dict[str, int] = {}
    for name, entry in headers(checkpoint).items():
        start, stop = entry["data_offsets"]
        owner = name.rpartition(".")[0]
        sizes[owner] = sizes.get(owner, 0) + stop - start
    scaled = {
        name.rpartition(".")[0] for name in headers(checkpoint) if name.endswith((".weight_scale", ".scales"))
    }
    stored = headers(base)
    weights = {name: math.prod(entry["shape"]) for name, entry in stored.items()}
    if not scaled:
        matrices = (name for name, entry in stored.items() if len(entry["shape"]) == 2 and ".layers." in name)
        scaled = {name.removesuffix(".weight") for name in matrices}
    return 8 * sum(sizes[owner] for owner in scaled) / sum(weights[f"{owner}.weight"] for owner in scaled)


def headers(directory: Path) -> dict[str, dict[str, Any]]:
    """What a directory's safetensors files say of their tensors, by name."""
    found: dict[str, dict[str, Any]] = {}
    for path in sorted(directory.glob("*.safetensors")):
        with path.open("rb") as file:
            found |= json.loads(file.read(int.from_bytes(file.read(8), "little")))
    found.pop("__metadata__", None)
    return found
