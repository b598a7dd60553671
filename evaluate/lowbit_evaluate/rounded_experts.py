"""Routed experts whose inputs engines round, in a model that transformers loads: they compute what engines compute.

transformers opens int8 experts not at all, and FP8 ones without rounding what they read. So it is given them as plain
weights, unpacked by compressed-tensors, and then a list of single experts with the codes takes their place. Static
scales of inputs, which engines share between experts, are left to transformers.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lowbit_evaluate.rounded_inputs import is_known, rounding_linear
from lowbit_quantize.model.architecture import Architecture
from lowbit_quantize.model.experts import unstack_experts
from lowbit_quantize.model.files.published_names import PublishedNames
from lowbit_quantize.model.files.unopened_experts import (
    READER,
    parts_of,
    schemes_of,
    unpacked,
    without_linears,
)
from lowbit_quantize.model.weights import WeightFiles

EXPERT = re.compile(r"(?P<linear>.*\.experts\.\d+\.\w+)\.weight")


@dataclass(frozen=True)
class RoundedExperts:
    """Linears of a checkpoint's routed experts that round what they read, by published name, with their group."""

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
            scheme = self.linears.get(names.published(name)) if architecture.in_experts(name) else None
            if isinstance(linear, nn.Linear) and scheme is not None:
                parts = self._parts(names.published(name))
                here = {part: tensor.to(model.device) for part, tensor in parts.items()}
                model.set_submodule(name, rounding_linear(linear, scheme, here))

    def _parts(self, linear: str) -> dict[str, Tensor]:
        return {part: self.files.read(f"{linear}.{part}") for part in parts_of(self.linears[linear])}


def rounded_experts(directory: Path, quantization: Mapping[str, Any]) -> RoundedExperts | None:
    """The routed experts of a directory that round what they read; None where there are none."""
    if quantization.get("quant_method") != READER:
        return None
    files = WeightFiles(directory)
    names = [found["linear"] for name in files if (found := EXPERT.fullmatch(name))]
    schemes = schemes_of(quantization, names).items()
    linears = {
        name: scheme for name, scheme in schemes if is_known(scheme) and scheme.input_activations.dynamic
    }
    return RoundedExperts(files, quantization, linears) if linears else None
