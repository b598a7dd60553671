"""How much is worked on at once: on a CPU what fits a core's cache, on a GPU all that memory allows.

A GPU runs blocks one after the other and pays for each launch, so its blocks are large; no GPU has measured them yet.
"""

from collections.abc import Sequence

import torch

CPU_SEARCH_WEIGHTS, GPU_SEARCH_WEIGHTS = 1 << 17, 1 << 26
CPU_COLUMN_ROWS, GPU_COLUMN_ROWS = 512, 1 << 20
CPU_SOLVE_ROWS, GPU_SOLVE_ROWS = 512, 4096
GPU_EXPERTS, GPU_EXPERT_BYTES = 64, 6 << 30  # at once, and what they may need
GPU_WEIGHT_COPIES, GPU_HESSIAN_COPIES = 10, 4  # in float32, while one is quantized


def weights_together(device: torch.device, shapes: Sequence[tuple[int, int]]) -> int:
    """How many experts, each with linears of these shapes (out, in), are quantized at once."""
    if device.type == "cpu":
        return 1  # its cores are busy with one
    weights = max(out * inputs for out, inputs in shapes)
    matrices = max(inputs * inputs for _, inputs in shapes)
    bytes_each = 4 * (GPU_WEIGHT_COPIES * weights + GPU_HESSIAN_COPIES * matrices)
    return max(1, min(GPU_EXPERTS, GPU_EXPERT_BYTES // bytes_each))


def search_weights(device: torch.device) -> int:
    """Weights whose candidate parameters are held at once."""
    return CPU_SEARCH_WEIGHTS if device.type == "cpu" else GPU_SEARCH_WEIGHTS


def column_rows(device: torch.device) -> int:
    """Rows of a weight whose columns are quantized together."""
    return CPU_COLUMN_ROWS if device.type == "cpu" else GPU_COLUMN_ROWS


def solve_rows(device: torch.device) -> int:
    """Rows whose scales are solved for at once."""
    return CPU_SOLVE_ROWS if device.type == "cpu" else GPU_SOLVE_ROWS
