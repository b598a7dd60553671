"""What a model may become: one scheme everywhere or a bundled mix, a cache as it is or in FP8, experts pruned or not.

Where bits alone do not fit, structure may go too: the same with fewer layers and channels.

What each loses is ordered by what was measured of one small model (`known_kl.json`): an order, and no prediction for
another model, which takes sensitivities (program.py).
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from lowbit_core.errors import ConfigError, RecipeError
from lowbit_core.log import get_logger
from lowbit_plan.place import Place
from lowbit_plan.sections import Sections, planned
from lowbit_quantize.model.reference import ModelReference
from lowbit_quantize.plan import Plan
from lowbit_quantize.recipe import NONE

log = get_logger("plan")

PRUNED = (0.0, 0.25, 0.5)  # shares of the routed experts, by REAP
PLAIN_EXPERTS = {"match": "*.experts.*", "scheme": NONE}
NO_EXPERTS = r"re:^(?!.*\.experts\.)"
PLAIN = "bf16"  # what `none` is called: weights as they are


@dataclass(frozen=True)
class Candidate:
    """A recipe's sections and the model that they make. `known_kl` orders candidates; `kl` is predicted, or None.

    `pruned` is the share of experts that go, `structure` says what else does: of these no KL is known before the run.
    """

    name: str
    sections: Sections
    plan: Plan
    known_kl: float
    pruned: float = 0.0
    kl: float | None = None
    structure: str = ""

    @property
    def rank(self) -> tuple[bool, float, float]:
        """What loses less comes first: all of less structure last, before it all with pruned experts."""
        return bool(self.structure), self.pruned, self.known_kl if self.kl is None else self.kl


@dataclass(frozen=True)
class Structure:
    """Passes before the quantizing that take layers and channels away, and what that lost of one small model."""

    name: str = ""
    passes: tuple[dict[str, Any], ...] = ()
    known_kl: float = 0.0


WHOLE = Structure()


@dataclass(frozen=True)
class Numbers:
    """How linears are stored: a recipe's rules, what they are called, and what they lost of one small model."""

    name: str
    rules: tuple[dict[str, Any], ...]
    known_kl: float

    def after(self, structure: Structure) -> list[dict[str, Any]]:
        """The rules; linears that stay in 16 bits make up for structure that has gone."""
        if self.rules or not structure.passes:
            return list(self.rules)
        return [{"match": NO_EXPERTS, "scheme": NONE, "methods": ["compensate"]}]


@cache
def known_kl() -> dict[str, Any]:
    """The figures that candidates are ordered by, with where they were measured."""
    found: dict[str, Any] = json.loads(
        files(__package__).joinpath("known_kl.json").read_text(encoding="utf-8")
    )
    return found


def structures() -> list[Structure]:
    """Less of a model's structure, what loses least first."""
    found = known_kl()["structures"]
    return [Structure(one["name"], tuple(one["passes"]), one["kl"]) for one in found]


def candidates(
    reference: ModelReference,
    place: Place,
    schemes: Sequence[str] | None,
    *,
    fp8_cache: bool | None,
    of: Sequence[Structure] = (WHOLE,),
) -> list[Candidate]:
    """All that the place runs and that fit the model, best first; `schemes` and `fp8_cache` narrow them down.

    Raises ConfigError for a scheme that is none of them.
    """
    _, base = planned(reference)
    caches = [False, True] if fp8_cache is None else [fp8_cache]
    found: list[Candidate] = []
    for numbers in _numbers(place, schemes):
        for fp8 in caches:
            if fp8 and not place.caches_fp8(base):
                continue
            for structure in of:
                for share in PRUNED if base.experts else PRUNED[:1]:
                    found += _made(reference, place, numbers, share, structure, fp8=fp8)
    if not found and WHOLE in of:
        raise ConfigError(
            f"none of the schemes {', '.join(_schemes(place, schemes))} fits {reference.name} on {place.name}; give "
            "others"
        )
    return sorted(found, key=lambda one: one.rank)


def _schemes(place: Place, asked: Sequence[str] | None) -> list[str]:
    known = known_kl()["schemes"]
    runs = [scheme for scheme in known if scheme == NONE or place.runs(scheme)]
    if asked is None:
        return runs
    names = [NONE if one in (NONE, PLAIN) else one for one in asked]
    if odd := [one for one in names if one not in runs]:
        why = "is not run there" if odd[0] in known else "has no measured figure to be ordered by"
        raise ConfigError(
            f"--schemes: {odd[0]} {why}; on {place.name} allowed are {', '.join([PLAIN, *runs[1:]])}"
        )
    return names


def _numbers(place: Place, asked: Sequence[str] | None) -> Iterator[Numbers]:
    """One scheme everywhere, by the methods that its figure was measured with; and mixes, where none is asked for."""
    known, schemes = known_kl(), _schemes(place, asked)
    for scheme in schemes:
        figures = known["schemes"][scheme]
        rule = {"match": "*", "scheme": scheme}
        rule |= {key: figures[key] for key in ("group_size", "methods") if key in figures}
        name, rules = (PLAIN, ()) if scheme == NONE else (scheme, (rule,))
        yield Numbers(name, rules, figures["kl"])
    for mix in known["mixes"] if asked is None else []:
        if {rule["scheme"] for rule in mix["modules"]} <= set(schemes):
            yield Numbers(mix["name"], tuple(mix["modules"]), mix["kl"])


def _made(
    reference: ModelReference,
    place: Place,
    numbers: Numbers,
    share: float,
    structure: Structure,
    *,
    fp8: bool,
) -> Iterator[Candidate]:
    """The candidate, or nothing and a line that says why the model cannot have it."""
    lost = numbers.known_kl + (known_kl()["fp8_cache"]["kl"] if fp8 else 0.0)
    name, rules = _name(numbers, share, structure, fp8=fp8), numbers.after(structure)
    before = [*structure.passes]
    before += [{"prune_experts": {"prune_ratio": share, "criterion": "reap"}}] if share else []
    try:
        sections, plan = planned(reference, rules, fp8=fp8, before=before)
        if plan.experts and not place.runs_experts(plan):
            sections, plan = planned(reference, [*rules, PLAIN_EXPERTS], fp8=fp8, before=before)
            name += ", experts as they are"
    except RecipeError as error:
        log.info("%s is no candidate: %s", name, error)
        return
    yield Candidate(name, sections, plan, lost + structure.known_kl, share, structure=structure.name)


def _name(numbers: Numbers, share: float, structure: Structure, *, fp8: bool) -> str:
    parts = [
        numbers.name,
        "FP8 cache" if fp8 else "",
        structure.name,
        f"{share:.0%} of experts pruned" if share else "",
    ]
    return ", ".join(part for part in parts if part)
