"""Joins the parts of one plan into one result, as if one machine had sent it.

Parts are refused that are not of one plan: another seed, scenario, recording or tokenizer, another model, another
number of parts, one missing or one twice. Numbers are computed anew from all requests, never averaged.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from lowbit_core.errors import ConfigError
from lowbit_core.jsonl import parse_json
from lowbit_core.text_file import open_text, reading
from lowbit_loadtest.generate.http.target import Target
from lowbit_loadtest.generate.part import Part
from lowbit_loadtest.generate.schedule import Recording
from lowbit_loadtest.knees import knees_of
from lowbit_loadtest.measured import Measured, Sent, make_point, starts_apart_s
from lowbit_loadtest.parts.file import read_part
from lowbit_loadtest.rates import at_setting
from lowbit_loadtest.report.result import Joined, Result
from lowbit_loadtest.scenario import Scenario

# What may differ between parts: it is of a machine, or not of what is sent.
OF_A_MACHINE = frozenset({"generator", "api_key_env", "description", "model", "headers", "query", "proxy"})
OF_A_FILE = frozenset({"arrivals.path", "prompts.path"})


@dataclass(frozen=True)
class PartFile:
    """One part's file."""

    path: Path
    document: Mapping[str, Any]
    part: Part
    points: Sequence[Measured]


def merge(paths: Sequence[Path]) -> tuple[Scenario, Result, str]:
    """The scenario, the joined result, and when its first part started; raises ConfigError where parts do not fit."""
    files = sorted((_read(path) for path in paths), key=lambda one: one.part.number)
    _check_complete(files)
    for other in files[1:]:
        _check_same_plan(files[0], other)
    scenario = _scenario(files[0])
    measured = [_join([one.points[index] for one in files]) for index in range(len(files[0].points))]
    points = tuple(make_point(at_setting(scenario, one.setting), one) for one in measured)
    first = files[0].document
    apart_s = max(starts_apart_s(parts) for one in measured for parts in one.repetitions)
    result = Result(
        Target(first["target"], first["model"]),
        points,
        sum(int(one.document["client"]["workers"]) for one in files),
        first["client"]["prompt_tokens_counted_by"],
        any(one.document["interrupted"] for one in files),
        recording=Recording(**first["recording"]) if first["recording"] else None,
        joined=Joined(len(files), apart_s, first["request"]),
        knees=knees_of(scenario, points),
    )
    return scenario, result, min(str(one.document["started"]) for one in files)


def _read(path: Path) -> PartFile:
    with reading(path, "part", ConfigError), open_text(path) as text:
        document = parse_json(text.read(), f"part {path}", ConfigError)
    if not isinstance(document, dict) or document.get("kind") != "lowbit.loadtest":
        raise ConfigError(f"part {path} is no result of lowbit loadtest; give the files of --json")
    if document.get("part") is None:
        raise ConfigError(f"part {path} was sent as a whole; only runs with --part I/N are joined")
    return PartFile(path, document, *read_part(document["part"], f"part {path}"))


def _check_complete(files: Sequence[PartFile]) -> None:
    parts = files[0].part.of
    if odd := next((one for one in files if one.part.of != parts), None):
        raise ConfigError(
            f"{files[0].path} is part {files[0].part} and {odd.path} is part {odd.part}; give the parts of one plan"
        )
    numbers = [one.part.number for one in files]
    if twice := [number for number in set(numbers) if numbers.count(number) > 1]:
        paths = ", ".join(str(one.path) for one in files if one.part.number == twice[0])
        raise ConfigError(f"part {twice[0]}/{parts} is given more than once: {paths}")
    if missing := [f"{number}/{parts}" for number in range(1, parts + 1) if number not in numbers]:
        raise ConfigError(f"missing: part {', '.join(missing)}; give all {parts} files")


def _check_same_plan(first: PartFile, other: PartFile) -> None:
    """Scenarios must be equal, because numbers depend on them too (SLOs, warm-up), and so must what was planned."""
    both = f"{first.path} and {other.path} are not of one plan"
    if difference := _difference(first.document["scenario"], other.document["scenario"]):
        raise ConfigError(f"{both}: {difference}")
    if difference := _difference(first.document["request"], other.document["request"], "request"):
        raise ConfigError(f"{both}: {difference}")
    if first.document["model"] != other.document["model"]:
        raise ConfigError(f"{both}: models are {first.document['model']} and {other.document['model']}")
    if [_plans(one) for one in first.points] != [_plans(one) for one in other.points]:
        raise ConfigError(
            f"{both}: the requests differ, or one was interrupted; the files and the tokenizer behind the scenario "
            "must be the same"
        )


def _plans(measured: Measured) -> tuple[object, ...]:
    return dict(measured.setting), tuple(sent.plan for parts in measured.repetitions for sent in parts)


def _difference(one: Any, other: Any, key: str = "") -> str | None:
    """The first key that differs, in words."""
    if isinstance(one, dict) and isinstance(other, dict):
        keys = {f"{key}.{name}".lstrip("."): name for name in {**one, **other} if name not in OF_A_MACHINE}
        found = (
            _difference(one.get(name), other.get(name), path)
            for path, name in keys.items()
            if path not in OF_A_FILE
        )
        return next((words for words in found if words), None)
    return None if one == other else f"{key} is {json.dumps(one)} and {json.dumps(other)}"


def _scenario(first: PartFile) -> Scenario:
    try:
        return Scenario.model_validate(first.document["scenario"])
    except ValidationError as error:
        raise ConfigError(
            f"part {first.path}: its scenario is not this version's: {error.errors()[0]['msg']}"
        ) from None


def _join(points: Sequence[Measured]) -> Measured:
    first = points[0]
    joined: list[tuple[Sent, ...]] = []
    for index in range(len(first.repetitions)):
        joined.append(tuple(sent for point in points for sent in point.repetitions[index]))
    return Measured(first.setting, first.offered_rps, tuple(joined))
