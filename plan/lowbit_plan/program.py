"""Recipes in which layers differ, by sensitivities: what loses least by prediction within memory and latency.

One integer program for each kind of cache: a scheme for each decision of the sensitivities, under the bytes that are
left for weights, and the seconds that are left for products, of a token of all streams and of a prompt. The sums are
those of `latency.py`: what a product takes does not depend on the others.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lowbit_core.errors import ConfigError, RecipeError
from lowbit_core.log import get_logger
from lowbit_plan.candidates import PLAIN, Candidate
from lowbit_plan.latency import Speeds, predicted
from lowbit_plan.place import Place
from lowbit_plan.sections import checkpoint_bytes, planned
from lowbit_plan.targets import Targets
from lowbit_plan.work import CHUNK, Part, Product, Work, parts_of, work_of
from lowbit_quantize.model.reference import ModelReference
from lowbit_quantize.plan import Plan
from lowbit_quantize.recipe import NONE
from lowbit_quantize.sensitivity.allocation import Limit, allocate
from lowbit_quantize.sensitivity.assignment import decided
from lowbit_quantize.sensitivity.recipe_file import FEW, pattern_of
from lowbit_quantize.sensitivity.report import CACHE, FP8_CACHE, DecisionRecord, Sensitivity
from lowbit_quantize.sensitivity.report import Candidate as Option

log = get_logger("plan")

MIXED = "mixed"  # the candidate in which layers differ
ROUNDS = 3  # of the program, each with what headers of files took beyond the last one's limit


@dataclass(frozen=True)
class Choices:
    """The decisions of a model, and the candidates that each may take here with the part of the model that it makes."""

    found: Sensitivity
    decisions: tuple[DecisionRecord, ...]
    options: tuple[Option, ...]
    plans: Mapping[str, Plan]  # of each option everywhere
    parts: Mapping[str, Mapping[str, Part]]  # by option and decision

    def names(self, decision: DecisionRecord) -> list[str]:
        """Candidates of a decision."""
        return [
            one.name
            for one in self.options
            if one.name in decision.choices and decision.name in self.parts[one.name]
        ]


def choices(reference: ModelReference, place: Place, found: Sensitivity) -> Choices:
    """What the place runs of the sensitivities' candidates; raises ConfigError where they are of another model."""
    if found.base.sha256 != reference.sha256:
        raise ConfigError(
            f"--sensitivity is of {found.base.name}, other files than {reference.name}; run lowbit sensitivity on it"
        )
    options = [one for one in found.candidates if one.scheme == NONE or place.runs(one.scheme)]
    plans: dict[str, Plan] = {}
    for one in options:
        try:
            plans[one.name] = planned(reference, _rules([(one, ["*"])]))[1]
        except RecipeError as error:
            log.info("%s is no candidate: %s", one.name, error)
    if not plans:
        names = ", ".join(one.name for one in found.candidates)
        raise ConfigError(
            f"--sensitivity: none of its candidates ({names}) runs on {place.name}; give others there"
        )
    decisions = tuple(decided(found, head=False))
    parts = {name: _parts(plan, decisions, place) for name, plan in plans.items()}
    return Choices(found, decisions, tuple(one for one in options if one.name in plans), plans, parts)


def mixed(
    reference: ModelReference, place: Place, targets: Targets, speeds: Speeds, known: Choices
) -> Iterator[Candidate]:
    """Each uniform candidate with its predicted KL, and the best mix, for each cache that the place keeps."""
    base = next(iter(known.plans.values()))
    caches = [one for one in known.found.decisions if one.kind == CACHE]
    for fp8 in (False, True) if caches and place.caches_fp8(base) else (False,):
        lost = sum(one.choices[FP8_CACHE].kl for one in caches) if fp8 else 0.0
        for option in known.options:
            if all(option.name in known.names(one) for one in known.decisions):
                picked = {one.name: option.name for one in known.decisions}
                yield _candidate(reference, known, picked, lost, fp8=fp8)
        best = _solved(reference, place, targets, speeds, known, fp8=fp8)
        if best is not None and len(set(best.values())) > 1:
            yield _candidate(reference, known, best, lost, fp8=fp8)


def plans_of(reference: ModelReference, place: Place, known: Choices) -> list[Plan]:
    """Plans that together have every kernel that `mixed` asks for."""
    plain = [planned(reference)[1]]
    if place.caches_fp8(plain[0]):
        plain.append(planned(reference, fp8=True)[1])
    return [*plain, *known.plans.values()]


def _parts(plan: Plan, decisions: Sequence[DecisionRecord], place: Place) -> dict[str, Part]:
    """The part of a model that each decision is about; none of experts that the place does not run so."""
    published = {plan.names.published(name): part for names, part in parts_of(plan) for name in names[:1]}
    runs = place.runs_experts(plan)
    found = {}
    for one in decisions:
        part = next((published[name] for name in one.modules if name in published), None)
        if part is not None and (isinstance(part, Product) or runs):
            found[one.name] = part
    return found


