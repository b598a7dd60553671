"""What a scheme is: a class of numbers that weights are stored in. Methods call one and know nothing of its numbers.

A scheme has parameters for each group of inputs of each row (scales, zero points), found by `search`; `quantize`
gives the nearest codes under them. Whatever `dequantize` gives is what engines compute with: parameters are held at
the precision that they are stored in, so that what is measured is what is served.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from lowbit_quantize.schemes.inputs import InputQuantizer

Params = Mapping[str, Tensor]  # each (out, groups)
Kernel = Literal["gpu", "cpu"]
KERNELS: tuple[Kernel, ...] = ("gpu", "cpu")
GroupSize = int | Literal["channel"]
SAMPLE_NUMBERS = 16

# Of columns, (n, rows) each: writes the codes nearest to the first into the third, and what these leave of the second
# into the fourth.
QuantizeColumn = Callable[[Tensor, Tensor, Tensor, Tensor], None]


class Scheme(Protocol):
    """A class of numbers; `name` is compressed-tensors' preset, `group_size` None where a row is one group.

    `search`, `quantize`, `dequantize` and `refine` take a weight (out, in), or several of one shape at once,
    (n, out, in), with parameters (n, out, groups) and Hessians (n, in, in).

    `format` is compressed-tensors' name of how codes lie in the file, `code_dtype` how they lie in memory;
    `input_quantizer` says how engines round the inputs before they multiply, None where they do not; what they then
    multiply, `factors` gives.
    """

    @property
    def name(self) -> str: ...
    @property
    def bits(self) -> float: ...
    @property
    def group_size(self) -> int | None: ...
    @property
    def symmetric(self) -> bool: ...
    @property
    def format(self) -> str: ...
    @property
    def code_dtype(self) -> torch.dtype: ...
    @property
    def input_quantizer(self) -> InputQuantizer | None: ...

    def width(self, features: int) -> int:
        """Inputs in a group of a weight with so many inputs."""
        ...

    def search(self, weight: Tensor, hessian: Tensor | None) -> Params:
        """Parameters for a weight (out, in): from its range, or those that err least where `hessian` is given.

        `hessian` is (in, in), or a diagonal in its place, (in,).
        """
        ...

    def quantize(self, weight: Tensor, params: Params) -> Tensor:
        """The nearest codes of a weight (out, in)."""
        ...

    def dequantize(self, codes: Tensor, params: Params) -> Tensor:
        """What engines compute with, (out, in) float32."""
        ...

    def factors(self, codes: Tensor, params: Params) -> tuple[Tensor, Tensor]:
        """What kernels that round inputs multiply: numbers (out, in), and what sums are multiplied by, (out, 1).

        Or what the sums of each group are, (out, groups). The numbers are bfloat16 where it holds them exactly, and
        float32 elsewhere. Not asked of weights only.
        """
        ...

    def columns(self, params: Params, groups: Tensor) -> Callable[[slice], Sequence[QuantizeColumn]]:
        """What quantizes columns of n weights one by one; `groups`, (n, columns), names the group of each.

        `params` are (n, rows, groups). Called with a slice of the columns it gives a function for each.
        """
        ...

    def refine(self, codes: Tensor, params: Params, weight: Tensor, hessian: Tensor) -> Params:
        """Parameters that err less, or as little, for codes that are fixed: `weight` (out, in), `hessian` (in, in)."""
        ...

    def trial_error(self, weight: Tensor, blocks: Tensor) -> float:
        """About the error that `search` would leave on some rows, (rows, in), for comparing scales of the inputs.

        `blocks` are the Hessian's blocks on the diagonal, (groups, width, width), or their diagonals, (groups, width).
        """
        ...

    def tensors(self, codes: Tensor, params: Params) -> dict[str, Tensor]:
        """What the file holds of a linear, by the last part of each name."""
        ...

    def read(self, tensors: Mapping[str, Tensor]) -> "Quantized":
        """The inverse of `tensors`."""
        ...

    def bytes(self, outputs: int, inputs: int) -> tuple[int, int]:
        """Bytes and number of the tensors of a linear."""
        ...

    def quantization_args(self) -> Mapping[str, Any]:
        """Fields of compressed-tensors' QuantizationScheme but its targets: `weights`, `input_activations`."""
        ...

    def obstacles(self, kernel: Kernel) -> list[str]:
        """Why vLLM's kernels of a kind do not take these numbers whatever the shape; empty where one does."""
        ...

    def multiple(self, kernel: Kernel) -> int:
        """What the inputs and outputs of a linear must be multiples of on each rank."""
        ...

    @property
    def cpu_kernels(self) -> Sequence[str]:
        """vLLM's classes that compute such linears on CPUs."""
        ...

    @property
    def gpus(self) -> str:
        """Which GPUs vLLM has a kernel for, for a person."""
        ...

    @property
    def experts(self) -> "ExpertSupport":
        """What engines and readers make of routed experts in these numbers."""
        ...

    def expert_obstacles(self, kernel: Kernel, hidden: int, middle: int) -> list[str]:
        """Why vLLM's kernels of a kind take no routed experts with so many channels on a rank."""
        ...

    def misfit(self, inputs: int) -> str | None:
        """Why a linear with so many inputs cannot be stored so; None where it can."""
        ...

    def outputs_misfit(self, outputs: Sequence[int], *, split: bool) -> str | None:
        """Why linears of so many outputs each cannot be one matrix in engines; None where they can.

        `split`: these are a rank's parts of them.
        """
        ...


