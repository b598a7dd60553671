"""AutoAWQ's GEMM format: 4 bits, packed along the outputs in an interleaved order.

`w = scale · (code − zero)` with codes and zeros in [0, 15]. The format always has zero points; symmetric ones
are 8 everywhere. Scales are factors: nothing that reads the format asks for a sign (docs/checkpoint.md).
Source: AutoAWQ 0.2.9, awq/modules/linear/gemm.py and awq/utils/packing_utils.py.
"""

from pathlib import Path

import torch
from torch import Tensor

from lowbit_quantize.export.checkpoint import Checkpoint
from lowbit_quantize.export.exporter import Exported
from lowbit_quantize.export.older_format import HEAD, obstacle, odd_outputs, repack, scheme_of
from lowbit_quantize.export.packing import pack_last
from lowbit_quantize.schemes.integer import Integer
from lowbit_quantize.schemes.scheme import Quantized

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # which of eight outputs each field of a word holds, lowest bits first


class AutoAwq:
    """The target `autoawq`."""

    name = "autoawq"
    one_file = False
    readers = "vLLM, SGLang, transformers (by GPTQModel), AutoAWQ"

    def supports(self, checkpoint: Checkpoint) -> str | None:
        return obstacle(checkpoint, (4,), asymmetric=True) or odd_outputs(checkpoint)

    def write(self, checkpoint: Checkpoint, out: Path) -> Exported:
        scheme = scheme_of(checkpoint)
        return repack(
            checkpoint,
            out,
            pack,
            {
                "quant_method": "awq",
                "version": "gemm",
                "bits": scheme.bits,
                "group_size": scheme.group_size,
                "zero_point": True,
                "modules_to_not_convert": [HEAD, *checkpoint.manifest.unquantized],
            },
        )


def pack(quantized: Quantized) -> dict[str, Tensor]:
    """qweight (in, out / 8) int32, qzeros (groups, out / 8) int32, scales (groups, out) float16."""
    scheme, params = quantized.scheme, quantized.params
    assert isinstance(scheme, Integer)
    return {
        "qweight": pack_last(quantized.codes.int().T - scheme.lowest, scheme.bits, ORDER),
        "qzeros": pack_last(params["zero"].int().T - scheme.lowest, scheme.bits, ORDER),
        "scales": params["scale"].T.to(torch.float16),
    }
