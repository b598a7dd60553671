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
    "lowbit_quantize.walk.forward:Walk._step": "the rest of a layer",
    "lowbit_quantize.model.decoder:Decoder.load_layer": "reading weights",
    "lowbit_quantize.model.decoder:Decoder.load_frame": "reading weights",
    "lowbit_quantize.model.decoder:Decoder.load_part": "reading weights",
    "lowbit_quantize.model.decoder:Decoder.observe": "observing",
    "lowbit_quantize.model.decoder:Decoder.advance": "advancing",
    "lowbit_quantize.model.decoder:Decoder.advance_to": "advancing",
    "lowbit_quantize.walk.stages:quantize_linears": "quantizing",
    "lowbit_quantize.walk.expert_work:prepared": "quantizing",
    "lowbit_quantize.walk.expert_work:serve_alike": "quantizing",
    "lowbit_quantize.walk.layer_writer:LayerWriter.add": "writing",
    "lowbit_quantize.walk.layer_writer:LayerWriter.close": "writing",
    "lowbit_quantize.walk.forward:Walk.quality": "quality",
}
ONCE = ("quality", "the rest of the run")  # causes that a deeper model does not have more of
# What each part of quantizing one weight by GPTQ took.
GPTQ_CAUSES = {
    "lowbit_quantize.methods.gptq:ordered_factor": "factor",
    "lowbit_quantize.schemes.integer:search_params": "search",
    "lowbit_quantize.methods.gptq:dealt_codes": "columns",
    "lowbit_quantize.schemes.integer:solve_scales": "refine",
}
BLOCKS = "lowbit_quantize.device.blocks"
BLOCK_SIZES = ("SEARCH_WEIGHTS", "COLUMN_ROWS", "SOLVE_ROWS")
DEVICES = ("CPU", "GPU")
# Small texts, and groups that divide the widths of tiny models.
SMALL = (
    "modules.0.group_size=32",
    "calibration.num_samples=8",
    "calibration.max_seq_length=64",
    "quality.num_samples=4",
    "quality.max_seq_length=64",
)


def quantize(
    model: Path, recipe: str, out: Path, device: torch.device, settings: tuple[str, ...] = ()
) -> Any:
    """Run `lowbit quantize` in this process; returns the manifest."""
    from lowbit_quantize.pipeline import quantize
    from lowbit_quantize.recipe import load_recipe

    return quantize(str(model), load_recipe(recipe, settings), out, device)


def quantize_by_gptq(weight: Tensor, hessian: Tensor) -> Tensor:
    """The codes of a weight (out, in), W4A16 in groups of 128, by GPTQ on inputs of this Hessian."""
    from lowbit_quantize.methods.gptq import Gptq
    from lowbit_quantize.schemes.integer import PRESETS

    scheme = next(preset for preset in PRESETS if preset.name == "W4A16").make(128)
    return Gptq().quantize(weight, hessian, scheme).codes


def rounded_to_nearest(name: str, weight: Tensor) -> Any:
    """A weight (out, in) in a scheme, to the nearest (`schemes.scheme.Quantized`)."""
    from lowbit_quantize.catalog import CATALOG
    from lowbit_quantize.methods.rtn import RoundToNearest

    preset = next(preset for preset in CATALOG.presets if preset.name == name)
    return RoundToNearest().quantize(weight, torch.eye(weight.shape[1]), preset.make(preset.group_size))


def rounded_inputs(linear: Any, inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Codes (tokens, in) of inputs as the linear's scheme rounds them, and their scales, (tokens, groups)."""
    codes, scales = linear.scheme.input_quantizer.encode(inputs, linear.input_scale)
    return codes, scales


def product(linear: Any, inputs: Tensor) -> Tensor:
    """What engines are to compute of inputs (tokens, in), float32: by the weight that the walk goes on with."""
    weight: Tensor = linear.dequantize()
    read = inputs.float()
    if linear.scheme.input_quantizer is not None:
        codes, scales = rounded_inputs(linear, inputs)
        read = (codes.float().unflatten(-1, (scales.shape[1], -1)) * scales.unsqueeze(-1)).flatten(-2)
    return read @ weight.T


def rounds_products(inputs: Tensor) -> bool:
    """Whether the walk's Hessians are of rounded sums on this device."""
    from lowbit_quantize.device.precision import rounds_products

    return rounds_products(inputs)


def hessian_of(inputs: Tensor) -> Tensor:
    """The mean of x xᵀ over (tokens, features) as the walk computes it."""
    from lowbit_quantize.statistics.hessian import Hessian

    statistic = Hessian(inputs.shape[1], inputs.device)
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
def blocks_of(kind: str) -> Iterator[None]:
    """While the block runs, every device works in the blocks of one of `DEVICES`."""
    with ExitStack() as stack:
        for size in BLOCK_SIZES:
            value = getattr(*_found(f"{BLOCKS}:{kind}_{size}"))
            for device in DEVICES:
                stack.enter_context(_replaced(*_found(f"{BLOCKS}:{device}_{size}"), value))
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
    try:
        owner: Any = import_module(module)
        for part in owners:
            owner = getattr(owner, part)
        getattr(owner, name)
    except (ModuleNotFoundError, AttributeError):
        raise LookupError(f"{place} is not there any more; benchmarks/gpu/seams.py has to follow") from None
    return owner, name


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)
