"""Llama 3's stretched positions in a GGUF file: the tensor `rope_freqs`, by which each rotary frequency is divided.

llama.cpp's converter computes its factors from four parameters and stores the factors alone. Published models of Llama
3.1 to 3.3 share two of the parameters, the largest factor is the third, and the fourth is a power of two: the first
that gives the very factors of the file is what the original's `config.json` says. Where none does, the file is refused.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

ROPE_FREQS = "rope_freqs.weight"
LOW, HIGH = 1.0, 4.0
LENGTHS = tuple(1 << power for power in range(6, 21))
LIKELY = 8192  # of every published one
TOLERANCE = 1e-4


def llama3_parameters(factors: Tensor, theta: float) -> dict[str, Any] | None:
    """transformers' parameters that give these factors, (head size / 2,); None where none do."""
    scale = float(factors.max())
    for length in (LIKELY, *LENGTHS) if scale >= 1 else ():
        expected = _factors(2 * len(factors), theta, scale, length)
        if torch.allclose(factors.double(), expected, rtol=TOLERANCE, atol=0):
            return {
                "rope_type": "llama3",
                "rope_theta": theta,
                "factor": round(scale, 4),
                "low_freq_factor": LOW,
                "high_freq_factor": HIGH,
                "original_max_position_embeddings": length,
            }
    return None


def llama3_factors(parameters: Mapping[str, Any] | None, size: int) -> Tensor | None:
    """The inverse: factors, (size / 2,), of transformers' parameters for heads of `size` channels."""
    if parameters is None:
        return None
    length = parameters["original_max_position_embeddings"]
    return _factors(size, float(parameters["rope_theta"]), float(parameters["factor"]), int(length)).float()


def _factors(size: int, theta: float, scale: float, length: int) -> Tensor:
    """What frequencies are divided by: short waves by nothing, long ones by `scale`, those between by a mixture."""
    frequencies = theta ** -(torch.arange(0, size, 2, dtype=torch.float64) / size)
    turns = length * frequencies / (2 * math.pi)  # of a wave within the original length
    smooth = ((turns - LOW) / (HIGH - LOW)).clamp(0, 1)
    return 1 / ((1 - smooth) / scale + smooth)
