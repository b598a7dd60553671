"""A scheme for each decision about a model, chosen under a budget or read off a checkpoint, and what it costs."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from lowbit_core.errors import ConfigError
from lowbit_core.manifest import Manifest, ModuleRecord, read_manifest
from lowbit_quantize.recipe import NONE
from lowbit_quantize.sensitivity.allocation import Limit, allocate
from lowbit_quantize.sensitivity.report import (
    CACHE,
    FP8_CACHE,
    HEAD,
    Candidate,
    Choice,
    DecisionRecord,
    Sensitivity,
)


@dataclass(frozen=True)
class Assignment:
    """The name of a candidate for each decision, and of those on caches that are in FP8 its choice.

    `factors` are what each candidate's predictions are multiplied by.
    """

    found: Sensitivity
    names: Mapping[str, str]
    factors: Mapping[str, float] = field(default_factory=dict)

    @cached_property
    def choices(self) -> list[tuple[DecisionRecord, str, Choice]]:
        """Every decision, the name of its candidate, and what that is for it; caches come last."""
        return [
            (one, self.names[one.name], one.choices[self.names[one.name]])
            for one in self.found.decisions
            if one.name in self.names
        ]

    @property
    def kl(self) -> float:
        """Predicted, in nats a token."""
        return sum(self.factors.get(name, 1.0) * choice.kl for _, name, choice in self.choices)

    @property
    def bits(self) -> float:
        """Bits of a code, on the mean over weights."""
        weights = sum(one.weights for one, _, _ in self.choices)
        return sum(choice.bits * one.weights for one, _, choice in self.choices) / weights

    @property
    def bytes(self) -> int:
        """Of all tensors of the checkpoint, but for scales of a cache."""
        chosen = sum(choice.bytes for one, _, choice in self.choices if one.modules)
        undecided = sum(
            2 * one.weights for one in self.found.decisions if one.modules and one.name not in self.names
        )
        return self.found.base.other_bytes + undecided + chosen

    @property
    def counts(self) -> dict[str, int]:
        """How many decisions each candidate has, the most frequent first."""
        return dict(Counter(name for one, name, _ in self.choices if one.modules).most_common())


def decided(found: Sensitivity, *, head: bool) -> list[DecisionRecord]:
    """The decisions about weights; about the head's where it is asked for."""
    return [one for one in found.decisions if one.modules and (head or one.kind != HEAD)]


def uniform(found: Sensitivity, candidate: str) -> Assignment:
    """The same candidate everywhere, but for the head."""
    return Assignment(found, {one.name: candidate for one in decided(found, head=False)} | caches(found))


def caches(found: Sensitivity) -> dict[str, str]:
    """The choice of each cache that the recipe keeps in FP8."""
    return {
        one.name: FP8_CACHE for one in found.decisions if one.kind == CACHE and one.layer in found.fp8_layers
    }


def best(
    found: Sensitivity,
    candidates: Sequence[str],
    *,
    bits: float | None = None,
    most_bytes: float | None = None,
    head: bool = False,
    factors: Mapping[str, float] | None = None,
) -> Assignment:
    """What loses least by prediction within a mean of `bits` of a code, or a checkpoint of `most_bytes`, or both."""
    decisions = decided(found, head=head)
    options = [[name for name in candidates if name in one.choices] for one in decisions]
    for one, names in zip(decisions, options, strict=True):
        if not names:
            raise ConfigError(
                f"{one.name} can have none of {', '.join(candidates)}; add none to the candidates"
            )
    choices = [[one.choices[name] for name in names] for one, names in zip(decisions, options, strict=True)]
    limits = []
    if bits is not None:
        weights = sum(one.weights for one in decisions)
        costs = [
            [choice.bits * one.weights / weights for choice in row]
            for one, row in zip(decisions, choices, strict=True)
        ]
        limits.append(Limit("--bits", costs, bits))
    if most_bytes is not None:
        rest = Assignment(found, {}).bytes - sum(2 * one.weights for one in decisions)
        costs = [[float(choice.bytes) for choice in row] for row in choices]
        costs[0] = [cost + rest for cost in costs[0]]  # what no decision is about counts once
        limits.append(Limit("--bytes", costs, most_bytes))
    factors = factors or {}
    losses = [
        [factors.get(name, 1.0) * one.choices[name].kl for name in names]
        for one, names in zip(decisions, options, strict=True)
    ]
    picked = allocate(losses, limits)
    chosen = {one.name: row[place] for one, row, place in zip(decisions, options, picked, strict=True)}
    return Assignment(found, chosen | caches(found), factors)


def of_checkpoint(found: Sensitivity, directory: Path) -> tuple[Assignment, Manifest]:
    """What a checkpoint of this model has for each decision; raises ConfigError where that was not a candidate."""
    manifest = read_manifest(directory)
    if manifest is None:
        raise ConfigError(
            f"{directory} has no manifest; give a checkpoint that `lowbit quantize --out` wrote"
        )
    if manifest.base.sha256 != found.base.sha256:
        raise ConfigError(
            f"{directory} was made of {manifest.base.name}, and the sensitivities are of {found.base.name} in other "
            "files; give a checkpoint of the same base"
        )
    records = {record.name: record for record in manifest.modules}
    names = caches(found) if manifest.quality.kv_cache_included else {}
    for one in found.decisions:
        record = records.get(one.modules[0]) if one.modules else None
        if not one.modules or (one.kind == HEAD and record is None):
            continue
        name = _candidate_of(record, found.candidates)
        if name is None or name not in one.choices:
            scheme = NONE if record is None else record.scheme
            raise ConfigError(
                f"{directory}: {one.name} is {scheme}, which was no candidate of the sensitivities; "
                f"those are {', '.join(candidate.name for candidate in found.candidates)}"
            )
        names[one.name] = name
    return Assignment(found, names), manifest


def _candidate_of(record: ModuleRecord | None, candidates: Sequence[Candidate]) -> str | None:
    for one in candidates:
        if record is None:
            if one.scheme == NONE:
                return one.name
        elif (
            one.scheme == record.scheme
            and (one.group_size in (None, record.group_size or "channel"))
            and [step.name for step in one.methods or ()] == list(record.methods)
        ):
            return one.name
    return None
