"""What a recipe may name. To add a scheme, a method or a pass, write one file in its room and name it here."""

from collections.abc import Iterable
from dataclasses import dataclass

from lowbit_core.names import did_you_mean
from lowbit_quantize.methods.awq import Awq
from lowbit_quantize.methods.compensate import Compensate
from lowbit_quantize.methods.gptq import Gptq
from lowbit_quantize.methods.magnitude import Magnitude
from lowbit_quantize.methods.method import Method
from lowbit_quantize.methods.rtn import RoundToNearest
from lowbit_quantize.methods.smoothquant import SmoothQuant
from lowbit_quantize.methods.sparsegpt import SparseGpt
from lowbit_quantize.methods.wanda import Wanda
from lowbit_quantize.passes.distill_router import DistillRouterKind
from lowbit_quantize.passes.drop_layers import DropLayersKind
from lowbit_quantize.passes.kind import PassKind
from lowbit_quantize.passes.prune_experts import PruneExpertsKind
from lowbit_quantize.passes.prune_width import PruneWidthKind
from lowbit_quantize.passes.quantize import QuantizeKind
from lowbit_quantize.passes.tune import TuneKind
from lowbit_quantize.recipe import NONE
from lowbit_quantize.schemes import block_fp8, eight_bits, float_blocks, integer, rounded_integers
from lowbit_quantize.schemes.scheme import Preset


@dataclass(frozen=True)
class Catalog:
    """Schemes, methods and passes, found by their names."""

    presets: tuple[Preset, ...]
    methods: tuple[Method, ...]
    passes: tuple[PassKind, ...]


CATALOG = Catalog(
    presets=(
        *integer.PRESETS,
        *block_fp8.PRESETS,
        *eight_bits.PRESETS,
        *float_blocks.PRESETS,
        *rounded_integers.PRESETS,
    ),
    methods=(RoundToNearest(), Awq(), SmoothQuant(), Gptq(), Magnitude(), Wanda(), SparseGpt(), Compensate()),
    passes=(
        DropLayersKind(),
        PruneWidthKind(),
        PruneExpertsKind(),
        DistillRouterKind(),
        QuantizeKind(),
        TuneKind(),
    ),
)


USUAL_NAMES = {  # what other tools call schemes and methods
    "int4": "W4A16", "int8": "W8A8", "int3": "W3A16", "int2": "W2A16", "4bit": "W4A16", "8bit": "W8A8", "4": "W4A16",
    "8": "W8A8", "fp4": "NVFP4", "w4": "W4A16", "w8": "W8A8", "fp8": "FP8_DYNAMIC",
    "bf16": NONE, "bfloat16": NONE, "fp16": NONE,
    "skip": NONE, "round": "rtn", "optq": "gptq", "sq": "smoothquant",
}  # fmt: skip


def unknown_name(key: str, given: str, known: Iterable[str]) -> str:
    """The words for a name that is not in the catalog, with what may be meant."""
    names = list(known)
    usual = USUAL_NAMES.get(given.casefold())
    hint = f"did you mean {usual}? " if usual in names else did_you_mean(given, names)
    return f"{key}: {given!r} is unknown; {hint}allowed are {', '.join(names)}"
