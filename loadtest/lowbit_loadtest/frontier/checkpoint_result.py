"""What the runs of one checkpoint say, with intervals: pure arithmetic.

Throughput is the output tokens a second of the best rate that keeps the latency limits; its interval is Student's over
the few runs. Quality is judged under load, against the base's answers under the same load, item by item. A constraint
is met or missed when the whole interval says so; otherwise it is undecided.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from lowbit_core.evals.arithmetic import Estimate
from lowbit_core.evals.results import Changes, changes, from_rows
from lowbit_loadtest.frontier.plan import Constraints, FrontierPlan
from lowbit_loadtest.report.statistics import student_mean

Document = dict[str, Any]
Status = Literal["met", "missed", "undecided"]
COMPLETED_SHARE = 0.99


@dataclass(frozen=True)
class CheckpointResult:
    """One checkpoint. Throughput is by scenario, in output tokens/s; `statuses` by constraint.

    `quality_under_load` is the verdict on idle against load. The generator fell behind in `invalid_points`
    measurements, whose speeds cannot be believed.
    """

    name: str
    runs: int
    throughput: dict[str, Estimate]
    acc_norm: Estimate | None
    perplexity: Estimate | None
    acc_norm_of_base: Estimate | None
    perplexity_of_base: Estimate | None
    against_base: Changes | None
    quality_under_load: str | None
    memory_bytes: dict[str, float]
    kv_tokens: int | None
    statuses: dict[str, Status]
    invalid_points: int = 0
    bytes: int | None = None  # of the files with weights
    kl_from_base: Estimate | None = None  # nats per token, at least
    choice_probability: Estimate | None = None  # where the plan decides


def checkpoint_result(plan: FrontierPlan, name: str, runs: Sequence[Document]) -> CheckpointResult | None:
    """What all `runs` say of one checkpoint; None without a run of it."""
    own = [run for run in runs if run["checkpoint"] == name]
    if not own:
        return None
    quality, base = _quality(own), _quality([run for run in runs if run["checkpoint"] == plan.base])
    against = _against(quality, base) if name != plan.base else None
    acc_norm_of_base, perplexity_of_base = _of_base(against, _pooled(base, "acc_norm"))
    if name == plan.base:
        acc_norm_of_base = perplexity_of_base = Estimate(1.0, 1.0, 1.0)
    throughput = {
        load.name: mean_over_runs([_throughput(run["scenarios"][load.name], plan.constraints) for run in own])
        for load in plan.scenarios
    }
    engine = own[-1]["server"]["engine"]
    sizes = {run["checkpoint"]: run["server"].get("bytes") for run in runs}
    kl = against.kl_lower_bound if against else None
    points = [point for run in own for result in run["scenarios"].values() for point in result["points"]]
    return CheckpointResult(
        name=name,
        runs=len(own),
        throughput=throughput,
        acc_norm=_pooled(quality, "acc_norm"),
        perplexity=_pooled(quality, "perplexity"),
        acc_norm_of_base=acc_norm_of_base,
        perplexity_of_base=perplexity_of_base,
        against_base=against,
        quality_under_load=_verdict(quality),
        memory_bytes=component_bytes(engine),
        kv_tokens=engine.get("kv_tokens"),
        statuses=_statuses(plan.constraints, acc_norm_of_base, perplexity_of_base, throughput)
        | _size_statuses(plan, name, sizes, engine.get("kv_tokens"))
        | _kl_status(plan, name, kl),
        invalid_points=sum(not point["valid"] for point in points),
        bytes=sizes[name],
        kl_from_base=kl,
    )


def mean_over_runs(values: Sequence[float]) -> Estimate:
    """The mean and its interval by Student's t; without one for a single run."""
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


def _quality(runs: Sequence[Document]) -> Document | None:
    """The quality of the first run that asked."""
    found = [one["quality"] for run in runs for one in run["scenarios"].values() if one.get("quality")]
    return found[0] if found else None


def _pooled(quality: Document | None, name: str) -> Estimate | None:
    """A figure over all tasks, under load."""
    loaded = ((quality or {}).get("tasks", {}).get("all") or {}).get("loaded") or {}
    return Estimate(**loaded[name]) if loaded.get(name) else None


def _verdict(quality: Document | None) -> str | None:
    return quality["right_answers"]["verdict"] if quality and quality["right_answers"] else None


def _against(quality: Document | None, base: Document | None) -> Changes | None:
    """From the base's answers under load to the checkpoint's."""
    if not quality or not base or "answers" not in quality or "answers" not in base:
        return None
    return changes(from_rows(base["answers"]["loaded"]), from_rows(quality["answers"]["loaded"]))


def _of_base(against: Changes | None, base: Estimate | None) -> tuple[Estimate | None, Estimate | None]:
    """acc_norm as a share of the base's, and perplexity as a multiple."""
    if against is None:
        return None, None
    change = against.acc_norm_change
    if change is None or change.low is None or change.high is None or not base or base.value == 0:
        return None, against.perplexity_ratio
    ends = (change.value, change.low, change.high)
    return Estimate(*(1 + end / base.value for end in ends)), against.perplexity_ratio


def component_bytes(engine: Mapping[str, Any]) -> dict[str, float]:
    """Bytes by component, summed over devices, without `free` and `total`, which are no components."""
    total: dict[str, float] = {}
    for parts in (engine.get("memory") or {}).values():
        for component, size in parts.items():
            if component not in ("free", "total"):
                total[component] = total.get(component, 0.0) + size
    return total


def _statuses(
    constraints: Constraints,
    acc_norm: Estimate | None,
    perplexity: Estimate | None,
    throughput: dict[str, Estimate],
) -> dict[str, Status]:
    found: dict[str, Status] = {}
    if constraints.acc_norm_of_base is not None:
        found["acc_norm_of_base"] = status(acc_norm, constraints.acc_norm_of_base, at_least=True)
    if constraints.perplexity_of_base is not None:
        found["perplexity_of_base"] = status(perplexity, constraints.perplexity_of_base, at_least=False)
    if constraints.latencies_s:
        found["latency"] = "met" if all(one.value > 0 for one in throughput.values()) else "missed"
    return found


def _kl_status(plan: FrontierPlan, name: str, kl: Estimate | None) -> dict[str, Status]:
    limit = plan.constraints.kl_from_base
    if limit is None:
        return {}
    return {"kl_from_base": "met" if name == plan.base else status(kl, limit, at_least=False)}


def _size_statuses(
    plan: FrontierPlan, name: str, sizes: Mapping[str, int | None], kv_tokens: int | None
) -> dict[str, Status]:
    """Bytes and KV tokens are known, not estimated; undecided only where nobody said them."""
    limits, found = plan.constraints, dict[str, Status]()
    if limits.bytes_of_base is not None:
        ours, base = sizes.get(name), sizes.get(plan.base)
        share = ours / base if ours and base else None
        found["bytes_of_base"] = _known(share, share is not None and share <= limits.bytes_of_base)
    if limits.kv_tokens is not None:
        found["kv_tokens"] = _known(kv_tokens, kv_tokens is not None and kv_tokens >= limits.kv_tokens)
    return found


def _known(value: float | None, kept: bool) -> Status:
    return "undecided" if value is None else "met" if kept else "missed"


def status(one: Estimate | None, limit: float, at_least: bool) -> Status:
    """Whether the whole interval keeps a limit."""
    if one is None or one.low is None or one.high is None:
        return "undecided"
    worst, best = (one.low, one.high) if at_least else (-one.high, -one.low)
    bound = limit if at_least else -limit
    return "met" if worst >= bound else "missed" if best < bound else "undecided"
