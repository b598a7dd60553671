"""An assignment as a recipe that `lowbit quantize` takes: ordinary rules, with what was predicted in comments."""

import json
from collections.abc import Iterator
from typing import Any

from lowbit_quantize.recipe import NONE
from lowbit_quantize.sensitivity.assignment import Assignment
from lowbit_quantize.sensitivity.report import Candidate, DecisionRecord

FEW = 16  # linears of a decision that are named one by one; more are experts, which a pattern names
OTHER_SECTIONS = ("base", "kv_cache", "calibration", "quality")


def recipe_text(assignment: Assignment, budget: str) -> str:
    """The file; `budget` says what was asked for."""
    found = assignment.found
    counts = ", ".join(f"{count} {name}" for name, count in assignment.counts.items())
    corrected = ", as measured checkpoints correct it" if assignment.factors else ""
    lines = [
        f"# {found.base.name} within {budget}, by `lowbit allocate`: what loses least by prediction.",
        f"# {sum(assignment.counts.values())} decisions: {counts}; {assignment.bits:.3f} bits of a code, "
        f"{assignment.bytes / 1e6:.1f} MB.",
        f"# Predicted KL {assignment.kl:.4f} nats a token{corrected}; behind each decision its part in millinats.",
        f"description: {json.dumps(_description(assignment, budget))}",
        "modules:",
    ]
    by_name = {candidate.name: candidate for candidate in found.candidates}
    for name in assignment.counts:
        lines += [f"  - {_scheme(by_name[name])}", "    match:"]
        for one, chosen, choice in assignment.choices:
            if chosen == name:
                lines += _matches(one, 1e3 * assignment.factors.get(name, 1.0) * choice.kl)
    lines += [f"{key}: {json.dumps(found.recipe[key])}" for key in OTHER_SECTIONS if key in found.recipe]
    return "\n".join(lines) + "\n"


def _description(assignment: Assignment, budget: str) -> str:
    schemes = " and ".join(assignment.counts)
    return f"{schemes} within {budget}, predicted KL {assignment.kl:.4f} nats a token"


def _scheme(candidate: Candidate) -> str:
    """The first line of a rule, without what it matches."""
    rule: dict[str, Any] = {"scheme": candidate.scheme}
    if candidate.scheme != NONE:
        if candidate.group_size is not None:
            rule["group_size"] = candidate.group_size
        if candidate.methods:
            rule["methods"] = [step.model_dump() for step in candidate.methods]
    (first, scheme), *others = rule.items()
    lines = [f"{first}: {scheme}", *(f"    {key}: {json.dumps(value)}" for key, value in others)]
    return "\n".join(lines)


def _matches(one: DecisionRecord, millinats: float) -> Iterator[str]:
    names = list(one.modules)
    if len(names) > FEW:
        names = [pattern_of(names)]
    for place, name in enumerate(names):
        comment = f"  # {millinats:.3g}" if place == 0 else ""
        yield f"      - {json.dumps(name)}{comment}"


def pattern_of(names: list[str]) -> str:
    """A pattern of the experts of a layer: what their names have in common, to a dot, and all behind it."""
    first, last = min(names), max(names)
    length = next((n for n, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))
    return f"{first[:length].rpartition('.')[0]}.*"
