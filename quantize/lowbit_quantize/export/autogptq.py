"""AutoGPTQ's first format (`checkpoint_format: gptq`): 4 or 8 bits, packed along the inputs.

`w = scale · (code − zero)` with unsigned codes. What is stored of a zero point is one less than it is, and
readers add the one. Only symmetric linears are written: there the zero point is 2^(bits−1) everywhere. `g_idx`
names the group of each input; GPTQ's activation order here leaves groups where they are in memory, so it counts up.
Source: AutoGPTQ 0.7.1, auto_gptq/nn_modules/qlinear/qlinear_cuda_old.py.
"""

from pathlib import Path

import torch
from torch import Tensor

from lowbit_quantize.export.checkpoint import Checkpoint
from lowbit_quantize.export.exporter import Exported
from lowbit_quantize.export.older_format import obstacle, odd_outputs, repack, scheme_of
from lowbit_quantize.export.packing import pack_last
from lowbit_quantize.schemes.integer import Integer
from lowbit_quantize.schemes.scheme import Quantized

STORED_LESS = 1


class AutoGptq:
    """The target `autogptq`; AutoGPTQ itself reads the configuration from a file of its own."""

    name = "autogptq"
    one_file = False
    readers = "vLLM, SGLang, transformers (by GPTQModel), AutoGPTQ, OpenVINO, TensorRT-LLM"

    def supports(self, checkpoint: Checkpoint) -> str | None:
        if left := checkpoint.manifest.unquantized:
            return f"it cannot say that a linear stays as it is, and {left[0]} does"
        return obstacle(checkpoint, (4, 8), asymmetric=False) or odd_outputs(checkpoint)

    def write(self, checkpoint: Checkpoint, out: Path) -> Exported:
        scheme = scheme_of(checkpoint)
        quantization = {
            "quant_method": "gptq",
            "checkpoint_format": "gptq",
            "bits": scheme.bits,
            "group_size": scheme.group_size,
            "sym": True,
            "desc_act": False,
            "static_groups": True,
        }
        return repack(checkpoint, out, pack, quantization, "quantize_config.json")


def pack(quantized: Quantized) -> dict[str, Tensor]:
    """qweight (in · bits / 32, out), qzeros (groups, out · bits / 32), scales (groups, out) float16, g_idx (in,)."""
    scheme, params, inputs = quantized.scheme, quantized.params, quantized.codes.shape[1]
    assert isinstance(scheme, Integer)
    return {
        "qweight": pack_last(quantized.codes.int() - scheme.lowest, scheme.bits).T,
        "qzeros": pack_last(params["zero"].int().T - scheme.lowest - STORED_LESS, scheme.bits),
        "scales": params["scale"].T.to(torch.float16),
        "g_idx": torch.arange(inputs, dtype=torch.int32) // scheme.width(inputs),  # (in,)
    }
