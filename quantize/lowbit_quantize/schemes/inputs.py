"""How engines round what a linear reads: by token, with a scale found then and there, or by one calibrated scale.

The arithmetic is vLLM's (0.32: `scaled_int8_quant`, `QuantFP8`): scale = absmax / highest in float32, codes = x times
the scale's reciprocal, to the nearest even. tests/contract holds both against the installed engine.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit_quantize.schemes.grids import Grid
from lowbit_quantize.schemes.kv_cache import choose_scale

SMALLEST_FP8_SCALE = 1 / (448.0 * 512.0)  # vLLM's


@dataclass(frozen=True)
class InputQuantizer:
    """Inputs on a grid; `static` ones have one scale that is stored, others one for each token."""

    grid: Grid
    static: bool = False

    @property
    def words(self) -> str:
        """What the manifest says of it."""
        return f"{self.grid.name} by {'one calibrated scale' if self.static else 'token'}"

    def calibrated(self, absmax: Tensor, rows: Tensor) -> float | None:
        """A static one's scale, for inputs of these largest magnitudes, (features,), of which `rows` are some."""
        return choose_scale(absmax, rows)[0] if self.static else None

    def encode(self, inputs: Tensor, scale: float | None = None) -> tuple[Tensor, Tensor]:
        """Codes, float32, of inputs (tokens, features) and their scales, (tokens, 1); `scale` is a static one's."""
        wide = inputs.float()
        if self.static:
            assert scale is not None, "a static quantizer has a scale"
            scales = torch.full((len(wide), 1), scale, device=wide.device)
        else:
            scales = wide.abs().amax(-1, keepdim=True) / self.grid.highest
            if self.grid.name == "fp8":
                scales.clamp_(min=SMALLEST_FP8_SCALE)
        reciprocal = torch.where(scales == 0, 0.0, scales.reciprocal())
        codes = wide.mul_(reciprocal) if wide is not inputs else wide * reciprocal
        return self.grid.nearest_(codes), scales

    def round(self, inputs: Tensor, scale: float | None = None) -> Tensor:
        """What engines compute with, float32, in place of inputs (tokens, features)."""
        codes, scales = self.encode(inputs, scale)
        return codes.mul_(scales)
