"""Affine integers of weights alone as a scheme, W2A16 to W8A16: stored as compressed-tensors' `pack-quantized`.

Codes lie as vLLM reads them (`packed_words.py`).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lowbit_quantize.device.memory import without_compiler
from lowbit_quantize.schemes.inputs import InputQuantizer
from lowbit_quantize.schemes.numbers.affine import SCALE_DTYPE, Affine, encode, range_params
from lowbit_quantize.schemes.processors.experts import EXPERTS
from lowbit_quantize.schemes.processors.linears import LINEARS
from lowbit_quantize.schemes.scheme import (
    ExpertSupport,
    GroupSize,
    Kernel,
    Params,
    Preset,
    QuantizeColumn,
    Quantized,
    take_rows,
)
from lowbit_quantize.schemes.search.affine_search import (
    best_of,
    candidates,
    search_params,
    solve_scales,
    split_groups,
)
from lowbit_quantize.schemes.storage.packed_words import pack, unpack, words_of

with without_compiler():  # the library compiles a function for 4-bit floats, which is not called here
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.quant_scheme import PRESET_SCHEMES

BITS = {"W4A16": 4, "W4A16_ASYM": 4, "W8A16": 8, "W2A16": 2, "W3A16": 3, "W5A16": 5, "W6A16": 6}
PATTERN = "W4A16"  # whose arguments in compressed-tensors those of the bits are, that it has no preset for
SMALLEST_GROUP = 32  # what the engines' integer kernels divide rows into
TRIAL_CLIPS = (1.0, 0.86)  # that a scale of the inputs is judged by
MARLIN = ((4, True), (8, True), (4, False))  # bits, symmetric; Humming's kernel takes all
MARLIN_GROUPS = (None, 32, 64, 128)
CPU_BITS = (4,)
CPU_MULTIPLE = 32  # of inputs and outputs (`CPUWNA16LinearKernel`)
EXPERTS_HIDDEN_MULTIPLE, EXPERTS_MIDDLE_MULTIPLE = 128, 64  # of Marlin's kernel for experts


@dataclass(frozen=True)
class Integer(Affine):
    """`w = scale · (code − zero)`, codes int8 in memory; parameters `scale` and `zero`, (out, groups) each."""

    name: str
    input_quantizer: InputQuantizer | None = field(default=None, kw_only=True)

    format = "pack-quantized"
    code_dtype = torch.int8

    def search(self, weight: Tensor, hessian: Tensor | None) -> Params:
        if hessian is None:
            scale, zero = range_params(self.split(weight), self)
        else:
            scale, zero = search_params(weight, hessian, self)
        return {"scale": scale, "zero": zero}

    def quantize(self, weight: Tensor, params: Params) -> Tensor:
        codes = encode(self.split(weight), params["scale"], params["zero"], self)
        return codes.flatten(-2).to(self.code_dtype)

    def dequantize(self, codes: Tensor, params: Params) -> Tensor:
        groups = self.split(codes).float()  # (…, out, groups, width)
        weight: Tensor = (groups - params["zero"].unsqueeze(-1)) * params["scale"].unsqueeze(-1)
        return weight.flatten(-2)

    def factors(self, codes: Tensor, params: Params) -> tuple[Tensor, Tensor]:
        weight = self.dequantize(codes, params)
        return weight, torch.ones(len(weight), 1, device=weight.device)

    def columns(self, params: Params, groups: Tensor) -> Callable[[slice], Sequence[QuantizeColumn]]:
        scale = take_rows(params["scale"].mT, groups)  # (n, columns, rows)
        if self.symmetric:
            return lambda block: [partial(self._symmetric_column, s) for s in scale[:, block].unbind(1)]
        zero = take_rows(params["zero"].mT, groups)
        return lambda block: [
            partial(self._column, s, z)
            for s, z in zip(scale[:, block].unbind(1), zero[:, block].unbind(1), strict=True)
        ]

    def _symmetric_column(
        self, scale: Tensor, aim: Tensor, column: Tensor, code: Tensor, left: Tensor
    ) -> None:
        torch.div(aim, scale, out=code).round_().clamp_(self.lowest, self.highest)
        torch.addcmul(column, code, scale, value=-1, out=left)

    def _column(
        self, scale: Tensor, zero: Tensor, aim: Tensor, column: Tensor, code: Tensor, left: Tensor
    ) -> None:
        torch.div(aim, scale, out=code).round_().add_(zero).clamp_(self.lowest, self.highest)
        torch.addcmul(column, code - zero, scale, value=-1, out=left)

    def refine(self, codes: Tensor, params: Params, weight: Tensor, hessian: Tensor) -> Params:
        scale = solve_scales(codes, params["scale"], params["zero"], weight, hessian, self)
        return {"scale": scale, "zero": params["zero"]}

    def trial_error(self, weight: Tensor, blocks: Tensor) -> float:
        groups = split_groups(weight, self)
        return float(torch.sum(best_of(groups, blocks, candidates(groups, self, TRIAL_CLIPS)).error))

    def tensors(self, codes: Tensor, params: Params) -> dict[str, Tensor]:
        tensors = {
            "weight_packed": pack(codes, self.bits),
            "weight_scale": params["scale"].to(SCALE_DTYPE),
            "weight_shape": torch.tensor(codes.shape, dtype=torch.int64),
        }
        if not self.symmetric:
            zero = params["zero"].to(torch.int8)
            tensors["weight_zero_point"] = pack(zero.T, self.bits).T.contiguous()
        return tensors

    def read(self, tensors: Mapping[str, Tensor]) -> Quantized:
        outputs, inputs = tensors["weight_shape"].tolist()
        scale = tensors["weight_scale"].float()
        zero = torch.zeros_like(scale)
        if not self.symmetric:
            zero = unpack(tensors["weight_zero_point"].T, self.bits, outputs).T.float()
        codes = unpack(tensors["weight_packed"], self.bits, inputs)
        return Quantized(codes, {"scale": scale, "zero": zero}, self)

    def bytes(self, outputs: int, inputs: int) -> tuple[int, int]:
        groups = inputs // self.width(inputs)
        codes = outputs * words_of(inputs, self.bits) * 4
        scales = outputs * groups * SCALE_DTYPE.itemsize
        zeros = 0 if self.symmetric else words_of(outputs, self.bits) * groups * 4
        return codes + scales + zeros + 2 * 8, 3 if self.symmetric else 4

    def quantization_args(self) -> Mapping[str, Any]:
        ours = {"num_bits": self.bits, "group_size": self.group_size}
        strategy = "group" if self.group_size else "channel"
        return {
            "weights": QuantizationArgs(
                **{**_preset_of(self.name).model_dump(), **ours, "strategy": strategy}
            )
        }

    def obstacles(self, kernel: Kernel) -> list[str]:
        kind = f"{self.bits} bits {'symmetric' if self.symmetric else 'asymmetric'}"
        found = []
        if kernel == "cpu" and self.bits not in CPU_BITS:
            found.append(f"the CPU's kernel takes 4 bits, not {kind}")
        if kernel == "gpu" and self._by_marlin and self.group_size not in MARLIN_GROUPS:
            found.append(f"Marlin takes groups of 32, 64, 128 or channels, not {self.group_size}")
        return found

    def multiple(self, kernel: Kernel) -> int:
        return CPU_MULTIPLE if kernel == "cpu" else 1

    @property
    def cpu_kernels(self) -> Sequence[str]:
        return LINEARS[self.name].cpu_kernels

    @property
    def gpus(self) -> str:
        return LINEARS[self.name].gpus

    @property
    def experts(self) -> ExpertSupport:
        if not self.symmetric:
            return ExpertSupport("nothing", misfit="engines run quantized experts in symmetric schemes only")
        if not self._by_marlin and self.group_size is None:
            misfit = f"engines take experts of {self.bits} bits in groups only; give a group_size"
            return ExpertSupport("nothing", misfit=misfit)
        return ExpertSupport(EXPERTS[self.name].words)

    @property
    def _by_marlin(self) -> bool:
        """Whether Marlin's kernel takes such integers; else Humming's does, in all shapes."""
        return (self.bits, self.symmetric) in MARLIN

    def expert_obstacles(self, kernel: Kernel, hidden: int, middle: int) -> list[str]:
        if kernel == "cpu" or not self._by_marlin:
            return []
        found, multiple = [], max(EXPERTS_MIDDLE_MULTIPLE, self.group_size or 0)
        if hidden % EXPERTS_HIDDEN_MULTIPLE:
            found.append(f"Marlin's experts need hidden sizes of {EXPERTS_HIDDEN_MULTIPLE}s, not {hidden}")
        if middle % multiple:
            found.append(f"Marlin's experts need middle channels of {multiple}s on a rank, not {middle}")
        return found

    def misfit(self, inputs: int) -> str | None:
        if self.group_size is None and inputs % SMALLEST_GROUP:
            return f"they are no multiple of {SMALLEST_GROUP}"
        if self.group_size and inputs % self.group_size:
            return f"groups of {self.group_size} do not divide them"
        return None

    def outputs_misfit(self, outputs: Sequence[int], *, split: bool) -> str | None:
        return None


def _preset_of(name: str) -> QuantizationArgs:
    preset: QuantizationArgs = PRESET_SCHEMES.get(name, PRESET_SCHEMES[PATTERN])["weights"]
    return preset


def _preset(name: str, bits: int) -> Preset:
    weights = _preset_of(name)

    def make(group_size: GroupSize) -> Integer:
        size = None if group_size == "channel" else group_size
        return Integer(bits, size, weights.symmetric, name)

    return Preset(name, make, weights.group_size or "channel")


PRESETS = tuple(_preset(name, bits) for name, bits in BITS.items())
