"""What a recipe may name. To add a scheme, a method or a pass, write one file in its room and name it here."""

import difflib
from collections.abc import Iterable
from dataclasses import dataclass

from lowbit_quantize.methods.awq import Awq
from lowbit_quantize.methods.gptq import Gptq
from lowbit_quantize.methods.method import Method
from lowbit_quantize.methods.rtn import RoundToNearest
from lowbit_quantize.passes.distill_router import DistillRouterKind
from lowbit_quantize.passes.kind import PassKind
from lowbit_quantize.passes.prune_experts import PruneExpertsKind
from lowbit_quantize.passes.quantize import QuantizeKind
from lowbit_quantize.schemes import integer
from lowbit_quantize.schemes.scheme import Preset


@dataclass(frozen=True)
class Catalog:
    """Schemes, methods and passes, found by their names."""

    presets: tuple[Preset, ...]
    methods: tuple[Method, ...]
    passes: tuple[PassKind, ...]


CATALOG = Catalog(
    presets=integer.PRESETS,
    methods=(RoundToNearest(), Awq(), Gptq()),
    passes=(PruneExpertsKind(), DistillRouterKind(), QuantizeKind()),
)


def unknown_name(key: str, given: str, known: Iterable[str]) -> str:
    """The words for a name that is not in the catalog, with what may be meant."""
    names = list(known)
    close = difflib.get_close_matches(given.upper(), [name.upper() for name in names], n=1)
    meant = next((name for name in names if close and name.upper() == close[0]), None)
    hint = f"did you mean {meant}? " if meant else ""
    return f"{key}: {given!r} is unknown; {hint}allowed are {', '.join(names)}"
