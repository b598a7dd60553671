"""From visits to the frontier: each checkpoint's numbers with intervals, and who dominates whom.

Pure arithmetic. Throughput is the output tokens a second of the best rate that keeps the latency limits; its interval
is Student's over visits, of which there are few. Quality is judged under load, against the base's answers under the
same load, item by item. A constraint is met or missed when the whole interval says so; otherwise it is open.
"""

import platform
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from lowbit_core import __version__
from lowbit_core.evals.arithmetic import Estimate
from lowbit_core.evals.results import changes, from_rows
from lowbit_loadtest.frontier.plan import Constraints, FrontierPlan
from lowbit_loadtest.frontier.recommendation import Standing, Status, recommend
from lowbit_loadtest.report.statistics import student_mean

Document = dict[str, Any]
FORMAT_VERSION = 1
COMPLETED_SHARE = 0.99


def as_document(plan: FrontierPlan, visits: Sequence[Document], failures: dict[str, str]) -> Document:
    """The frontier as JSON; visits are kept without their answers."""
    standings = [
        standing
        for one in plan.checkpoints
        if (
            standing := stand(
                plan, one.name, [visit for visit in visits if visit["checkpoint"] == one.name], visits
            )
        )
    ]
    first = plan.scenarios[0].name
    return {
        "kind": "lowbit.frontier",
        "format_version": FORMAT_VERSION,
        "lowbit": __version__,
        "machine": platform.machine(),
        "plan": plan.model_dump(mode="json"),
        "planned_visits": len(plan.checkpoints) * plan.repetitions,
        "failures": failures,
        "recommendation": asdict(recommend(plan, standings, failures)),
        "pareto": {load.name: pareto(standings, load.name) for load in plan.scenarios},
        "standings": [asdict(one) for one in standings],
        "latency": {one.name: latencies(visits, one.name, first) for one in standings},
        "visits": [_without_answers(visit) for visit in visits],
    }


def stand(
    plan: FrontierPlan, name: str, own: Sequence[Document], visits: Sequence[Document]
) -> Standing | None:
    """What is known of one checkpoint; None without a visit."""
    if not own:
        return None
    quality, base = _quality(own), _quality([one for one in visits if one["checkpoint"] == plan.base])
    against = None
    if quality and base and "answers" in quality and "answers" in base:
        against = changes(from_rows(base["answers"]["loaded"]), from_rows(quality["answers"]["loaded"]))
    accuracy = _pooled(quality, "acc_norm")
    base_accuracy = _pooled(base, "acc_norm")
    of_base = _share_of(against.acc_norm_change, base_accuracy) if against and base_accuracy else None
    perplexity_of_base = against.perplexity_ratio if against else None
    if name == plan.base:  # it is what it is compared with
        of_base, perplexity_of_base = Estimate(1.0, 1.0, 1.0), Estimate(1.0, 1.0, 1.0)
    throughput = {
        load.name: over_visits(
            [_throughput(visit["scenarios"][load.name], plan.constraints) for visit in own]
        )
        for load in plan.scenarios
    }
    engine = own[-1]["server"]["engine"]
    return Standing(
        name=name,
        visits=len(own),
        throughput=throughput,
        accuracy=accuracy,
        perplexity=_pooled(quality, "perplexity"),
        accuracy_of_base=of_base,
        perplexity_of_base=perplexity_of_base,
        against_base=against if name != plan.base else None,
        held=quality["held"]["verdict"] if quality and quality["held"] else None,
        memory_bytes=_memory(engine),
        kv_tokens=engine.get("kv_tokens"),
        statuses=_statuses(plan.constraints, of_base, perplexity_of_base, throughput),
        late_points=sum(
            not point["valid"]
            for visit in own
            for result in visit["scenarios"].values()
            for point in result["points"]
        ),
    )


def over_visits(values: Sequence[float]) -> Estimate:
    """The mean and its interval by Student's t; without one for a single visit."""
    mean, bounds = sum(values) / len(values), student_mean(values)
    return Estimate(mean, max(0.0, bounds.low), bounds.high) if bounds else Estimate(mean, None, None)


