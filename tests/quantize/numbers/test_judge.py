"""The judge of the comparison with other quantizers unpacks every format."""

import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.quantize.older_formats import random_linear

from lowbit_quantize.export import autoawq, autogptq
from lowbit_quantize.schemes.scheme import Quantized

FOLDER = Path(__file__).resolve().parents[3] / "benchmarks" / "quantizers"
PACK: dict[str, Callable[[Quantized], dict[str, torch.Tensor]]] = {
    "compressed-tensors": Quantized.tensors,
    "autoawq": autoawq.pack,
    "autogptq": autogptq.pack,
}
unpacked: Callable[..., torch.Tensor] = runpy.run_path(str(FOLDER / "dequantize.py"))["unpacked"]
CONFIGURATION: dict[str, dict[str, Any]] = {
    "compressed-tensors": {"quant_method": "compressed-tensors"},
    "autoawq": {"quant_method": "awq", "bits": 4},
    "autogptq": {"quant_method": "gptq", "bits": 4},
}


@pytest.mark.parametrize(
    ("name", "symmetric"),
    [
        ("compressed-tensors", True),
        ("compressed-tensors", False),
        ("autoawq", True),
        ("autoawq", False),
        ("autogptq", True),
    ],
)
def test_the_judge_unpacks_every_format_to_the_weights_that_were_packed(name: str, symmetric: bool) -> None:
    linear = random_linear(4, 64, symmetric=symmetric)
    weight = unpacked(PACK[name](linear), CONFIGURATION[name])
    assert torch.equal(weight, linear.dequantize())


def test_the_judge_follows_an_activation_order_and_both_layouts_of_zero_points() -> None:
    linear = random_linear(4, 64, symmetric=True)
    packed = autogptq.pack(linear)
    packed["g_idx"] = packed["g_idx"].flip(0)
    scale = linear.params["scale"].flip(1).repeat_interleave(64, dim=1)  # (out, in)
    assert torch.equal(unpacked(packed, CONFIGURATION["autogptq"]), linear.codes * scale)
    packed["qzeros"] = torch.full_like(packed["qzeros"], -0x77777778)  # eight fields of 8
    newer = {**CONFIGURATION["autogptq"], "checkpoint_format": "gptq_v2"}
    assert torch.equal(unpacked(packed, newer), linear.codes * scale)
