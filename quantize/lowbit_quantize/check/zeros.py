"""The zeros of a finished checkpoint, read back from its files: in their pattern, and where they were measured.

Quantized linears are unpacked by compressed-tensors' codec (or the unpacker of what it does not open), by what
`config.json` says of them; others are read as the weights of any base are.
"""

import json
from collections.abc import Mapping, Sequence
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
    config: Mapping[str, Any] = json.loads((out / "config.json").read_text(encoding="utf-8"))
    schemes = (
        schemes_of(config["quantization_config"], expected.keys() - plain) if expected.keys() - plain else {}
    )
    stored = _parts(files, expected.keys() - plain)
    for name, sparsity in expected.items():
        if name in plain:
            weight = weights.read(f"{inner[name]}.weight")
        else:
            with safe_open(out / stored[name][0], framework="pt") as opened:
                parts = {part: opened.get_tensor(f"{name}.{part}") for part in stored[name][1]}
            weight = unpacked(parts, schemes[name])
        if problem := _problem(weight, plan.modules[inner[name]].pruner, sparsity):
            raise NumericsError(
                f"the checkpoint in {out} is not what was measured: {name} {problem}; {AGAIN}"
            )


def _parts(files: WeightFiles, linears: Any) -> dict[str, tuple[str, list[str]]]:
    """The file of each linear, and the last parts of the names of what it is stored as there."""
    found: dict[str, tuple[str, list[str]]] = {}
    for file in files.files:
        with safe_open(files.directory / file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 (not a dict)
                linear, _, part = name.rpartition(".")
                if linear in linears and part != "bias":
                    found.setdefault(linear, (file, []))[1].append(part)
    return found


def _problem(weight: Tensor, pruner: Any, sparsity: SparsityRecord) -> str | None:
    found = zeros_of(weight)
    if found.sha256 != sparsity.sha256:
        return f"has other zeros ({found.share:.4f} of its weights, {sparsity.zeros:.4f} were measured)"
    if not pruner.sparsity.holds(weight):
        return f"is not {sparsity.pattern}"
    return None
