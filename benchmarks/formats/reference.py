"""The weights that a checkpoint in the default format stands for, by the compressed-tensors package.

    python reference.py --checkpoint DIR --out FILE.safetensors

Each linear is unpacked and dequantized to float32, (out, in), under its own name.
"""

import argparse
from pathlib import Path

import torch
from comparison import checkpoint_tensors
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from compressed_tensors.quantization.lifecycle.forward import dequantize
from safetensors.torch import save_file


def main() -> None:
    parser = argparse.ArgumentParser(description="Dequantize a compressed-tensors checkpoint.")
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    tensors = checkpoint_tensors(arguments.checkpoint)
    names = [name.removesuffix(".weight_packed") for name in tensors if name.endswith(".weight_packed")]
    save_file({name: dequantized(tensors, name) for name in names}, arguments.out)


def dequantized(tensors: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    """(out, in) float32"""
    shape = torch.Size(tensors[f"{name}.weight_shape"].tolist())
    packed, scale = tensors[f"{name}.weight_packed"], tensors[f"{name}.weight_scale"].float()
    bits = 32 * packed.shape[1] // shape[1]
    zero = tensors.get(f"{name}.weight_zero_point")
    if zero is not None:
        zero = unpack_from_int32(zero, bits, torch.Size(scale.shape), packed_dim=0)
    weight: torch.Tensor = dequantize(unpack_from_int32(packed, bits, shape), scale, zero)
    return weight


if __name__ == "__main__":
    main()
