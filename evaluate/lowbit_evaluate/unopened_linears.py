"""Linears that transformers does not open, or opens without rounding what they read: they compute what engines compute.

transformers opens experts in int8 or in blocks of floats, and integers that lie across words, not at all, and FP8
experts without rounding what they read. So it is given all of these as plain weights, unpacked by another reader
(`schemes/storage/stored_linears.py`), and where experts round, a list of single ones with the codes then takes their
place. Static scales of inputs in FP8, which engines share between experts, are left to transformers.
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
from lowbit_quantize.model.experts.linears import unstack_experts
from lowbit_quantize.model.files.published_names import PublishedNames
from lowbit_quantize.model.files.unopened_linears import schemes_of, without_linears
from lowbit_quantize.model.weights import WeightFiles
from lowbit_quantize.schemes.scheme import Scheme
from lowbit_quantize.schemes.storage.stored_linears import CODEC, is_ours, opens_experts, parts_of, unpacked

EXPERT = re.compile(r"(?P<linear>.*\.experts\.\d+\.\w+)\.weight(_packed)?")
PACKED = re.compile(r"(?P<linear>.*)\.weight_packed")


@dataclass(frozen=True)
class UnopenedLinears:
    """Linears of a checkpoint that another reader unpacks, by published name, with their group.

    Those that are routed experts and round what they read are `rounding`, with the scheme that does it.
    """

    files: WeightFiles
    quantization: Mapping[str, Any]
    linears: Mapping[str, Any]
    rounding: Mapping[str, Scheme]

    @cached_property
    def plain(self) -> dict[str, Any] | None:
        """The configuration by which transformers reads them as plain weights; None where nothing else is quantized."""
        return without_linears(self.quantization, self.linears.keys())

    def state(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Every tensor of the checkpoint, these linears unpacked."""
        others = (name for name in self.files if not self._is_part(name))
        state = {name: self.files.read(name) for name in others}
        for linear, scheme in self.linears.items():
            state[f"{linear}.weight"] = unpacked(self._parts(linear), scheme).to(dtype)
        return state

    def put_into(self, model: Any, architecture: Architecture, names: PublishedNames) -> None:
        """Take the place of a loaded model's stacked experts, where they round."""
        if not self.rounding:
            return
        unstack_experts(model.get_submodule(architecture.layers))
        for name, linear in list(model.named_modules()):
            published = names.published(name) if architecture.in_experts(name) else ""
            if isinstance(linear, nn.Linear) and published in self.rounding:
                here = {part: tensor.to(model.device) for part, tensor in self._parts(published).items()}
                model.set_submodule(name, rounding_linear(linear, self.rounding[published], here))

    def _is_part(self, name: str) -> bool:
        linear, _, part = name.rpartition(".")
        return linear in self.linears and part in parts_of(self.linears[linear])

    def _parts(self, linear: str) -> dict[str, Tensor]:
        return {part: self.files.read(f"{linear}.{part}") for part in parts_of(self.linears[linear])}


def unopened_linears(directory: Path, quantization: Mapping[str, Any]) -> UnopenedLinears | None:
    """What of a directory is read so; None where transformers does all of it. ModelError where groups overlap."""
    if quantization.get("quant_method") != CODEC:
        return None
    files = WeightFiles(directory)
    packed = [found["linear"] for name in files if (found := PACKED.fullmatch(name))]
    experts = [found["linear"] for name in files if (found := EXPERT.fullmatch(name))]
    linears = {
        name: scheme
        for name, scheme in schemes_of(quantization, packed).items()
        if _across_words(files, name, scheme)
    }
    rounding: dict[str, Scheme] = {}
    for name, group in schemes_of(quantization, experts).items():
        known = known_scheme(group)
        opened = opens_experts(group)
        if known is not None and (group.input_activations.dynamic or not opened):
            rounding[name] = known
        if name in rounding or not opened:
            linears[name] = group
    return UnopenedLinears(files, quantization, linears, rounding) if linears else None


def _across_words(files: WeightFiles, linear: str, scheme: Any) -> bool:
    """Whether codes lie across words, which the tensor's size tells; 4-bit floats have no `weight_shape`."""
    if f"{linear}.weight_shape" not in files:
        return False
    inputs = int(files.read(f"{linear}.weight_shape")[1])
    return is_ours(scheme, files.shape(f"{linear}.weight_packed")[1], inputs)
