"""A model whose linears round what they read as vLLM's kernels do, by what a checkpoint's configuration says.

compressed-tensors' schemes with `input_activations` of eight bits, by token or group, with the scale of its largest
number (dynamic), or by one stored scale (static); and of floats in blocks: sixteen 4-bit ones under an FP8 scale and
one stored scale (NVFP4), thirty-two under a power of two (MXFP4, MXFP8). Rounded is in float32, so that kernels play
no part.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

LARGEST = {"int": 127.0, "float": 448.0}
SMALLEST_SCALE = {"int": 0.0, "float": 1 / (448.0 * 512.0)}  # of a token
Round = Callable[[torch.Tensor], torch.Tensor]


def round_inputs(model: torch.nn.Module, checkpoint: Path) -> None:
    """Let each linear that the checkpoint gives a scheme with rounded inputs round them."""
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    quantization = config.get("quantization_config", {})
    groups = [
        group for group in quantization.get("config_groups", {}).values() if group.get("input_activations")
    ]
    if not groups:
        return
    scales = stored_scales(checkpoint)
    for name, module in model.named_modules():
        if not isinstance(module, torch.nn.Linear) or targeted(name, quantization.get("ignore") or []):
            continue
        group = next((group for group in groups if targeted(name, group["targets"])), None)
        if group is not None:
            rounding = rounded(group["input_activations"], scales.get(name))
            module.register_forward_pre_hook(lambda _, inputs, rounding=rounding: (rounding(inputs[0]),))


def stored_scales(checkpoint: Path) -> dict[str, float]:
    """The static scale of each linear that has one."""
    found = {}
    for path in sorted(checkpoint.glob("*.safetensors")):
        for name, tensor in load_file(path).items():
            if name.endswith((".input_scale", ".input_global_scale")):
                found[name.rpartition(".")[0]] = float(tensor)
    return found


def targeted(name: str, targets: list[str]) -> bool:
    """Whether a list of names, patterns and types has a linear."""
    return any(
        re.match(target.removeprefix("re:"), name) if target.startswith("re:") else target in (name, "Linear")
        for target in targets
    )


def rounded(inputs: dict[str, Any], static: float | None) -> Round:
    """What is computed with in place of inputs (..., features)."""
    if inputs["strategy"] == "tensor_group" or inputs.get("scale_dtype") is not None:  # FP8, or powers of two
        return rounded_in_blocks(inputs, static)
    kind, largest = inputs["type"], LARGEST[inputs["type"]]
    if inputs["num_bits"] != 8 or not inputs["symmetric"] or (static is None) != bool(inputs["dynamic"]):
        raise SystemExit(f"inputs rounded so are not known here: {inputs}")

    def apply(x: torch.Tensor) -> torch.Tensor:
        if inputs["strategy"] == "group":
            groups = x.unflatten(-1, (-1, inputs["group_size"]))
            scale = groups.abs().amax(-1, keepdim=True).clamp_min(1e-10) / largest
            return (
                (groups / scale).clamp(-largest, largest).to(torch.float8_e4m3fn).float() * scale
            ).flatten(-2)
        if static is None:
            scale = (x.abs().amax(-1, keepdim=True) / largest).clamp_min(SMALLEST_SCALE[kind])
            scale = torch.where(scale == 0, 1.0, scale)
        else:
            scale = torch.tensor(static)
        codes = (x / scale).clamp(-largest, largest)
        codes = codes.round() if kind == "int" else codes.to(torch.float8_e4m3fn).float()
        return codes * scale

    return apply


def rounded_in_blocks(inputs: dict[str, Any], global_scale: float | None) -> Round:
    """The same where a block of channels of a token has a scale: FP8 under a global one, or a power of two."""
    largest, top = (6.0, 2) if inputs["num_bits"] == 4 else (448.0, 8)

    def apply(x: torch.Tensor) -> torch.Tensor:
        blocks = x.unflatten(-1, (-1, inputs["group_size"]))
        absmax = blocks.abs().amax(-1, keepdim=True)
        if inputs["strategy"] == "tensor_group":
            assert global_scale is not None, "no input_global_scale is stored"
            scale = (absmax / largest * global_scale).clamp_max(448.0).to(
                torch.float8_e4m3fn
            ).float() / global_scale
        else:
            exponent = torch.log2(
                absmax.clamp_min(2.0**-120) * 8 / 7
            ).floor()  # 7/8 of a power counts as the power
            fits = absmax <= largest * torch.exp2(exponent - 1 - top)
            scale = torch.exp2(exponent - fits.float() - top)
        codes = blocks / torch.where(scale == 0, 1.0, scale)
        codes = (
            four_bit_float(codes)
            if largest == 6.0
            else codes.clamp(-448, 448).to(torch.float8_e4m3fn).float()
        )
        return (codes * scale).flatten(-2)

    return apply


def four_bit_float(values: torch.Tensor) -> torch.Tensor:
    """The nearest of 0, 0.5, 1, 1.5, 2, 3, 4 and 6, of either sign; ties go to the even place."""
    magnitude = values.abs()
    steps = torch.where(magnitude < 2, 0.5, torch.where(magnitude < 4, 1.0, 2.0))
    return ((magnitude / steps).round() * steps).clamp_max(6.0) * values.sign()
