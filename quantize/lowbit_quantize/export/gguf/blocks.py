"""A quantized linear as GGUF's blocks of 32 numbers, code for code.

| blocks | a number is | what fits |
|---|---|---|
| Q4_0 | (q − 8) · d, q in 0 … 15 | symmetric 4 bits |
| Q4_1 | q · d + m, q in 0 … 15 | asymmetric 4 bits, where m = −(zero + 8) · d is a float16 |
| Q5_0 | (q − 16) · d, q in 0 … 31 | symmetric 5 bits |
| Q5_1 | q · d + m, q in 0 … 31 | asymmetric 5 bits, where m = −(zero + 16) · d is a float16 |
| Q8_0 | q · d, q in −128 … 127 | symmetric 8 bits |

2, 3 and 6 bits are in blocks of 256 only, whose scales have few bits: ours do not fit. d and m are float16. Layouts:
ggml's `ggml-quants.c`; the package gguf's `quants.py` reads and writes them.
"""

from typing import Any

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from torch import Tensor

from lowbit_core.errors import CheckpointError
from lowbit_quantize.schemes.scheme import Quantized, Scheme

BLOCK = 32
WITH_MINIMA = (GGMLQuantizationType.Q4_1, GGMLQuantizationType.Q5_1)


def block_type(scheme: Scheme) -> GGMLQuantizationType | None:
    """The blocks that hold a scheme's codes; None where none do."""
    if not isinstance(scheme.bits, int) or scheme.code_dtype.is_floating_point:
        return None
    if scheme.group_size and scheme.group_size % BLOCK:
        return None
    kinds = {
        (4, True): GGMLQuantizationType.Q4_0,
        (4, False): GGMLQuantizationType.Q4_1,
        (5, True): GGMLQuantizationType.Q5_0,
        (5, False): GGMLQuantizationType.Q5_1,
        (8, True): GGMLQuantizationType.Q8_0,
    }
    return kinds.get((scheme.bits, scheme.symmetric))


def row_bytes(kind: GGMLQuantizationType, inputs: int) -> int:
    """Bytes of one output's blocks."""
    numbers, size = GGML_QUANT_SIZES[kind]
    found: int = inputs // numbers * size
    return found


def blocks_of(name: str, quantized: Quantized, kind: GGMLQuantizationType) -> Any:
    """Blocks, (out, bytes) uint8; raises CheckpointError where a scale or a minimum is no float16."""
    outputs, inputs = quantized.codes.shape
    scale, codes = quantized.params["scale"].float(), quantized.codes.int()
    parts = [_halves(name, "scales", scale, inputs)]
    if kind == GGMLQuantizationType.Q8_0:
        packed = codes.to(torch.int8).view(outputs, -1, BLOCK).numpy().view(np.uint8)
    else:
        bits = int(quantized.scheme.bits)
        lowest = -(1 << (bits - 1))  # of our codes; those of the blocks begin with 0
        if kind in WITH_MINIMA:
            parts.append(_halves(name, "minima", (lowest - quantized.params["zero"].float()) * scale, inputs))
        if bits == 5:
            parts.append(_fifth_bits(codes - lowest))
        packed = _nibbles(codes - lowest & 0xF)
    return np.concatenate([*parts, packed], axis=-1).reshape(outputs, -1)


def _halves(name: str, what: str, values: Tensor, inputs: int) -> Any:
    """Of one number for each group one float16 for each block, (out, blocks, 2) bytes."""
    halves = values.to(torch.float16)
    wrong = int(((halves.float() != values) | ~torch.isfinite(halves)).sum())
    if wrong:
        raise CheckpointError(
            f"{wrong} of {values.numel()} {what} of {name} are no float16, which is what GGUF keeps, so that other "
            "numbers would come out; quantize with a symmetric scheme"
        )
    by_block = halves.repeat_interleave(inputs // BLOCK // values.shape[1], dim=1).contiguous()
    return by_block.numpy().view(np.uint8).reshape(len(values), -1, 2)


def _fifth_bits(codes: Tensor) -> Any:
    """The highest bit of each code 0 … 31, a bit each, the first lowest: (out, blocks, 4) bytes."""
    blocks = (codes >> 4).to(torch.uint8).view(len(codes), -1, BLOCK)
    return np.packbits(blocks.numpy(), axis=-1, bitorder="little")


def _nibbles(codes: Tensor) -> Any:
    """Codes 0 … 15 two in a byte: the first half of a block in the low bits, the second in the high ones."""
    blocks = codes.to(torch.uint8).view(len(codes), -1, BLOCK)
    return (blocks[..., : BLOCK // 2] | blocks[..., BLOCK // 2 :] << 4).numpy()
