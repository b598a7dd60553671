"""AutoGPTQ 0.7.1's own unpacking of a checkpoint, compared with the reference. Runs in its environment.

    python unpack_autogptq.py --checkpoint DIR --reference FILE.safetensors

The tensors are loaded into both of AutoGPTQ's layers that unpack in Python, which checks their shapes. They unpack
on the way to a matrix product; `unpacked` is what they hand to it.
"""

from typing import Any

import torch
from auto_gptq.nn_modules.qlinear import qlinear_cuda, qlinear_cuda_old
from comparison import Tensors, compared
from torch.overrides import TorchFunctionMode

LAYERS = (qlinear_cuda.QuantLinear, qlinear_cuda_old.QuantLinear)


def unpack(linear: Tensors, dtype: torch.dtype) -> torch.Tensor:
    """(in, out), the same from both layers."""
    weights = [unpacked(layer, linear, dtype) for layer in LAYERS]
    if not torch.equal(*weights):
        raise SystemExit("AutoGPTQ's two layers unpack different weights")
    return weights[0]


class _Products(TorchFunctionMode):
    """Sees the second factor of the last `torch.matmul`."""

    weight: torch.Tensor

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.matmul:
            self.weight = args[1]
        return function(*args, **(kwargs or {}))


def unpacked(layer: type[torch.nn.Module], linear: Tensors, dtype: torch.dtype) -> torch.Tensor:
    inputs, outputs = len(linear["g_idx"]), linear["scales"].shape[1]
    group_size, bits = inputs // len(linear["scales"]), 32 * linear["qweight"].shape[0] // inputs
    module = layer(bits, group_size, inputs, outputs, bias="bias" in linear, weight_dtype=torch.float16)
    module.load_state_dict(linear)
    module.scales = module.scales.to(dtype)
    with _Products() as products:
        module(torch.zeros(1, inputs, dtype=dtype))
    return products.weight


if __name__ == "__main__":
    compared(unpack)
