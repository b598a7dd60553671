"""The numbers that the base computes in, 16 bits each, for linears that a method changes and nothing quantizes.

A rule has the scheme `none` and a method that sets weights to zero. Such a linear is stored as any other weight of the
base is, and `config.json` does not call it quantized: all readers open it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lowbit_quantize.schemes.scheme import ExpertSupport, Kernel, Params, QuantizeColumn, Quantized

NAMES = {torch.bfloat16: "BF16", torch.float16: "FP16"}
FORMAT = "dense"  # compressed-tensors' word for what is not compressed
ANYWHERE = "all that vLLM runs on, as dense weights"


@dataclass(frozen=True)
class Dense:
    """Codes are the numbers themselves, in `dtype`; there are no parameters."""

    dtype: torch.dtype

    bits = 16.0
    group_size = None
    symmetric = True
    format = FORMAT
    input_quantizer = None
    cpu_kernels: Sequence[str] = ()
    gpus = ANYWHERE
    experts = ExpertSupport(ANYWHERE)

    @property
    def name(self) -> str:
        return NAMES[self.dtype]

    @property
    def code_dtype(self) -> torch.dtype:
        return self.dtype

    def width(self, features: int) -> int:
        return features

    def search(self, weight: Tensor, hessian: Tensor | None) -> Params:
        return {}

    def quantize(self, weight: Tensor, params: Params) -> Tensor:
        return weight.to(self.dtype)

    def dequantize(self, codes: Tensor, params: Params) -> Tensor:
        return codes.float()

    def factors(self, codes: Tensor, params: Params) -> tuple[Tensor, Tensor]:
        return codes.float(), torch.ones(len(codes), 1, device=codes.device)

    def columns(self, params: Params, groups: Tensor) -> Callable[[slice], Sequence[QuantizeColumn]]:
        return lambda block: [partial(self._column)] * len(range(groups.shape[1])[block])

    def _column(self, aim: Tensor, column: Tensor, code: Tensor, left: Tensor) -> None:
        code.copy_(aim.to(self.dtype))
        torch.sub(column, code, out=left)

    def refine(self, codes: Tensor, params: Params, weight: Tensor, hessian: Tensor) -> Params:
        return params

    def trial_error(self, weight: Tensor, blocks: Tensor) -> float:
        return 0.0

    def tensors(self, codes: Tensor, params: Params) -> dict[str, Tensor]:
        return {"weight": codes.contiguous()}

    def read(self, tensors: Mapping[str, Tensor]) -> Quantized:
        return Quantized(tensors["weight"], {}, self)

    def bytes(self, outputs: int, inputs: int) -> tuple[int, int]:
        return outputs * inputs * self.dtype.itemsize, 1

    def quantization_args(self) -> Mapping[str, Any]:
        return {}

    def obstacles(self, kernel: Kernel) -> list[str]:
        return []

    def multiple(self, kernel: Kernel) -> int:
        return 1

    def expert_obstacles(self, kernel: Kernel, hidden: int, middle: int) -> list[str]:
        return []

    def misfit(self, inputs: int) -> str | None:
        return None

    def outputs_misfit(self, outputs: Sequence[int], *, split: bool) -> str | None:
        return None
