"""The head, where a rule names it: quantized as the walk's last step, on what the last layer really gives.

It is one linear behind the final norm, and its weight is the largest of many models: blocks of rows are widened to
float32, quantized and packed in turn, by one Hessian. Rows do not meet in any method, so that blocks change nothing.
An AWQ scale folds into the final norm, unless something that is carried over beside the model may read that as well.
There is nothing behind the head that a weight aimed at earlier errors would help: its target is its own weight.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lowbit_quantize.device.factors import divided
from lowbit_quantize.device.precision import exact_products
from lowbit_quantize.methods.method import InputScale, Site, SitePart
from lowbit_quantize.model.decoder import BATCH_TOKENS
from lowbit_quantize.model.folds import divide_norm
from lowbit_quantize.schemes.scheme import Quantized
from lowbit_quantize.statistics.hessian import Hessian, output_error
from lowbit_quantize.walk.module_plan import ModulePlan

BLOCK_BYTES = 256 << 20  # of a block of rows in float32
ROW_MULTIPLE = 32  # of a block, so that zero points are packed in whole words
SCALED_ROWS = 4096  # that the scale of the inputs is searched on


@dataclass(frozen=True)
class QuantizedHead:
    """What is stored of the head, by the last parts of names, and what engines compute with, (vocabulary, hidden).

    `sample` has some numbers of the weight as they are in float32.
    """

    tensors: dict[str, Tensor]
    weight: Tensor
    alpha: float | None
    error: float
    sample: list[float]


def quantize_head(
    norm: nn.Module,
    weight: Tensor,
    entry: ModulePlan,
    states: Tensor,
    offset: float,
    *,
    fold: bool,
    block_bytes: int = BLOCK_BYTES,
) -> QuantizedHead:
    """Quantize the output matrix, (vocabulary, hidden), for `states`, (sequences, tokens, hidden), before the norm.

    With `fold` the norm, whose weight lies `offset` below what it multiplies by, may be divided in place.
    """
    hessian = _hessian(norm, states, weight)
    folded = _fold(norm, weight, entry, hessian, offset) if fold else None
    if folded is not None:
        hessian = divided(hessian, folded.scale)
    codes, served, errors, powers = [], torch.empty_like(weight), 0.0, 0.0
    for rows in _blocks(weight, block_bytes):
        target = weight[rows].float() * (1.0 if folded is None else folded.scale)
        found = entry.quantized(target, hessian)
        wide = found.dequantize()
        with exact_products(torch.bfloat16):  # not exact here: three digits are enough for a report
            errors += float(output_error(target - wide, hessian))
            powers += float(output_error(target, hessian))
        served[rows] = wide.to(weight.dtype)
        codes.append(found)
    alpha = folded.alpha if folded else None
    whole = _joined(codes)
    return QuantizedHead(whole.tensors(), served, alpha, errors / max(powers, 1e-30), whole.sample())


def _hessian(norm: nn.Module, states: Tensor, weight: Tensor) -> Tensor:
    """Of what the head reads."""
    hessian = Hessian(weight.shape[1], weight.device)
    for batch in states.split(max(1, BATCH_TOKENS // states.shape[1])):
        with torch.no_grad():
            hessian.add(norm(batch.to(weight.device)).flatten(0, 1))
    return hessian.matrix()


def _fold(norm: Any, weight: Tensor, entry: ModulePlan, hessian: Tensor, offset: float) -> InputScale | None:
    """Divide the norm by a scale for each method that has one; returns their product."""
    rows = weight[:: max(1, -(-len(weight) // SCALED_ROWS))].float()
    folded: InputScale | None = None
    for method in entry.input_scalers:
        before = torch.ones_like(hessian[0]) if folded is None else folded.scale
        cost = entry.quantizer.cost(divided(hessian, before))
        choice = method.input_scale(Site([SitePart(rows * before, entry.scheme, cost)]))
        if choice is not None:
            folded = InputScale(before * divide_norm(norm, choice.scale, offset), choice.alpha)
    return folded


def _blocks(weight: Tensor, block_bytes: int) -> Iterator[slice]:
    """Slices of rows, of about so many bytes in float32."""
    step = max(1, block_bytes // (4 * weight.shape[1] * ROW_MULTIPLE)) * ROW_MULTIPLE
    for start in range(0, len(weight), step):
        yield slice(start, start + step)


def _joined(blocks: list[Quantized]) -> Quantized:
    """All rows as one weight."""
    params = {name: torch.cat([one.params[name] for one in blocks]) for name in blocks[0].params}
    return Quantized(torch.cat([one.codes for one in blocks]), params, blocks[0].scheme)
