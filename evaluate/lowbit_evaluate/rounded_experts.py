"""Routed experts whose inputs engines round, in a model that transformers loads: they compute what engines compute.

transformers opens int8 experts and 4-bit floats not at all, and FP8 ones without rounding what they read. So it is
given them as plain weights, unpacked by compressed-tensors, and then a list of single experts with the codes takes
their place, where inputs are rounded. Static scales of inputs in FP8, which engines share between experts, are left to
transformers.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lowbit_evaluate.rounded_inputs import known_scheme, rounding_linear
from lowbit_quantize.model.architecture import Architecture
from lowbit_quantize.model.experts import unstack_experts
from lowbit_quantize.model.files.published_names import PublishedNames
from lowbit_quantize.model.files.unopened_experts import (
    READER,
    is_opened,
    parts_of,
    schemes_of,
    unpacked,
    without_linears,
)
from lowbit_quantize.model.weights import WeightFiles

EXPERT = re.compile(r"(?P<linear>.*\.experts\.\d+\.\w+)\.weight(_packed)?")


@dataclass(frozen=True)
class RoundedExperts:
    """Linears of a checkpoint's routed experts that transformers does not open as they are served, by published name.

    With each its group of compressed-tensors' configuration.
    """

    files: WeightFiles
    quantization: Mapping[str, Any]
    linears: Mapping[str, Any]

    @cached_property
    def plain(self) -> dict[str, Any]:
        """The configuration by which transformers reads them as plain weights."""
        return without_linears(self.quantization, self.linears.keys())

    def state(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Every tensor of the checkpoint, these linears unpacked."""
        others = (name for name in self.files if name.rpartition(".")[0] not in self.linears)
        state = {name: self.files.read(name) for name in others}
        for linear, scheme in self.linears.items():
            state[f"{linear}.weight"] = unpacked(self._parts(linear), scheme).to(dtype)
        return state

    def put_into(self, model: Any, architecture: Architecture, names: PublishedNames) -> None:
        """Take the place of a loaded model's stacked experts."""
        unstack_experts(model.get_submodule(architecture.layers))
        for name, linear in list(model.named_modules()):
            group = self.linears.get(names.published(name)) if architecture.in_experts(name) else None
            scheme = None if group is None else known_scheme(group)
            if isinstance(linear, nn.Linear) and scheme is not None:
                parts = self._parts(names.published(name))
                here = {part: tensor.to(model.device) for part, tensor in parts.items()}
                model.set_submodule(name, rounding_linear(linear, scheme, here))

    def _parts(self, linear: str) -> dict[str, Tensor]:
        return {part: self.files.read(f"{linear}.{part}") for part in parts_of(self.linears[linear])}


def rounded_experts(directory: Path, quantization: Mapping[str, Any]) -> RoundedExperts | None:
    """The routed experts of a directory that transformers does not open as they are served; None without any."""
    if quantization.get("quant_method") != READER:
        return None
    files = WeightFiles(directory)
    names = [found["linear"] for name in files if (found := EXPERT.fullmatch(name))]
    schemes = schemes_of(quantization, names).items()
    linears = {name: scheme for name, scheme in schemes if not is_opened(scheme) or _is_rounded(scheme)}
    return RoundedExperts(files, quantization, linears) if linears else None


def _is_rounded(group: Any) -> bool:
    """Whether experts of a group read what is rounded by scales that are found then and there."""
    return known_scheme(group) is not None and bool(group.input_activations.dynamic)
