"""FP8 in blocks, compressed-tensors' FP8_BLOCK: 128 x 128 weights share a scale, inputs are rounded in groups of 128.

DeepSeek-AI 2024, arXiv 2412.19437, section 3.3. The files hold codes as they are, in `weight`, and a bfloat16 scale of
each block in `weight_scale`, (ceil(out / 128), ceil(in / 128)), as llm-compressor writes them. Kernels add up each
block's products of codes and multiply the sum by both scales.

Outputs need not fill their last block; inputs must, because engines round no part of a group. Linears that engines make
one matrix of are quantized as one: all but the last of them must fill their blocks, or a block would lie in two.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from lowbit_quantize.device import ranks
from lowbit_quantize.device.blocks import solve_rows
from lowbit_quantize.device.memory import without_compiler
from lowbit_quantize.schemes.inputs import GroupInputs
from lowbit_quantize.schemes.numbers.grids import FP8
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

with without_compiler():  # the library compiles a function for 4-bit floats, which is not called here
    from compressed_tensors.quantization.quant_scheme import PRESET_SCHEMES

BLOCK = 128  # rows and columns
SCALE_DTYPE = torch.bfloat16
CLIPS = tuple(2 ** (-step / 8) for step in range(9))  # an octave: a float grid repeats after it
RIDGE = 1e-4  # pull of `refine` towards the scales it starts from, relative to the mean of its diagonal
CPU_MULTIPLE = 32  # of outputs (`CPUFp8BlockScaledMMKernel`)


@dataclass(frozen=True)
class BlockFP8:
    """`w = scale · code`; the parameter `scale` is (out, groups), the same for all rows of a block."""

    name = "FP8_BLOCK"
    bits = 8
    group_size = BLOCK
    symmetric = True
    format = "float-quantized"
    code_dtype = torch.bfloat16  # few operations take float8
    input_quantizer = GroupInputs(FP8, width=BLOCK)

    def width(self, features: int) -> int:
        return BLOCK

    def search(self, weight: Tensor, hessian: Tensor | None) -> Params:
        groups = _groups(weight)
        widest = _stored(_by_block(groups.abs().amax(-1), torch.amax) / FP8.highest)  # (…, blocks, groups)
        if hessian is None:
            return {"scale": _by_row(widest, weight)}
        cost = hessian if hessian.dim() < weight.dim() else hessian.diagonal(dim1=-2, dim2=-1)
        blocks = cost.unflatten(-1, (-1, BLOCK))  # (…, groups, width)
        scales = torch.stack([_stored(widest * clip) for clip in CLIPS])
        errors = torch.stack(
            [_by_block(_errors(groups, _by_row(one, weight), blocks), torch.sum) for one in scales]
        )
        best = scales.gather(0, errors.argmin(0, keepdim=True)).squeeze(0)
        return {"scale": _by_row(best, weight)}

    def quantize(self, weight: Tensor, params: Params) -> Tensor:
        return FP8.nearest_(_groups(weight) / params["scale"].unsqueeze(-1)).flatten(-2).to(self.code_dtype)

    def dequantize(self, codes: Tensor, params: Params) -> Tensor:
        weight: Tensor = (_groups(codes).float() * params["scale"].unsqueeze(-1)).flatten(-2)
        return weight

    def factors(self, codes: Tensor, params: Params) -> tuple[Tensor, Tensor]:
        return codes, params["scale"]

    def columns(self, params: Params, groups: Tensor) -> Callable[[slice], Sequence[QuantizeColumn]]:
        scale = take_rows(params["scale"].mT, groups)  # (n, columns, rows)
        return lambda block: [partial(_quantize_column, s) for s in scale[:, block].unbind(1)]

    def refine(self, codes: Tensor, params: Params, weight: Tensor, hessian: Tensor) -> Params:
        """The scales of each row of blocks that err least for these codes together; where none err less, the old ones.

        The error of a row is quadratic in the scales of its groups (`affine_search.solve_scales`), and so is the sum
        over the rows that share them.
        """
        rows = max(1, solve_rows(weight.device) // BLOCK) * BLOCK
        parts = zip(*(part.split(rows, dim=-2) for part in (codes, params["scale"], weight)), strict=True)
        solved = ranks.spread(lambda part: _solve(part, hessian), list(parts), weight.device)
        return {"scale": torch.cat(solved, dim=-2)}

    def trial_error(self, weight: Tensor, blocks: Tensor) -> float:
        cost = blocks if blocks.dim() == 2 else blocks.diagonal(dim1=-2, dim2=-1)
        return float(_errors(_groups(weight), self.search(weight, None)["scale"], cost).sum())

    def tensors(self, codes: Tensor, params: Params) -> dict[str, Tensor]:
        return {"weight": codes.to(FP8.dtype), "weight_scale": params["scale"][::BLOCK].to(SCALE_DTYPE)}

    def read(self, tensors: Mapping[str, Tensor]) -> Quantized:
        codes = tensors["weight"].to(self.code_dtype)
        return Quantized(codes, {"scale": _by_row(tensors["weight_scale"].float(), codes)}, self)

    def bytes(self, outputs: int, inputs: int) -> tuple[int, int]:
        return outputs * inputs + -(-outputs // BLOCK) * -(-inputs // BLOCK) * SCALE_DTYPE.itemsize, 2

    def quantization_args(self) -> Mapping[str, Any]:
        return {key: value for key, value in PRESET_SCHEMES[self.name].items() if key != "targets"}

    def obstacles(self, kernel: Kernel) -> list[str]:
        return []

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
        return ExpertSupport(EXPERTS[self.name].words, opened=False)

    def expert_obstacles(self, kernel: Kernel, hidden: int, middle: int) -> list[str]:
        if middle % BLOCK:
            return [f"experts need middle channels of {BLOCK}s on a rank, not {middle}"]
        return []

    def misfit(self, inputs: int) -> str | None:
        return f"engines round them in groups of {BLOCK}, and no part of one" if inputs % BLOCK else None

    def outputs_misfit(self, outputs: Sequence[int], *, split: bool) -> str | None:
        odd = [count for count in (outputs if split else outputs[:-1]) if count % BLOCK]
        return f"{odd[0]} outputs do not fill blocks of {BLOCK}" if odd else None


def _groups(weight: Tensor) -> Tensor:
    """(…, out, in) to (…, out, groups, width)."""
    groups: Tensor = weight.unflatten(-1, (-1, BLOCK))
    return groups


def _by_block(rows: Tensor, reduce: Callable[..., Tensor]) -> Tensor:
    """(…, out, groups) to (…, blocks, groups): what `reduce` makes of the rows of a block; a short one is filled up."""
    filled = pad(rows, (0, 0, 0, -rows.shape[-2] % BLOCK))
    return reduce(filled.unflatten(-2, (-1, BLOCK)), -2)


def _by_row(blocks: Tensor, weight: Tensor) -> Tensor:
    """(…, blocks, groups) to (…, out, groups) of a weight (…, out, in)."""
    rows = blocks.repeat_interleave(BLOCK, dim=-2)
    return rows[..., : weight.shape[-2], :].contiguous()


def _stored(scale: Tensor) -> Tensor:
    """A scale as it will be read back, above zero."""
    scale = scale.to(SCALE_DTYPE).float()
    return torch.where(scale > 0, scale, 1.0)


def _errors(groups: Tensor, scale: Tensor, cost: Tensor) -> Tensor:
    """What rounding to the nearest costs each group of (…, out, groups, width), (…, out, groups)."""
    wide = scale.unsqueeze(-1)
    off = FP8.nearest_(groups / wide).mul_(wide).sub_(groups)
    return (off.square_() * cost.unsqueeze(-3)).sum(-1)


def _quantize_column(scale: Tensor, aim: Tensor, column: Tensor, code: Tensor, left: Tensor) -> None:
    FP8.nearest_(torch.div(aim, scale, out=code))
    torch.addcmul(column, code, scale, value=-1, out=left)


def _solve(rows: tuple[Tensor, ...], hessian: Tensor) -> Tensor:
    """Scales of whole rows of blocks: A s = b, with A_gh = Σ q_g H q_hᵀ and b_g = Σ q_g H wᵀ over their rows."""
    codes, scale, weight = rows
    steps = _groups(codes).float()  # (…, rows, groups, width)
    count = steps.shape[-2]
    reaches = []
    for g in range(count):
        tile = hessian[..., g * BLOCK : (g + 1) * BLOCK, :]
        reach = (steps[..., g, :] @ tile).view_as(steps).mul_(steps).sum(-1)  # (…, rows, groups)
        reaches.append(_by_block(reach, torch.sum))
    quadratic = torch.stack(reaches, dim=-2)  # (…, blocks, groups, groups)
    slope = _by_block(((weight @ hessian).view_as(steps) * steps).sum(-1), torch.sum)  # (…, blocks, groups)
    before = scale[..., ::BLOCK, :]
    ridge = RIDGE * quadratic.diagonal(dim1=-2, dim2=-1).mean(-1, keepdim=True) + 1e-20
    system = quadratic + torch.diag_embed(ridge.expand_as(before))
    solved = _stored(torch.linalg.solve(system, slope + ridge * before))

    def relative_error(s: Tensor) -> Tensor:  # up to the constant Σ w H wᵀ
        error: Tensor = torch.einsum("...g,...gh,...h->...", s, quadratic, s) - 2 * (s * slope).sum(-1)
        return error

    better = (relative_error(solved) < relative_error(before)) & torch.isfinite(solved).all(-1)
    return _by_row(torch.where(better.unsqueeze(-1), solved, before), weight)


def _make(group_size: GroupSize) -> BlockFP8:
    return BlockFP8()


PRESETS = (Preset(BlockFP8.name, _make, BLOCK, fixed_size=True),)
