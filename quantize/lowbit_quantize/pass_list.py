"""A recipe's passes, made for a model: known names, options that fit, and an order that can be walked."""

from collections.abc import Sequence

from lowbit_core.documents import parse_document
from lowbit_core.errors import RecipeError
from lowbit_quantize.catalog import Catalog, unknown_name
from lowbit_quantize.model.architecture import Architecture
from lowbit_quantize.model.reference import ModelReference
from lowbit_quantize.model.skeleton import text_config
from lowbit_quantize.recipe import QUANTIZE, PassStep
from lowbit_quantize.walk.layer import Pass


def make_passes(
    steps: Sequence[PassStep], reference: ModelReference, architecture: Architecture, catalog: Catalog
) -> tuple[Pass, ...]:
    """The passes in order; raises RecipeError or ModelError."""
    kinds = {kind.name: kind for kind in catalog.passes}
    passes: list[Pass] = []
    for number, step in enumerate(steps):
        key, before = f"passes.{number}", [one.name for one in passes]
        if step.name not in kinds:
            raise RecipeError(unknown_name(key, step.name, kinds))
        kind = kinds[step.name]
        if step.name in before:
            raise RecipeError(f"{key}: {step.name} stands twice; name each pass once")
        for other in kind.after:
            if other not in before:
                raise RecipeError(f"{key}: {step.name} needs {other} before it; add {other} there")
        options = parse_document(
            "recipe", step.options, f"{key}.{step.name}", kind.options, error=RecipeError
        )
        made = kind.make(options, text_config(reference.config), architecture, reference.name)
        if made.before_quantize and QUANTIZE in before:
            raise RecipeError(f"{key}: {step.name} stands after {QUANTIZE}; put it before")
        passes.append(made)
    return tuple(passes)
