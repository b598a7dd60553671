"""How much is worked on at once: on a CPU what fits a core's cache, on a GPU all that memory allows.

A GPU runs blocks one after the other and pays for each launch, so its blocks are large; no GPU has measured them yet.
"""

import torch

CPU_SEARCH_WEIGHTS, GPU_SEARCH_WEIGHTS = 1 << 17, 1 << 26
CPU_COLUMN_ROWS, GPU_COLUMN_ROWS = 1024, 1 << 20
CPU_SOLVE_ROWS, GPU_SOLVE_ROWS = 512, 4096


def search_weights(device: torch.device) -> int:
    """Weights whose candidate parameters are held at once."""
    return CPU_SEARCH_WEIGHTS if device.type == "cpu" else GPU_SEARCH_WEIGHTS


def column_rows(device: torch.device) -> int:
    """Rows of a weight whose columns are quantized together."""
    return CPU_COLUMN_ROWS if device.type == "cpu" else GPU_COLUMN_ROWS


def solve_rows(device: torch.device) -> int:
    """Rows whose scales are solved for at once."""
    return CPU_SOLVE_ROWS if device.type == "cpu" else GPU_SOLVE_ROWS
