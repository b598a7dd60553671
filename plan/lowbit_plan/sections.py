"""A recipe's sections, with the texts that bundled recipes have, and the model that they make."""

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from lowbit_quantize.check.forecast import disk_bytes
from lowbit_quantize.check.preflight import carried_bytes
from lowbit_quantize.model.reference import ModelReference
from lowbit_quantize.plan import Plan, make_plan
from lowbit_quantize.recipe import NONE, QUANTIZE, parse_recipe

SEQUENCE = 512  # tokens of a calibration sequence, fewer where the model has fewer positions
ROWS = 448  # of calibration text, the most that a bundled recipe takes: a plan says what can be had, whatever it takes
Sections = dict[str, Any]


def planned(
    reference: ModelReference,
    rules: Sequence[Mapping[str, Any]] = (),
    *,
    fp8: bool = False,
    before: Sequence[Mapping[str, Any]] = (),
) -> tuple[Sections, Plan]:
    """The recipe of some rules and a cache, after the passes `before`, and its plan; raises RecipeError."""
    sections: Sections = {"modules": [dict(rule) for rule in rules]} if rules else {}
    changes = any(rule["scheme"] != NONE or rule.get("methods") for rule in rules)
    sections["passes"] = [*before, QUANTIZE] if changes else [*before]
    sections |= {"kv_cache": {"dtype": "fp8" if fp8 else NONE}} | _texts(reference)
    return sections, make_plan(reference, parse_recipe(sections, "the plan"))


def checkpoint_bytes(plan: Plan) -> int:
    """Of the checkpoint that a plan makes; what is carried over beside the model is the same in all, and read once."""
    return disk_bytes(plan, _carried(plan.reference))


@cache
def _carried(reference: ModelReference) -> int:
    return carried_bytes(planned(reference)[1])


def _texts(reference: ModelReference) -> Sections:
    positions = getattr(reference.config.get_text_config(), "max_position_embeddings", None) or SEQUENCE
    text = {"dataset": "default", "max_seq_length": min(SEQUENCE, positions), "seed": 0}
    return {"calibration": {"num_samples": ROWS, **text}, "quality": {"num_samples": 16, **text}}
