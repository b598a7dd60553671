"""Everything that can be refused before the first expensive second: does this recipe fit this model and this place?"""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from lowbit_core.errors import OutputError, RecipeError
from lowbit_core.manifest import MANIFEST_NAME, PROGRESS_NAME
from lowbit_quantize.architectures import Architecture, architecture_of
from lowbit_quantize.recipe import Recipe
from lowbit_quantize.source import ModelReference
from lowbit_quantize.stream import build_skeleton

DISK_MARGIN_BYTES = 64 << 20
BASE_BYTES_PER_PARAMETER = 2


@dataclass(frozen=True)
class Plan:
    """A model and a recipe that fit each other. `ignored` are full names of linears that stay as they are."""

    reference: ModelReference
    recipe: Recipe
    architecture: Architecture
    ignored: tuple[str, ...]
    parameters: int
    linear_parameters: int

    @property
    def disk_bytes(self) -> int:
        """Bytes that a run needs at its peak: the result and, for GGUF, the unpacked base beside it."""
        bits = self.recipe.weights.bits + 0.75 if self.recipe.weights.method != "none" else 16
        result = (self.parameters - self.linear_parameters) * BASE_BYTES_PER_PARAMETER
        result += int(self.linear_parameters * bits / 8)
        unpacked = self.parameters * BASE_BYTES_PER_PARAMETER if self.reference.kind == "gguf" else 0
        return result + unpacked + DISK_MARGIN_BYTES

    def fingerprint(self) -> dict[str, Any]:
        """What makes two runs the same run."""
        return {"recipe": self.recipe.model_dump(mode="json"), "base": self.reference.sha256()}


def make_plan(reference: ModelReference, recipe: Recipe) -> Plan:
    """Check that the recipe fits the model; raises ModelError or RecipeError."""
    architecture = architecture_of(reference.model_type, reference.name)
    skeleton = build_skeleton(reference.config)
    linears = _decoder_linears(skeleton, architecture)
    ignored = _ignored(skeleton, architecture, recipe)
    quantized = {name: linear for name, linear in linears.items() if name not in ignored}
    if recipe.weights.method != "none":
        _check_group_size(quantized, recipe.weights.group_size)
    else:
        quantized = {}
    counted = {id(p): p.numel() for p in skeleton.parameters()}
    return Plan(
        reference=reference,
        recipe=recipe,
        architecture=architecture,
        ignored=ignored,
        parameters=sum(counted.values()),
        linear_parameters=sum(linear.weight.numel() for linear in quantized.values()),
    )


def _decoder_linears(skeleton: nn.Module, architecture: Architecture) -> dict[str, nn.Linear]:
    names = {linear for group in architecture.groups for linear in group.linears}
    found = {}
    for name, module in skeleton.named_modules():
        within = name.removeprefix(f"{architecture.layers}.").partition(".")[2]
        if isinstance(module, nn.Linear) and name.startswith(architecture.layers) and within in names:
            found[name] = module
    return found


def _ignored(skeleton: nn.Module, architecture: Architecture, recipe: Recipe) -> tuple[str, ...]:
    """Linears that a pattern names, and those that share a group with one: engines fuse a group into one matrix."""
    patterns = recipe.weights.ignore
    layer = re.compile(rf"({re.escape(architecture.layers)}\.\d+)\.(.+)")
    ignored = set()
    for name, module in skeleton.named_modules():
        if isinstance(module, nn.Linear) and any(_matches(pattern, name) for pattern in patterns):
            ignored.add(name)
            match = layer.fullmatch(name)
            group = match and next((g for g in architecture.groups if match[2] in g.linears), None)
            ignored.update(f"{match[1]}.{linear}" for linear in group.linears) if match and group else None
    return tuple(sorted(ignored | {architecture.head}))


def _matches(pattern: str, name: str) -> bool:
    if not pattern.startswith("re:"):
        return pattern == name
    try:
        return re.fullmatch(pattern.removeprefix("re:"), name) is not None
    except re.error as error:
        raise RecipeError(f"weights.ignore: {pattern!r} is not a regular expression: {error}") from error


def _check_group_size(linears: dict[str, nn.Linear], group_size: int) -> None:
    for name, linear in linears.items():
        if linear.in_features % group_size:
            widths = {other.in_features for other in linears.values()}
            fitting = [str(size) for size in (32, 64, 128) if all(width % size == 0 for width in widths)]
            allowed = f"allowed here: {', '.join(fitting)}" if fitting else "32, 64 and 128 do not fit either"
            inputs = f"the {linear.in_features} inputs of {name}"
            raise RecipeError(f"weights.group_size = {group_size} does not divide {inputs}; {allowed}")


def finished_before(plan: Plan, out: Path) -> bool:
    """Whether `out` already holds this very run's checkpoint; raises OutputError when it holds something else."""
    if not out.exists():
        return False
    if not out.is_dir():
        raise OutputError(f"output {out} is a file; give a directory that is new or empty")
    if (out / MANIFEST_NAME).exists():
        found = json.loads((out / MANIFEST_NAME).read_text(encoding="utf-8"))
        if {"recipe": found.get("recipe"), "base": found.get("base", {}).get("sha256")} == plan.fingerprint():
            return True
        raise OutputError(f"output {out} holds a checkpoint of another model or recipe; give a new directory")
    if any(out.iterdir()) and not (out / PROGRESS_NAME).exists():
        raise OutputError(
            f"output {out} holds something else than a checkpoint; give a directory that is new or empty"
        )
    return False


def _free_bytes(path: Path) -> int:
    return shutil.disk_usage(path).free


def check_disk(plan: Plan, out: Path, free_bytes: Callable[[Path], int] = _free_bytes) -> None:
    """Raises OutputError where the disk under `out` is too small."""
    free = free_bytes(next(parent for parent in (out, *out.resolve().parents) if parent.exists()))
    if free < plan.disk_bytes:
        raise OutputError(
            f"output {out} needs {plan.disk_bytes / 2**20:.0f} MiB and its disk has {free / 2**20:.0f} MiB free; "
            "free some or give another directory"
        )
