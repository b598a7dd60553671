"""AutoAWQ 0.2.9's own unpacking of a checkpoint, compared with the reference. Runs in its environment.

    python unpack_autoawq.py --checkpoint DIR --reference FILE.safetensors

The tensors are loaded into AutoAWQ's `WQLinear_GEMM`, which checks their shapes, and unpacked by the function that
it calls where it has no GPU kernel.
"""

import torch
from awq.modules.linear.gemm import WQLinear_GEMM
from awq.utils.packing_utils import dequantize_gemm
from comparison import Tensors, compared

BITS = 4


def unpack(linear: Tensors, dtype: torch.dtype) -> torch.Tensor:
    """(in, out)"""
    inputs, outputs = linear["qweight"].shape[0], linear["scales"].shape[1]
    group_size = inputs // len(linear["scales"])
    module = WQLinear_GEMM(BITS, group_size, inputs, outputs, bias="bias" in linear, dev="cpu")
    module.load_state_dict(linear)
    scales = module.scales.to(dtype)
    weight: torch.Tensor = dequantize_gemm(module.qweight, module.qzeros, scales, module.w_bit, group_size)
    return weight


if __name__ == "__main__":
    compared(unpack)
