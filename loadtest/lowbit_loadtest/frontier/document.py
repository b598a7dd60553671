"""The frontier as JSON: each checkpoint's numbers, the Pareto frontier, latency by rate, and the recommendation."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from lowbit_core import __version__
from lowbit_core.cpu_speeds import processor
from lowbit_loadtest.frontier.checkpoint_result import CheckpointResult, checkpoint_result, mean_over_runs
from lowbit_loadtest.frontier.plan import FrontierPlan
from lowbit_loadtest.frontier.recommendation import Recommendation, recommend

Document = dict[str, Any]
FORMAT_VERSION = 3


def head(
    plan: FrontierPlan,
    recommendation: Recommendation,
    results: Sequence[CheckpointResult],
    failures: Mapping[str, str],
) -> Document:
    """What the document of every plan has, whether it decides or not."""
    return {
        "kind": "lowbit.frontier",
        "format_version": FORMAT_VERSION,
        "lowbit": __version__,
        "processor": processor(),
        "plan": plan.model_dump(mode="json"),
        "failures": dict(failures),
        "recommendation": {**asdict(recommendation), "title": recommendation.title},
        "pareto": {load.name: pareto(results, load.name) for load in plan.scenarios},
        "results": [asdict(one) for one in results],
        "decision": None,
    }


def as_document(plan: FrontierPlan, runs: Sequence[Document], failures: dict[str, str]) -> Document:
    """The frontier as JSON; runs are kept without their answers."""
    found = [checkpoint_result(plan, one.name, runs) for one in plan.checkpoints]
    results = [one for one in found if one is not None]
    first = plan.scenarios[0].name
    return {
        **head(plan, recommend(plan, results, failures), results, failures),
        "planned_runs": len(plan.checkpoints) * plan.repetitions,
        "latency": {one.name: latencies(runs, one.name, first) for one in results},
        "runs": [_without_answers(run) for run in runs],
    }


def pareto(results: Sequence[CheckpointResult], scenario: str) -> list[str]:
    """The checkpoints that no other beats: as good in throughput and in acc_norm, and better in one of them."""
    known = [
        (one.name, one.throughput[scenario].value, one.acc_norm.value)
        for one in results
        if one.acc_norm and one.runs
    ]
    return [
        name
        for name, speed, quality in known
        if not any(
            other_speed >= speed and other >= quality and (other_speed > speed or other > quality)
            for _, other_speed, other in known
        )
    ]


def latencies(runs: Sequence[Document], name: str, scenario: str) -> list[Document]:
    """Each rate's p95 of time to first token, over the runs of one checkpoint."""
    by_rate: dict[float, list[float]] = {}
    for run in runs:
        if run["checkpoint"] == name:
            for point in run["scenarios"][scenario]["points"]:
                if point["offered_rps"] is not None and point["ttft_s"] is not None:
                    by_rate.setdefault(point["offered_rps"], []).append(point["ttft_s"]["p95"])
    return [
        {"offered_rps": rate, "ttft_p95_s": asdict(mean_over_runs(seen))}
        for rate, seen in sorted(by_rate.items())
    ]


def _without_answers(run: Document) -> Document:
    scenarios = {
        name: {**one, "quality": {key: value for key, value in one["quality"].items() if key != "answers"}}
        if one.get("quality")
        else one
        for name, one in run["scenarios"].items()
    }
    return {**run, "scenarios": scenarios}
