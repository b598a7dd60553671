"""Small floats in blocks: NVFP4 and NVFP4A16, MXFP4 and MXFP4A16, MXFP8 of compressed-tensors.

Sixteen inputs of a row share an FP8 scale under one float32 global scale a tensor (NVFP4), or thirty-two a power of
two (the microscaling formats). The global scale is a divisor: `w = code · scale / global scale`. What engines fuse
shares it, because vLLM serves all of it under the largest; the walk quantizes that together.

Round to nearest takes the plain scales of the formats. With a Hessian the global scale is a power of two: each served
weight is then exact in bfloat16, whichever kernel multiplies it. Scales of blocks and the global scale are chosen
together, by what the blocks err under each of several global scales: one too large leaves no room for a block whose
largest weight becomes 4, one too small rounds the scales of small blocks to few digits.

Source: OCP Microscaling Formats (MX) 1.0 (2023); NVIDIA's NVFP4; blocks that end at 4: Cook et al. 2025, arXiv
2512.02010.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lowbit_quantize.device.memory import without_compiler
from lowbit_quantize.schemes.inputs import BlockInputs
from lowbit_quantize.schemes.numbers.grids import FP4, FP8, Grid
from lowbit_quantize.schemes.numbers.scale_grids import FP8_SCALES, POWERS_OF_TWO, power_of_two_for
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
    cost_blocks,
    take_rows,
)
from lowbit_quantize.schemes.search.block_search import Blocks
from lowbit_quantize.schemes.storage.packed_fp4 import packed_fp4, unpacked_fp4

with without_compiler():  # the library compiles a function for 4-bit floats, which is not called here
    from compressed_tensors.quantization.quant_scheme import PRESET_SCHEMES

FORMATS = {"NVFP4": "nvfp4-pack-quantized", "MXFP4": "mxfp4-pack-quantized", "MXFP8": "mxfp8-quantized"}
SMALLEST = 1e-20  # that a tensor's largest weight is taken to be, so that no global scale is infinite
EMPTY_SCALE = 0.125  # of a block of zeros in the plain rule, compressed-tensors'
ROOM = FP8_SCALES.highest * 4  # of the largest weight times the global scale, where its block may end at 4
GLOBAL_STEPS = (-1, 0, 1, 2)  # powers of two below that room that are tried
GLOBAL_ROWS = 64  # that they are tried on
TRIAL_STEPS = {"fp8": (0, 5), "power of two": (0, 1)}  # neighbours that a scale of the inputs is judged by


@dataclass(frozen=True)
class FloatBlocks:
    """`w = code · scale / divisor`; codes are small floats, held in bfloat16.

    Parameters are `scale`, (out, groups), and, where scales are FP8, `divisor`, (out, 1), the same for all rows.
    """

    name: str
    family: str
    blocks: Blocks
    input_quantizer: BlockInputs | None

    symmetric = True
    code_dtype = torch.bfloat16

    @property
    def bits(self) -> int:
        return 4 if self._packed else 8

    @property
    def group_size(self) -> int:
        return self.blocks.width

    @property
    def format(self) -> str:
        return FORMATS[self.family]

    @property
    def _packed(self) -> bool:
        return self.blocks.numbers.name == "fp4"

    @property
    def _two_levels(self) -> bool:
        return self.blocks.scales.name == "fp8"

    def width(self, features: int) -> int:
        return self.blocks.width

    def search(self, weight: Tensor, hessian: Tensor | None) -> Params:
        divisor = self._divisor(weight, hessian)
        if hessian is None:
            return self._params(self._plain(weight, divisor), divisor)
        return self._params(self.blocks.search(weight, hessian, divisor), divisor)

    def quantize(self, weight: Tensor, params: Params) -> Tensor:
        return self.blocks.encode(weight, params["scale"], _divisor_of(params)).to(self.code_dtype)

    def dequantize(self, codes: Tensor, params: Params) -> Tensor:
        served = (params["scale"] / _divisor_of(params)).unsqueeze(-1)
        return (self.blocks.split(codes.float()) * served).flatten(-2)

    def factors(self, codes: Tensor, params: Params) -> tuple[Tensor, Tensor]:
        numbers = self.blocks.split(codes.float()) * params["scale"].unsqueeze(-1)
        after = (1 / _divisor_of(params)).expand(len(codes), 1).contiguous()
        return numbers.flatten(-2).to(torch.bfloat16), after

    def columns(self, params: Params, groups: Tensor) -> Callable[[slice], Sequence[QuantizeColumn]]:
        served = take_rows((params["scale"] / _divisor_of(params)).mT, groups)  # (n, columns, rows)
        return lambda block: [partial(self._column, scale) for scale in served[:, block].unbind(1)]

    def _column(self, scale: Tensor, aim: Tensor, column: Tensor, code: Tensor, left: Tensor) -> None:
        self.blocks.numbers.nearest_(torch.div(aim, scale, out=code))
        torch.addcmul(column, code, scale, value=-1, out=left)

    def refine(self, codes: Tensor, params: Params, weight: Tensor, hessian: Tensor) -> Params:
        divisor = _divisor_of(params)[..., :1, :]
        scale = self.blocks.refine(codes, params["scale"], divisor, weight, hessian)
        return {**params, "scale": scale}

    def trial_error(self, weight: Tensor, blocks: Tensor) -> float:
        steps = TRIAL_STEPS[self.blocks.scales.name]
        return float(self.blocks.best(weight, blocks, self._room(weight), steps)[1].sum())

    def tensors(self, codes: Tensor, params: Params) -> dict[str, Tensor]:
        if self._packed:
            tensors = {"weight_packed": packed_fp4(codes)}
        else:
            tensors = {"weight": codes.to(self.blocks.numbers.dtype)}
        tensors["weight_scale"] = self.blocks.scales.stored(params["scale"])
        if self._two_levels:
            tensors["weight_global_scale"] = params["divisor"][0].clone()
        return tensors

    def read(self, tensors: Mapping[str, Tensor]) -> Quantized:
        if self._packed:
            codes = unpacked_fp4(tensors["weight_packed"], self.code_dtype)
        else:
            codes = tensors["weight"].to(self.code_dtype)
        scale = self.blocks.scales.read(tensors["weight_scale"])
        params = {"scale": scale}
        if self._two_levels:
            params["divisor"] = tensors["weight_global_scale"].float().view(1, 1).expand(len(codes), 1)
        stored = tensors.get(self.input_quantizer.stored_as) if self.input_quantizer else None
        return Quantized(codes, params, self, None if stored is None else float(stored))

    def bytes(self, outputs: int, inputs: int) -> tuple[int, int]:
        static = self.input_quantizer is not None and self.input_quantizer.static
        scalars = self._two_levels + static
        codes = outputs * inputs * self.bits // 8
        return codes + outputs * (inputs // self.blocks.width) + 4 * scalars, 2 + scalars

    def quantization_args(self) -> Mapping[str, Any]:
        return {key: value for key, value in PRESET_SCHEMES[self.name].items() if key != "targets"}

    def obstacles(self, kernel: Kernel) -> list[str]:
        return [f"vLLM has no CPU kernel for {self.name}"] if kernel == "cpu" else []

    def multiple(self, kernel: Kernel) -> int:
        return 1  # kernels fill up what is no multiple of their tiles

    @property
    def cpu_kernels(self) -> Sequence[str]:
        return LINEARS[self.name].cpu_kernels

    @property
    def gpus(self) -> str:
        return LINEARS[self.name].gpus

    @property
    def experts(self) -> ExpertSupport:
        # transformers 5.19 unpacks experts of packed integers and of FP8 by channel only
        return ExpertSupport(EXPERTS[self.name].words, opened=False)

    def expert_obstacles(self, kernel: Kernel, hidden: int, middle: int) -> list[str]:
        return []

    def misfit(self, inputs: int) -> str | None:
        width = self.blocks.width
        return f"they are no multiple of its blocks of {width}" if inputs % width else None

    def outputs_misfit(self, outputs: Sequence[int], *, split: bool) -> str | None:
        return None

    def _divisor(self, weight: Tensor, cost: Tensor | None) -> Tensor:
        """The global scale, (…, 1, 1); one where there is none."""
        if cost is None:
            return self._plain_divisor(weight)
        first = self._room(weight)
        if not self._two_levels:
            return first
        rows = weight[..., :: max(1, weight.shape[-2] // GLOBAL_ROWS), :]
        blocks = cost_blocks(cost, weight, self.blocks.width)
        tried = torch.stack([first * 2.0**-step for step in GLOBAL_STEPS])
        errors = torch.stack([self.blocks.best(rows, blocks, one)[1].sum((-2, -1)) for one in tried])
        best = errors.argmin(0)  # (…)
        return torch.gather(tried, 0, best.view(1, *first.shape)).squeeze(0)

    def _plain_divisor(self, weight: Tensor) -> Tensor:
        """The one under which the largest block's scale is the largest FP8 number; one of a tensor of zeros."""
        largest = _largest(weight)
        if not self._two_levels:
            return torch.ones_like(largest)
        whole = FP8_SCALES.highest * self.blocks.numbers.highest / largest.clamp(min=SMALLEST)
        return torch.where(largest == 0, 1.0, whole)

    def _room(self, weight: Tensor) -> Tensor:
        """The largest power of two under which the block of the largest weight may end at 4."""
        largest = _largest(weight)
        if not self._two_levels:
            return torch.ones_like(largest)
        power = torch.floor(torch.log2(ROOM / largest.clamp(min=SMALLEST))).exp2()
        return torch.where(largest == 0, 1.0, power)

    def _plain(self, weight: Tensor, divisor: Tensor) -> Tensor:
        """The scales of the formats' plain rule, (…, out, groups)."""
        widest = self.blocks.split(weight).abs().amax(-1)
        if not self._two_levels:
            return power_of_two_for(widest, self.blocks.numbers)
        scale = (widest / self.blocks.numbers.highest * divisor).clamp(max=FP8_SCALES.highest)
        stored = scale.to(FP8_SCALES.dtype).float()
        return torch.where(stored == 0, EMPTY_SCALE, stored)

    def _params(self, scale: Tensor, divisor: Tensor) -> Params:
        if not self._two_levels:
            return {"scale": scale}
        return {"scale": scale, "divisor": divisor.expand(*scale.shape[:-1], 1).contiguous()}


def _largest(weight: Tensor) -> Tensor:
    """The largest magnitude of each weight, (…, 1, 1)."""
    return weight.abs().amax((-2, -1), keepdim=True)


def _divisor_of(params: Params) -> Tensor:
    """(…, out, 1), or one."""
    return params["divisor"] if "divisor" in params else torch.ones(1, 1, device=params["scale"].device)


def _preset(name: str, numbers: Grid, width: int, *, rounds: bool) -> Preset:
    family = name.removesuffix("A16")
    scales = FP8_SCALES if family == "NVFP4" else POWERS_OF_TWO
    inputs = BlockInputs(numbers, static=family == "NVFP4", width=width) if rounds else None
    scheme = FloatBlocks(name, family, Blocks(numbers, scales, width), inputs)

    def make(group_size: GroupSize) -> FloatBlocks:
        return scheme

    return Preset(name, make, width, fixed_size=True)


PRESETS = (
    _preset("NVFP4", FP4, 16, rounds=True),
    _preset("NVFP4A16", FP4, 16, rounds=False),
    _preset("MXFP4", FP4, 32, rounds=True),
    _preset("MXFP4A16", FP4, 32, rounds=False),
    _preset("MXFP8", FP8, 32, rounds=True),
)
