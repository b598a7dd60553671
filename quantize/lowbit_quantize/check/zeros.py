"""The zeros of a finished checkpoint, read back from its files: in their pattern, and where they were measured.

Quantized linears are unpacked by compressed-tensors' codec (or the unpacker of what it does not open), by what
`config.json` says of them; others are read as the weights of any base are.
"""

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from lowbit_core.errors import NumericsError
from lowbit_core.manifest import ModuleRecord, SparsityRecord
from lowbit_quantize.check.reload import AGAIN
from lowbit_quantize.model.files.base_weights import BaseWeights, wanted_of
from lowbit_quantize.model.files.unopened_linears import schemes_of
from lowbit_quantize.model.weights import WeightFiles
from lowbit_quantize.plan import Plan
from lowbit_quantize.schemes.storage.stored_linears import unpacked
from lowbit_quantize.schemes.storage.zeros import zeros_of


def check_zeros(plan: Plan, out: Path, modules: Sequence[ModuleRecord]) -> None:
    """Raises NumericsError where a linear that was pruned is read with other zeros than it was measured with."""
    expected = {one.name: one.sparsity for one in modules if one.sparsity is not None}
    if not expected:
        return
    inner = {plan.names.published(name): name for name in plan.modules}
    files, plain = WeightFiles(out), set(plan.plain)
    weights = BaseWeights(files, wanted_of(plan.skeleton, plan.architecture), None)
    packed = _Packed(files, expected.keys() - plain)
    for name, said in expected.items():
        weight = weights.read(f"{inner[name]}.weight") if name in plain else packed.read(name)
        pruner = plan.modules[inner[name]].pruner
        if problem := _problem(weight, said, holds=pruner is not None and pruner.sparsity.holds(weight)):
            raise NumericsError(
                f"the checkpoint in {out} is not what was measured: {name} {problem}; {AGAIN}"
            )


class _Packed:
    """Quantized linears of a directory, by what its configuration says of them."""

    def __init__(self, files: WeightFiles, linears: Collection[str]) -> None:
        self._directory, self._parts = files.directory, dict[str, tuple[str, list[str]]]()
        config: Mapping[str, Any] = json.loads((files.directory / "config.json").read_text(encoding="utf-8"))
        self._schemes = schemes_of(config["quantization_config"], linears) if linears else {}
        for file in files.files if linears else ():
            with safe_open(files.directory / file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118 (not a dict)
                    linear, _, part = name.rpartition(".")
                    if linear in linears and part != "bias":
                        self._parts.setdefault(linear, (file, []))[1].append(part)

    def read(self, linear: str) -> Tensor:
        """Its weight, (out, in)."""
        file, parts = self._parts[linear]
        with safe_open(self._directory / file, framework="pt") as opened:
            tensors = {part: opened.get_tensor(f"{linear}.{part}") for part in parts}
        return unpacked(tensors, self._schemes[linear])


def _problem(weight: Tensor, said: SparsityRecord, *, holds: bool) -> str | None:
    found = zeros_of(weight)
    if found.sha256 != said.sha256:
        return f"has other zeros ({found.share:.4f} of its weights, {said.zeros:.4f} were measured)"
    return None if holds else f"has not the pattern {said.pattern}"
