"""What the responses say, idle and under load: pure arithmetic.

One number decides: the change of the share of right answers under load, over questions and greedy probes together (a
probe is right when its text is sound), paired, with a 95 % interval. Requests that fail under load count as wrong.
"""

from bisect import bisect_right
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from lowbit_core.errors import ConfigError
from lowbit_core.evals.arithmetic import Estimate, paired_change
from lowbit_core.evals.items import Key
from lowbit_core.evals.results import Changes, TaskResult, changes, from_rows, summarize
from lowbit_core.evals.scoring import Answer
from lowbit_loadtest.generate.records import Interval
from lowbit_loadtest.quality.probes import Reply

Verdict = Literal["pass", "fail", "undecided"]


@dataclass(frozen=True)
class Responses:
    """Everything asked once: answers by item, replies by probe, and when each request was in flight."""

    answers: Mapping[Key, Answer]
    replies: Mapping[str, Reply]
    in_flight: tuple[Interval, ...]


@dataclass(frozen=True)
class ProbeFailures:
    """Failures by kind. `new` counts probes that were sound idle and failed under load; `same_text` equal texts."""

    probes: int
    idle: dict[str, int]
    loaded: dict[str, int]
    new: int
    same_text: int


@dataclass(frozen=True)
class RightAnswers:
    """The one number: the change of the share of right answers under load, of `judged` questions and probes."""

    change: Estimate
    judged: int
    tolerance: float
    verdict: Verdict


@dataclass(frozen=True)
class QualityResult:
    """The whole result. `under_load_share` is the share of the second pass's requests during which load ran."""

    idle: Responses
    loaded: Responses
    tasks: dict[str, tuple[TaskResult, TaskResult | None]]  # idle, loaded
    under_load: Changes
    probe_failures: ProbeFailures
    right_answers: RightAnswers | None
    against_base: Changes | None  # under load, from the base's answers to ours
    under_load_share: float
    load: dict[str, Any]
    unsupported: tuple[str, ...]


def compare_responses(
    idle: Responses,
    loaded: Responses,
    load_in_flight: Sequence[Interval],
    load: dict[str, Any],
    tolerance: float,
    base: Mapping[Key, Answer] | None = None,
    unsupported: tuple[str, ...] = (),
) -> QualityResult:
    """Everything that is reported; `load_in_flight` is when requests of the load were in flight."""
    of_loaded = summarize(loaded.answers)
    return QualityResult(
        idle=idle,
        loaded=loaded,
        tasks={task: (result, of_loaded.get(task)) for task, result in summarize(idle.answers).items()},
        under_load=changes(idle.answers, loaded.answers),
        probe_failures=_probe_failures(idle.replies, loaded.replies),
        right_answers=_right_answers(idle, loaded, tolerance),
        against_base=changes(base, loaded.answers) if base is not None else None,
        under_load_share=share_under_load(loaded.in_flight, load_in_flight),
        load=load,
        unsupported=unsupported,
    )


def _probe_failures(idle: Mapping[str, Reply], loaded: Mapping[str, Reply]) -> ProbeFailures:
    both = [(idle[id_], loaded[id_]) for id_ in idle if id_ in loaded]
    return ProbeFailures(
        probes=len(both),
        idle=dict(Counter(one.failure for one, _ in both if one.failure)),
        loaded=dict(Counter(other.failure for _, other in both if other.failure)),
        new=sum(bool(other.failure) and not one.failure for one, other in both),
        same_text=sum(one.text == other.text for one, other in both),
    )


def _right_answers(idle: Responses, loaded: Responses, tolerance: float) -> RightAnswers | None:
    pairs = [
        (bool(one.acc_norm), bool(loaded.answers[key].acc_norm))
        for key, one in idle.answers.items()
        if one.acc_norm is not None and key in loaded.answers
    ]
    pairs += [
        (not one.failure, not loaded.replies[id_].failure)
        for id_, one in idle.replies.items()
        if id_ in loaded.replies
    ]
    if not pairs:
        return None
    lost = sum(before and not after for before, after in pairs)
    gained = sum(after and not before for before, after in pairs)
    change = paired_change(lost, gained, len(pairs))
    return RightAnswers(change, len(pairs), tolerance, judge_change(change, tolerance))


def judge_change(change: Estimate, tolerance: float) -> Verdict:
    """Pass: the whole interval is above −tolerance. Fail: the change is below it, and its interval below 0."""
    if change.low is not None and change.low >= -tolerance:
        return "pass"
    failed = change.high is not None and change.high < 0 and change.value < -tolerance
    return "fail" if failed else "undecided"


def share_under_load(asked: Sequence[Interval], load: Sequence[Interval]) -> float:
    """The share of the requests `asked` in the middle of which a request of the load was in flight too."""
    merged: list[Interval] = []
    for one in sorted(load, key=lambda one: one.start_s):
        if merged and one.start_s <= merged[-1].end_s:
            merged[-1] = Interval(merged[-1].start_s, max(merged[-1].end_s, one.end_s))
        else:
            merged.append(one)
    starts = [one.start_s for one in merged]
    middles_s = [(one.start_s + one.end_s) / 2 for one in asked]
    met = [
        (place := bisect_right(starts, middle_s) - 1) >= 0 and merged[place].contains(middle_s)
        for middle_s in middles_s
    ]
    return sum(met) / len(met) if met else 0.0


def base_answers(document: Mapping[str, Any], origin: str) -> dict[Key, Answer]:
    """The base's answers under load, from its `lowbit loadtest --json`; ConfigError if it has none."""
    try:
        return from_rows(document["quality"]["answers"]["loaded"])
    except (KeyError, TypeError):
        raise ConfigError(
            f"{origin} has no quality answers; give the file that --json wrote for a scenario with quality"
        ) from None
