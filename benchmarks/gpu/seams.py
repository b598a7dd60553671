"""Where this check touches Lowbit: what it calls, what it times, which sizes it tries. The only file that knows.

A name is `module:attribute` or `module:Class.method`, where the caller looks it up. What has moved is refused by name;
`scripts/gpu-check --device cpu --tiny`, which runs in the tests, says so at once.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import wraps
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from benchmarks.gpu.place import Spent
from torch import Tensor

# What each second of a quantize run went to. What runs inside another is not counted twice.
RUN_CAUSES = {
    "lowbit_quantize.pipeline:Walk._step": "the rest of a layer",
    "lowbit_quantize.stream:Decoder.load_layer": "reading weights",
    "lowbit_quantize.stream:Decoder.observe": "observing",
    "lowbit_quantize.stream:Decoder.advance": "advancing",
    "lowbit_quantize.stream:Decoder.advance_to": "advancing",
    "lowbit_quantize.stages:compress_layer": "quantizing",
    "lowbit_quantize.pipeline:Walk._write": "writing",
    "lowbit_quantize.pipeline:Walk.quality": "quality",
}
ONCE = ("quality", "the rest of the run")  # causes that a deeper model does not have more of
# What each part of rounding one weight by GPTQ took.
GPTQ_CAUSES = {
    "lowbit_quantize.gptq:_ordered_factor": "factor",
    "lowbit_quantize.gptq:search_grids": "grids",
    "lowbit_quantize.gptq:parallel_map": "columns",
    "lowbit_quantize.gptq:solve_scales": "scales",
}
# Pieces sized for a CPU core's cache, and what they might be on a GPU.
GPU_BLOCKS = {
    "lowbit_quantize.gptq:BLOCK_ROWS": 1 << 30,
    "lowbit_quantize.clip:BLOCK_WEIGHTS": 1 << 26,
    "lowbit_quantize.clip:SOLVE_ROWS": 1 << 30,
}
# Small texts, and groups that divide the widths of tiny models.
SMALL = (
    "weights.group_size=32",
    "calibration.sequences=8",
    "calibration.sequence_tokens=64",
    "quality.sequences=4",
    "quality.sequence_tokens=64",
)


def quantize(
    model: Path, recipe: str, out: Path, device: torch.device, settings: tuple[str, ...] = ()
) -> Any:
    """Run `lowbit quantize` in this process; returns the manifest."""
    from lowbit_quantize.pipeline import quantize
    from lowbit_quantize.recipe import load_recipe

    return quantize(str(model), load_recipe(recipe, settings), out, device)


def quantize_by_gptq(weight: Tensor, hessian: Tensor) -> Tensor:
    """The codes of a weight (out, in) in 4 bits and groups of 128, symmetric, by GPTQ on inputs of this Hessian."""
    from lowbit_quantize.gptq import round_gptq
    from lowbit_quantize.grid import GridSpec

    return round_gptq(weight, hessian, GridSpec(4, 128, True)).codes


def hessian_of(inputs: Tensor) -> Tensor:
    """The mean of x xᵀ over (tokens, features) as the walk computes it."""
    from lowbit_quantize.observe import Covariance

    statistic = Covariance(inputs.shape[1], inputs.device)
    statistic.add(inputs)
    return statistic.matrix()


def write_tiny_model(directory: Path, family: str) -> Path:
    """The tests' tiny model of a family, and its tokenizer."""
    from tests.tiny_models import write_tiny_model

    return write_tiny_model(directory, family)


def save_tiny_tokenizer(directory: Path) -> None:
    from tests.tiny_models import tiny_tokenizer

    tiny_tokenizer().save_pretrained(directory)


@contextmanager
def timed(causes: Mapping[str, str], spent: Spent) -> Iterator[None]:
    """While the block runs, what these functions take is counted as their cause."""
    with ExitStack() as stack:
        for place, cause in causes.items():
            owner, name = _found(place)
            stack.enter_context(_replaced(owner, name, _timed(getattr(owner, name), cause, spent)))
        yield


@contextmanager
def sizes(values: Mapping[str, int]) -> Iterator[None]:
    """While the block runs, these constants have these values."""
    with ExitStack() as stack:
        for place, value in values.items():
            stack.enter_context(_replaced(*_found(place), value))
        yield


def _timed(function: Callable[..., Any], cause: str, spent: Spent) -> Callable[..., Any]:
    @wraps(function)
    def call(*arguments: Any, **named: Any) -> Any:
        with spent.on(cause):
            return function(*arguments, **named)

    return call


def _found(place: str) -> tuple[Any, str]:
    """The object that holds an attribute, and the attribute's name; raises LookupError where it is not."""
    module, _, path = place.partition(":")
    *owners, name = path.split(".")
    owner: Any = import_module(module)
    for part in owners:
        owner = getattr(owner, part)
    if not hasattr(owner, name):
        raise LookupError(f"{place} is not there any more; benchmarks/gpu/seams.py has to follow")
    return owner, name


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)
