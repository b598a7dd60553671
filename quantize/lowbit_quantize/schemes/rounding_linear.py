"""A linear that computes what an engine with 8-bit kernels does: inputs rounded, codes times codes, scales after."""

import torch
from torch import Tensor, nn

from lowbit_quantize.device.precision import exact_products, int8_product, multiplies_int8
from lowbit_quantize.schemes.inputs import InputQuantizer


class RoundingLinear(nn.Linear):
    """Stands where a linear was; `weight` holds the codes, which bfloat16 and float16 hold exactly.

    Sums of int8 are exact where the processor multiplies it, as in vLLM's CPU kernel, and else float32, which may
    differ in the last digit.
    """

    def __init__(
        self,
        linear: nn.Linear,
        codes: Tensor,
        scale: Tensor,
        quantizer: InputQuantizer,
        input_scale: float | None,
    ) -> None:
        """`codes` (out, in) and their `scale` (out, 1) take the place of the linear's weight; its bias stays."""
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        self.weight = nn.Parameter(codes, requires_grad=False)
        self.bias = linear.bias
        self._scale, self._quantizer, self._input_scale = scale.T, quantizer, input_scale
        integers = quantizer.grid.name == "int8" and multiplies_int8(codes.device)
        self._integers = codes.to(torch.int8) if integers else None

    def forward(self, inputs: Tensor) -> Tensor:
        rows = inputs.reshape(-1, inputs.shape[-1])
        codes, scales = self._quantizer.encode(rows, self._input_scale)
        if self._integers is not None:
            output = int8_product(codes.to(torch.int8), self._integers)
        else:
            with exact_products(self.weight.dtype):
                output = codes @ self.weight.float().T
        output.mul_(scales).mul_(self._scale)
        if self.bias is not None:
            output += self.bias.float()
        return output.to(inputs.dtype).view(*inputs.shape[:-1], -1)
