"""AutoAWQ's and AutoGPTQ's formats unpacked one number at a time, by their definition."""

from collections.abc import Callable

import numpy as np
import torch

from lowbit_quantize.schemes.integer import Integer
from lowbit_quantize.schemes.numbers.affine import stored
from lowbit_quantize.schemes.scheme import Quantized

Tensors = dict[str, torch.Tensor]
# Of eight outputs, output i lies in this four-bit field of AutoAWQ's word.
AWQ_FIELD = (0, 4, 1, 5, 2, 6, 3, 7)


def field(words: torch.Tensor, number: int, bits: int) -> np.ndarray:
    return (words.numpy().view(np.uint32) >> np.uint32(number * bits)) & np.uint32((1 << bits) - 1)


def unpacked_awq(linear: Tensors) -> torch.Tensor:
    """(out, in), by the definition of AutoAWQ's GEMM format."""
    inputs, outputs = linear["qweight"].shape[0], linear["scales"].shape[1]
    group_size = inputs // len(linear["scales"])
    weight = torch.empty(outputs, inputs)
    for output in range(outputs):
        word, number = output // 8, AWQ_FIELD[output % 8]
        codes = field(linear["qweight"][:, word].contiguous(), number, 4)
        zeros = field(linear["qzeros"][:, word].contiguous(), number, 4).repeat(group_size)
        steps = torch.from_numpy(codes.astype(np.float32) - zeros.astype(np.float32))
        weight[output] = steps * linear["scales"][:, output].float().repeat_interleave(group_size)
    return weight


def unpacked_gptq(linear: Tensors) -> torch.Tensor:
    """(out, in), by the definition of AutoGPTQ's format, zero points one short."""
    inputs, outputs = len(linear["g_idx"]), linear["scales"].shape[1]
    bits = 32 * linear["qweight"].shape[0] // inputs
    values = 32 // bits
    weight = torch.empty(inputs, outputs)
    zeros = np.stack(
        [field(linear["qzeros"][:, o // values].contiguous(), o % values, bits) for o in range(outputs)],
        axis=1,
    ).astype(np.float32)  # (groups, out)
    for i in range(inputs):
        group = int(linear["g_idx"][i])
        codes = field(linear["qweight"][i // values].contiguous(), i % values, bits).astype(np.float32)
        weight[i] = torch.from_numpy(codes - (zeros[group] + 1)) * linear["scales"][group].float()
    return weight.T


UNPACK: dict[str, Callable[[Tensors], torch.Tensor]] = {"autoawq": unpacked_awq, "autogptq": unpacked_gptq}


def random_linear(bits: int, group_size: int, *, symmetric: bool) -> Quantized:
    """96 outputs, 128 inputs; every second row's scales are negative."""
    scheme = Integer(bits, group_size, symmetric, "a test's")
    generator = torch.Generator().manual_seed(3)
    codes = torch.randint(scheme.lowest, scheme.highest + 1, (96, 128), generator=generator).to(torch.int8)
    groups = (96, 128 // group_size)
    scale = stored(torch.exp(3 * torch.randn(groups, generator=generator) - 4))
    scale[::2] *= -1
    zero = torch.zeros(groups)
    if not symmetric:
        zero = torch.randint(scheme.lowest, scheme.highest + 1, groups, generator=generator).float()
    return Quantized(codes, {"scale": scale, "zero": zero}, scheme)


def bits_of(weight: torch.Tensor) -> torch.Tensor:
    return weight.contiguous().view(torch.int32)
