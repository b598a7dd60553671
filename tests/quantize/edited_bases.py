"""Tiny bases that somebody has changed: tensors, configuration and files beside them."""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from tests.quantize.small_runs import CPU, recipe_of
from torch import Tensor

from lowbit_core.manifest import Manifest
from lowbit_quantize.pipeline import quantize

Tensors = dict[str, Tensor]
QUICK = ("calibration.num_samples=2", "quality.num_samples=2")


def edited(
    base: Path,
    directory: Path,
    tensors: Callable[[Tensors], Tensors] | None = None,
    config: Mapping[str, Any] | None = None,
    files: Mapping[str, str] | None = None,
) -> Path:
    """A copy of `base` in `directory` with its tensors changed, keys of its configuration set, and files added."""
    shutil.copytree(base, directory)
    if tensors is not None:
        path = directory / "model.safetensors"
        save_file({name: one.contiguous() for name, one in tensors(load_file(path)).items()}, path)
    if config is not None:
        path = directory / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    for name, text in (files or {}).items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text(text)
    return directory


def renamed(change: Callable[[str], str]) -> Callable[[Tensors], Tensors]:
    """Every tensor under another name."""
    return lambda tensors: {change(name): tensor for name, tensor in tensors.items()}


def quick_run(base: Path, out: Path, *overrides: str, recipe: str = "rtn-g64") -> Manifest:
    """A run on two sequences for each text."""
    return quantize(str(base), recipe_of(recipe, *QUICK, *overrides), out, CPU)
