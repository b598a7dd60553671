"""The judge of the comparison with other quantizers unpacks every format."""

import json
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tests.quantize.older_formats import random_linear

from lowbit_quantize.catalog import CATALOG
from lowbit_quantize.export import autoawq, autogptq
from lowbit_quantize.methods.rtn import RoundToNearest
from lowbit_quantize.schemes.scheme import Quantized, Scheme

FOLDER = Path(__file__).resolve().parents[3] / "benchmarks" / "quantizers"
PACK: dict[str, Callable[[Quantized], dict[str, torch.Tensor]]] = {
    "compressed-tensors": Quantized.tensors,
    "autoawq": autoawq.pack,
    "autogptq": autogptq.pack,
}
unpacked: Callable[..., torch.Tensor] = runpy.run_path(str(FOLDER / "dequantize.py"))["unpacked"]
dequantized: Callable[..., dict[str, torch.Tensor]] = runpy.run_path(str(FOLDER / "dequantize.py"))[
    "dequantized"
]
rounded: Callable[..., Any] = runpy.run_path(str(FOLDER / "rounded_inputs.py"))["rounded"]
SCHEMES = {preset.name: preset.make(preset.group_size) for preset in CATALOG.presets}
ROUNDING = {name: scheme for name, scheme in SCHEMES.items() if scheme.input_quantizer}
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


def numbers(rows: int, columns: int) -> torch.Tensor:
    spread = torch.logspace(-1, 1, rows).unsqueeze(1) * torch.logspace(-1, 1, columns)
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows)) * spread


@pytest.mark.parametrize("rows", [256, 192])
@pytest.mark.parametrize("name", SCHEMES)
def test_the_judge_reads_every_scheme_from_the_file(name: str, rows: int, tmp_path: Path) -> None:
    linear = RoundToNearest().quantize(numbers(rows, 256), torch.eye(256), SCHEMES[name])
    save_file(
        {f"one.{part}": tensor for part, tensor in linear.tensors().items()}, tmp_path / "a.safetensors"
    )
    quantization = {"quantization_config": {"quant_method": "compressed-tensors"}}
    (tmp_path / "config.json").write_text(json.dumps(quantization))
    (found,) = dequantized(tmp_path).values()
    assert torch.allclose(found, linear.dequantize(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("scheme", ROUNDING.values(), ids=ROUNDING)
def test_the_judge_rounds_inputs_of_every_scheme_by_its_configuration(scheme: Scheme) -> None:
    inputs, quantizer = numbers(64, 256), scheme.input_quantizer
    assert quantizer is not None
    static = quantizer.calibrated(inputs.abs().amax(0), inputs)
    said = json.loads(scheme.quantization_args()["input_activations"].model_dump_json())
    ours, theirs = quantizer.round(inputs.clone(), static), rounded(said, static)(inputs)
    loss = (ours - inputs).norm()
    assert loss > 0
    assert (ours - theirs).norm() < 0.1 * loss  # ties that a reciprocal moves