@dataclass(frozen=True)
class ExpertSupport:
    """Routed experts in a scheme: where vLLM runs them (`processors`), for a person.

    `misfit` is why it runs them nowhere as they are measured, None where it does. `opened`: plain transformers opens
    them.
    """

    processors: str
    misfit: str | None = None
    opened: bool = True


@dataclass(frozen=True)
class Quantized:
    """A quantized weight: codes (out, in), parameters (out, groups) each, and the scheme that they belong to.

    Or several of one shape, (n, out, in) and (n, out, groups), until they are `split`.
    `input_scale` is the scale of its inputs, where the scheme has a calibrated one.
    """

    codes: Tensor
    params: Params
    scheme: Scheme
    input_scale: float | None = None

    def split(self) -> "list[Quantized]":
        """Each of several by itself."""
        return [
            Quantized(codes, {name: values[place] for name, values in self.params.items()}, self.scheme)
            for place, codes in enumerate(self.codes)
        ]

    def dequantize(self) -> Tensor:
        """The weight that is served, (out, in), float32."""
        return self.scheme.dequantize(self.codes, self.params)

    def rows(self, start: int, stop: int) -> "Quantized":
        """A part of the outputs."""
        params = {name: values[start:stop] for name, values in self.params.items()}
        return Quantized(self.codes[start:stop], params, self.scheme, self.input_scale)

    def sample(self) -> list[float]:
        """`sample_of` its weight, of which no more than some rows are dequantized."""
        width = self.codes.shape[1]
        places = range(self.codes.numel())[:: sample_step(self.codes.numel())][:SAMPLE_NUMBERS]
        return [float(self.rows(p // width, p // width + 1).dequantize()[0, p % width]) for p in places]

    def tensors(self) -> dict[str, Tensor]:
        """What the file holds."""
        tensors, quantizer = self.scheme.tensors(self.codes, self.params), self.scheme.input_quantizer
        if self.input_scale is not None and quantizer is not None:
            tensors[quantizer.stored_as] = torch.tensor([self.input_scale], dtype=torch.float32)
        return tensors

    def factors(self) -> tuple[Tensor, Tensor]:
        """What kernels that round inputs multiply (`Scheme.factors`)."""
        return self.scheme.factors(self.codes, self.params)


@dataclass(frozen=True)
class Preset:
    """A row of the table of schemes: its name, the scheme it makes for a group size, and the size it has by itself.

    `fixed_size`: it has no other, because it is stored so.
    """

    name: str
    make: Callable[[GroupSize], Scheme]
    group_size: GroupSize
    fixed_size: bool = False


def sample_of(weight: Tensor) -> list[float]:
    """Some numbers of a weight, spread over it, by which what is read back is held against what was measured."""
    flat = weight.flatten()
    return [float(number) for number in flat[:: sample_step(len(flat))][:SAMPLE_NUMBERS]]


def sample_step(numbers: int) -> int:
    """Of every how many numbers one is in the sample: odd, so that they are not all of one column."""
    return max(1, numbers // SAMPLE_NUMBERS) | 1


def diagonal_blocks(hessian: Tensor, width: int) -> Tensor:
    """The (groups, width, width) blocks on the diagonal of each matrix; of one diagonal, its parts, (groups, width)."""
    count = hessian.shape[-1] // width
    if hessian.dim() == 1:
        return hessian.view(count, width)
    tiles = hessian.unflatten(-1, (count, width)).unflatten(-3, (count, width))
    return torch.stack([tiles[..., group, :, group, :] for group in range(count)], dim=-3)


def cost_blocks(cost: Tensor, weight: Tensor, width: int) -> Tensor:
    """`diagonal_blocks` of Hessians (…, in, in) of weights (…, out, in), or the parts of diagonals (…, in)."""
    return cost.unflatten(-1, (-1, width)) if cost.dim() < weight.dim() else diagonal_blocks(cost, width)


def take_rows(stack: Tensor, places: Tensor) -> Tensor:
    """Rows of each matrix of (n, rows, columns), by the places (n, taken): (n, taken, columns)."""
    return torch.stack([matrix[rows] for matrix, rows in zip(stack, places, strict=True)])