def _throughput(result: Document, constraints: Constraints) -> float:
    """Output tokens/s at the best of a run's rates that keep the limits; 0 where none does."""
    kept = [
        point["output_tokens_per_s"]
        for point in result["points"]
        if point["output_tokens_per_s"] is not None
        and point["outcomes"]["completed"] >= COMPLETED_SHARE * point["requests"]
        and all(
            point[name] is not None and point[name]["p95"] <= limit
            for name, limit in constraints.latencies_s.items()
        )
    ]
    return max(kept, default=0.0)


def _quality(visits: Sequence[Document]) -> Document | None:
    """The quality of the first visit that asked."""
    found = [one["quality"] for visit in visits for one in visit["scenarios"].values() if one.get("quality")]
    return found[0] if found else None


def _pooled(quality: Document | None, name: str) -> Estimate | None:
    """A number of all tasks together, under load."""
    loaded = ((quality or {}).get("tasks", {}).get("all") or {}).get("loaded") or {}
    return Estimate(**loaded[name]) if loaded.get(name) else None


def _share_of(change: Estimate | None, base: Estimate) -> Estimate | None:
    if change is None or change.low is None or change.high is None or base.value == 0:
        return None
    return Estimate(*(1 + end / base.value for end in (change.value, change.low, change.high)))


def _memory(engine: Document) -> dict[str, float]:
    """Bytes by component, summed over devices; what is free and what there is in all are no components."""
    total: dict[str, float] = {}
    for parts in (engine.get("memory") or {}).values():
        for component, size in parts.items():
            if component not in ("free", "total"):
                total[component] = total.get(component, 0.0) + size
    return total


def _statuses(
    constraints: Constraints,
    accuracy: Estimate | None,
    perplexity: Estimate | None,
    throughput: dict[str, Estimate],
) -> dict[str, Status]:
    found: dict[str, Status] = {}
    if constraints.accuracy_of_base is not None:
        found["accuracy_of_base"] = status(accuracy, constraints.accuracy_of_base, at_least=True)
    if constraints.perplexity_of_base is not None:
        found["perplexity_of_base"] = status(perplexity, constraints.perplexity_of_base, at_least=False)
    if constraints.latencies_s:
        found["latency"] = "met" if all(one.value > 0 for one in throughput.values()) else "missed"
    return found


def status(one: Estimate | None, limit: float, at_least: bool) -> Status:
    """Whether the whole interval keeps a limit."""
    if one is None or one.low is None or one.high is None:
        return "open"
    worst, best = (one.low, one.high) if at_least else (-one.high, -one.low)
    bound = limit if at_least else -limit
    return "met" if worst >= bound else "missed" if best < bound else "open"


def pareto(standings: Sequence[Standing], scenario: str) -> list[str]:
    """Those that no other equals in both and beats in one, by the measured values."""
    known = [
        (one.name, one.throughput[scenario].value, one.accuracy.value) for one in standings if one.accuracy
    ]
    return [
        name
        for name, speed, quality in known
        if not any(
            other_speed >= speed and other >= quality and (other_speed > speed or other > quality)
            for _, other_speed, other in known
        )
    ]


def latencies(visits: Sequence[Document], name: str, scenario: str) -> list[Document]:
    """Each rate's p95 of time to first token, over the visits of one checkpoint."""
    by_rate: dict[float, list[float]] = {}
    for visit in visits:
        if visit["checkpoint"] == name:
            for point in visit["scenarios"][scenario]["points"]:
                if point["offered_rps"] is not None and point["ttft_s"] is not None:
                    by_rate.setdefault(point["offered_rps"], []).append(point["ttft_s"]["p95"])
    return [
        {"offered_rps": rate, "ttft_p95_s": asdict(over_visits(seen))}
        for rate, seen in sorted(by_rate.items())
    ]


def _without_answers(visit: Document) -> Document:
    scenarios = {
        name: {**one, "quality": {key: value for key, value in one["quality"].items() if key != "answers"}}
        if one.get("quality")
        else one
        for name, one in visit["scenarios"].items()
    }
    return {**visit, "scenarios": scenarios}
