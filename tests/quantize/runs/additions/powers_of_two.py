"""A scheme of one file: signed powers of two, seven of them, and zero, with a scale for each group of inputs.

They are stored as the 8-bit integers that they are, so that whatever reads `pack-quantized` reads them.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from compressed_tensors.quantization import QuantizationArgs
from torch import Tensor

from lowbit_quantize.schemes.numbers.affine import stored
from lowbit_quantize.schemes.scheme import (
    ExpertSupport,
    GroupSize,
    Kernel,
    Params,
    Preset,
    QuantizeColumn,
    Quantized,
    cost_blocks,
    take_rows,
)

LARGEST = 64  # 2⁶
CLIPS = (1.0, 0.85, 0.7, 0.55)


def nearest(values: Tensor) -> Tensor:
    """Zero or ± the power of two from 1 to 64 that is nearest."""
    magnitude = values.abs()
    exponent = (magnitude / 0.75).clamp(min=1e-9).log2().floor().clamp(0, 6)
    return torch.where(magnitude < 0.5, 0.0, values.sign() * exponent.exp2())


@dataclass(frozen=True)
class PowersOfTwo:
    """`w = scale · code`, codes 0 and ±2^k."""

    group_size: int | None

    name = "POWERS_OF_TWO"
    bits = 8
    symmetric = True
    format = "pack-quantized"
    code_dtype = torch.int8
    input_quantizer = None

    def width(self, features: int) -> int:
        return self.group_size or features

    def _groups(self, weight: Tensor) -> Tensor:
        groups: Tensor = weight.unflatten(-1, (-1, self.width(weight.shape[-1])))  # (…, out, groups, width)
        return groups

    def search(self, weight: Tensor, hessian: Tensor | None) -> Params:
        groups = self._groups(weight)
        whole = stored(groups.abs().amax(-1) / LARGEST)
        if hessian is None:
            return {"scale": whole}
        blocks = cost_blocks(hessian, weight, self.width(weight.shape[-1]))
        best, least = whole, torch.full_like(whole, torch.inf)
        for clip in CLIPS:
            scale = stored(whole * clip)
            error = _errors(groups - nearest(groups / scale.unsqueeze(-1)) * scale.unsqueeze(-1), blocks)
            best, least = torch.where(error < least, scale, best), torch.minimum(error, least)
        return {"scale": best}

    def quantize(self, weight: Tensor, params: Params) -> Tensor:
        codes = nearest(self._groups(weight) / params["scale"].unsqueeze(-1))
        return codes.flatten(-2).to(self.code_dtype)

    def dequantize(self, codes: Tensor, params: Params) -> Tensor:
        weight: Tensor = (self._groups(codes).float() * params["scale"].unsqueeze(-1)).flatten(-2)
        return weight

    def factors(self, codes: Tensor, params: Params) -> tuple[Tensor, Tensor]:
        return self.dequantize(codes, params), torch.ones(len(codes), 1)

    def columns(self, params: Params, groups: Tensor) -> Callable[[slice], Sequence[QuantizeColumn]]:
        scales = take_rows(params["scale"].mT, groups)  # (n, columns, rows)

        def quantizer(scale: Tensor) -> QuantizeColumn:
            def quantize(aim: Tensor, column: Tensor, code: Tensor, left: Tensor) -> None:
                code.copy_(nearest(aim / scale))
                torch.addcmul(column, code, scale, value=-1, out=left)

            return quantize

        return lambda block: [quantizer(scale) for scale in scales[:, block].unbind(1)]

    def refine(self, codes: Tensor, params: Params, weight: Tensor, hessian: Tensor) -> Params:
        return params

    def trial_error(self, weight: Tensor, blocks: Tensor) -> float:
        groups, params = self._groups(weight), self.search(weight, None)
        off = groups - self._groups(self.dequantize(self.quantize(weight, params), params))
        return float(_errors(off, blocks).sum())

    def tensors(self, codes: Tensor, params: Params) -> dict[str, Tensor]:
        return {
            "weight_packed": pack_to_int32(codes, self.bits),
            "weight_scale": params["scale"].to(torch.bfloat16),
            "weight_shape": torch.tensor(codes.shape, dtype=torch.int64),
        }

    def read(self, tensors: Mapping[str, Tensor]) -> Quantized:
        shape = torch.Size(tensors["weight_shape"].tolist())
        codes = unpack_from_int32(tensors["weight_packed"], self.bits, shape)
        return Quantized(codes, {"scale": tensors["weight_scale"].float()}, self)

    def bytes(self, outputs: int, inputs: int) -> tuple[int, int]:
        return outputs * inputs + 2 * outputs * (inputs // self.width(inputs)) + 2 * 8, 3

    def quantization_args(self) -> Mapping[str, Any]:
        strategy = "group" if self.group_size else "channel"
        return {
            "weights": QuantizationArgs(
                num_bits=self.bits, type="int", symmetric=True, strategy=strategy, group_size=self.group_size
            )
        }

    def multiple(self, kernel: Kernel) -> int:
        return 1

    @property
    def cpu_kernels(self) -> Sequence[str]:
        return ()

    @property
    def gpus(self) -> str:
        return "none"

    @property
    def experts(self) -> ExpertSupport:
        return ExpertSupport("GPUs")

    def expert_obstacles(self, kernel: Kernel, hidden: int, middle: int) -> list[str]:
        return []

    def obstacles(self, kernel: Kernel) -> list[str]:
        return []

    def misfit(self, inputs: int) -> str | None:
        return None if inputs % self.width(inputs) == 0 else f"groups of {self.group_size} do not divide them"

    def outputs_misfit(self, outputs: Sequence[int], *, split: bool) -> str | None:
        return None


def _errors(off: Tensor, blocks: Tensor) -> Tensor:
    """`d H_gg dᵀ` of each group: (…, out, groups, width) to (…, out, groups)."""
    if blocks.dim() < off.dim():
        return (off.square() * blocks.unsqueeze(-3)).sum(-1)
    return torch.einsum("...ogi,...gij,...ogj->...og", off, blocks, off)


def _make(group_size: GroupSize) -> PowersOfTwo:
    return PowersOfTwo(None if group_size == "channel" else group_size)


PRESET = Preset(PowersOfTwo.name, _make, 64)
