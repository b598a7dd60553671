"""A linear that computes what engines do whose kernels round inputs: small numbers times small ones, scales after."""

from functools import reduce

import torch
from torch import Tensor, nn

from lowbit_quantize.device.precision import exact_products, int8_product, multiplies_int8
from lowbit_quantize.schemes.inputs import InputQuantizer


class RoundingLinear(nn.Linear):
    """Stands where a linear was; `weight` holds what kernels multiply, as `Scheme.factors` gives it.

    Sums of int8 codes are exact where the processor multiplies it, as in vLLM's CPU kernel, and else float32, which may
    differ in the last digit.
    """

    def __init__(
        self,
        linear: nn.Linear,
        weight: Tensor,
        scale: Tensor,
        quantizer: InputQuantizer,
        input_scale: float | None,
    ) -> None:
        """`weight` (out, in) and its `scale` (out, groups) take the place of the linear's weight; its bias stays.

        A weight in bfloat16 or float16 is exact, and of codes where inputs are int8; one in float32 has more digits.
        """
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = linear.bias
        self._scale, self._quantizer, self._input_scale = scale.T, quantizer, input_scale
        integers = quantizer.grid.name == "int8" and weight.dtype != torch.float32
        multiplied = integers and multiplies_int8(weight.device)
        self._integers = weight.to(torch.int8) if multiplied else None

    def forward(self, inputs: Tensor) -> Tensor:
        rows = inputs.reshape(-1, inputs.shape[-1])
        codes, scales = self._quantizer.encode(rows, self._input_scale)
        output = self._product(codes, scales)
        if self.bias is not None:
            output += self.bias.float()
        return output.to(inputs.dtype).view(*inputs.shape[:-1], self.out_features)

    def _product(self, codes: Tensor, scales: Tensor) -> Tensor:
        """Of codes (tokens, in) and the weight's, (tokens, out); each group's sum is scaled before they are added."""
        groups = max(len(self._scale), scales.shape[1])
        if self._integers is not None and groups == 1:
            output: Tensor = int8_product(codes.to(torch.int8), self._integers).mul_(scales).mul_(self._scale)
            return output
        width = codes.shape[1] // groups
        of_inputs, of_weight = scales.expand(-1, groups).unbind(1), self._scale.expand(groups, -1)
        columns = zip(codes.split(width, 1), self.weight.split(width, 1), of_inputs, of_weight, strict=True)
        with exact_products(self.weight.dtype):
            sums = ((x @ w.float().T).mul_(a.unsqueeze(1)).mul_(b) for x, w, a, b in columns)
            total: Tensor = reduce(Tensor.add_, sums)
        return total
