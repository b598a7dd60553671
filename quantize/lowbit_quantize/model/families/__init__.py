"""What differs between model families and cannot be seen by running a layer: one table, a row a family."""

from lowbit_core.errors import ModelError
from lowbit_quantize.model.architecture import Architecture
from lowbit_quantize.model.families import dense, mixtures

ARCHITECTURES = {family.model_type: family for family in (*dense.FAMILIES, *mixtures.FAMILIES)}


def architecture_of(model_type: str, model: str, text_part: str = "") -> Architecture:
    """The table's entry; raises ModelError naming what is known, and of a larger model its `text_part` if it is."""
    if model_type not in ARCHITECTURES:
        hint = (
            f"; its text part, {text_part!r}, is supported: save that alone, as a model of its own, and give it"
            if text_part in ARCHITECTURES
            else ""
        )
        raise ModelError(
            f"{model} has the architecture {model_type!r}; supported are: {', '.join(sorted(ARCHITECTURES))}{hint}"
        )
    return ARCHITECTURES[model_type]