def _solved(
    reference: ModelReference, place: Place, targets: Targets, speeds: Speeds, known: Choices, *, fp8: bool
) -> dict[str, str] | None:
    """A candidate for each decision; None where no choice is within all limits."""
    names = [_with_kernels(known, one, speeds, targets) for one in known.decisions]
    if not all(names):
        return None
    losses = [[one.choices[name].kl for name in row] for one, row in zip(known.decisions, names, strict=True)]
    memory, *others = _limits(reference, place, targets, speeds, known, names, fp8=fp8)
    beyond = 0
    for _ in range(ROUNDS):
        try:
            row = allocate(losses, [replace(memory, most=memory.most - beyond), *others])
        except ConfigError as error:
            log.info("no mix of schemes meets all targets: %s", error)
            return None
        picked = {one.name: names[at][row[at]] for at, one in enumerate(known.decisions)}
        plan = _candidate(reference, known, picked, 0.0, fp8=fp8).plan
        over = checkpoint_bytes(plan) - _most_bytes(plan, place, targets)
        if over <= 0:
            return picked
        beyond += over
    return None


def _with_kernels(known: Choices, one: DecisionRecord, speeds: Speeds, targets: Targets) -> list[str]:
    """Candidates of a decision whose shape the engine has a kernel for."""
    return [
        name
        for name in known.names(one)
        if math.isfinite(_seconds(speeds, known.parts[name][one.name], targets.streams))
    ]


def _limits(
    reference: ModelReference,
    place: Place,
    targets: Targets,
    speeds: Speeds,
    known: Choices,
    names: Sequence[Sequence[str]],
    *,
    fp8: bool,
) -> list[Limit]:
    """Bytes of the decided linears, and their seconds, under what the rest of the model leaves."""
    _, plain = planned(reference, fp8=fp8)
    work = work_of(plain)
    decided_bytes = plain.dtype.itemsize * sum(one.weights for one in known.decisions)
    rest = checkpoint_bytes(plain) - decided_bytes
    costs = [
        [float(one.choices[name].bytes) for name in row]
        for one, row in zip(known.decisions, names, strict=True)
    ]
    found = [Limit("--fit", costs, _most_bytes(plain, place, targets) - rest)]
    itl, ttft = predicted(Work(work.layers, {}, {}, work.attention, work.head), speeds, targets)
    for flag, limit, beside, seconds in (
        ("--itl-ms", targets.itl_s, itl.total, lambda part: _seconds(speeds, part, targets.streams)),
        ("--ttft-ms", targets.ttft_s, ttft.total, lambda part: _prompt_s(speeds, part, targets.prompt)),
    ):
        if limit is not None:
            table = _table(known, names, seconds)
            found.append(Limit(flag, table, limit - beside))
    return found


def _table(
    known: Choices, names: Sequence[Sequence[str]], seconds: Callable[[Part], float]
) -> list[list[float]]:
    """Seconds of each decision's part under each of its candidates; what no decision is about is in none."""
    return [
        [seconds(known.parts[name][one.name]) for name in row]
        for one, row in zip(known.decisions, names, strict=True)
    ]


def _seconds(speeds: Speeds, part: Part, tokens: int) -> float:
    return speeds.product_s(part, tokens) if isinstance(part, Product) else speeds.experts_s(part, tokens)


def _prompt_s(speeds: Speeds, part: Part, prompt: int) -> float:
    return sum(_seconds(speeds, part, min(CHUNK, prompt - start)) for start in range(0, prompt, CHUNK))


def _most_bytes(plan: Plan, place: Place, targets: Targets) -> int:
    """Of weights that fit beside cache and runtime."""
    kv_bytes = place.kv_bytes(plan, targets.streams, targets.context)
    return int(place.share * targets.fit_bytes) - place.runtime - kv_bytes


def _candidate(
    reference: ModelReference, known: Choices, picked: Mapping[str, str], cache_kl: float, *, fp8: bool
) -> Candidate:
    """A recipe of the candidates that were picked, with its predicted KL."""
    options = {one.name: one for one in known.options}
    matches = {
        name: [match for one in known.decisions if picked[one.name] == name for match in _matches(one)]
        for name in dict.fromkeys(picked.values())
    }
    sections, plan = planned(
        reference, _rules([(options[name], found) for name, found in matches.items()]), fp8=fp8
    )
    kl = cache_kl + sum(one.choices[picked[one.name]].kl for one in known.decisions)
    used = set(picked.values())
    name = MIXED if len(used) > 1 else PLAIN if used == {NONE} else next(iter(used))
    return Candidate(name + (", FP8 cache" if fp8 else ""), sections, plan, kl, kl=kl)


def _matches(one: DecisionRecord) -> list[str]:
    names = list(one.modules)
    return [pattern_of(names)] if len(names) > FEW else names


def _rules(matches: Sequence[tuple[Option, Sequence[str]]]) -> list[dict[str, Any]]:
    """A rule for each option but that which leaves weights as they are."""
    return [
        {
            "match": list(names),
            "scheme": option.scheme,
            **({} if option.group_size is None else {"group_size": option.group_size}),
            **({"methods": [step.model_dump() for step in option.methods]} if option.methods else {}),
        }
        for option, names in matches
        if option.scheme != NONE
    ]
