"""The result for people: a few lines. It computes nothing."""

from lowbit_core.evals.arithmetic import Estimate, span
from lowbit_core.evals.results import Changes, TaskResult
from lowbit_loadtest.generate.schedule import Recording
from lowbit_loadtest.quality.verdict import QualityResult
from lowbit_loadtest.report.cost import Cost, point_cost
from lowbit_loadtest.report.knee import Knee
from lowbit_loadtest.report.result import Point, Result, highest_rate
from lowbit_loadtest.report.sessions import Sessions
from lowbit_loadtest.report.statistics import Distribution
from lowbit_loadtest.report.summary import Summary
from lowbit_loadtest.scenario import Scenario

SEVERAL_TOKENS = 1.5  # a chunk: more than now and then two, as where a character has two tokens
VERDICTS = {
    "pass": "quality under load: pass",
    "fail": "quality under load: FAIL",
    "undecided": "quality under load: undecided, ask more items",
}


def lines(scenario: Scenario, result: Result, price_per_hour: float | None = None) -> list[str]:
    """The result for people."""
    text = recording_lines(result.recording) if result.recording else []
    if (joined := result.joined) is not None:
        text.append(f"{joined.parts} parts, whose starts were {1000 * joined.starts_apart_s:.0f} ms apart")
    text += [line for point in result.points for line in _point_lines(point, scenario, price_per_hour)]
    text += [knee_text(knee) for knee in result.knees]
    if (found := highest_rate(scenario, result.points)) is not None:
        text.append(highest_rate_text(found))
    if result.quality is not None:
        text += quality_lines(result.quality)
    if result.interrupted:
        text.append("interrupted: these are the requests up to then")
    return text


def knee_text(knee: Knee) -> str:
    """The knee in a sentence."""
    others = "".join(f" at {name.replace('_', ' ')} {value:g}" for name, value in knee.at.items())
    along = f"{knee.along.replace('_', ' ')}{others}"
    if knee.value is None:
        return f"no knee along {along}: {knee.because}"
    sure = f"{knee.low:g}" if knee.low == knee.high else f"{knee.low:g} to {knee.high:g}"
    return f"knee along {along}: {knee.value:g} [{sure}], by {knee.measure.removesuffix('_per_s').replace('_', ' ')}/s"


def recording_lines(recording: Recording) -> list[str]:
    """What was played of a recording, and what it lacked."""
    one = recording
    parts = {
        "with lengths cut to the limits": one.cut_to_limits,
        "recorded without output, sent with a limit of 1 token": one.without_output,
        "recorded without output and skipped": one.skipped,
        "recorded without a prompt, sent with one word": one.without_prompt,
    }
    said = [f"{count} {what}" for what, count in parts.items() if count]
    return ["; ".join([f"{one.format}: {one.played} of {one.recorded} recorded are planned", *said])]


def session_lines(sessions: Sessions) -> list[str]:
    """Sessions in a few lines."""
    one = sessions
    text = [f"{one.finished} of {one.sessions} sessions finished"]
    if one.attainment is not None:
        text[0] += (
            f", {one.attainment:.1%} within {one.deadline_s:g} s; goodput {one.goodput_per_s or 0.0:.3g} sessions/s"
        )
    text.append(_row("time to finish", one.time_to_finish_s))
    if one.cached_prompt_share is not None:
        prefix = "" if one.cached_prefix_share is None else f", of the prefix {one.cached_prefix_share:.1%}"
        text.append(f"in the prefix cache: {one.cached_prompt_share:.1%} of the prompts{prefix}")
    return text


def highest_rate_text(found: dict[str, float | None]) -> str:
    """The bracket of the search in a sentence."""
    meets, misses = _rate(found["meets_slo_rps"]), _rate(found["misses_slo_rps"])
    return f"highest rate that meets the SLOs: {meets}; lowest that misses them: {misses}"


def _rate(rate_rps: float | None) -> str:
    return "none measured" if rate_rps is None else f"{rate_rps:.3g} requests/s"


def _point_lines(point: Point, scenario: Scenario, price_per_hour: float | None) -> list[str]:
    summary = point.summary
    counts = ", ".join(f"{count} {name}" for name, count in summary.outcomes.items())
    offered = f"offered {point.offered_rps:.3g} requests/s: " if point.offered_rps else ""
    others = {name: value for name, value in point.setting.items() if name != "rate_rps"}
    offered += "".join(f"{name.replace('_', ' ')} {value:g}: " for name, value in others.items())
    return [
        f"{offered}{summary.requests} requests in {summary.duration_s:.1f} s: {counts}",
        *(f"  {count} × {detail}" for detail, count in list(summary.details.items())[:5]),
        *([f"  {summary.not_sent} planned requests were not sent"] if summary.not_sent else []),
        *(f"  {count} × {text}" for text, count in list(summary.contradictions.items())[:5]),
        *_notes(summary),
        *_rates(summary, scenario),
        *_cost(point_cost(point, price_per_hour)),
        _row("time to first token", summary.ttft_s),
        *_first_answer(summary),
        _row("inter-token latency", summary.inter_token_latency_s),
        _row("time per output token", summary.time_per_output_token_s),
        _row("end to end", summary.end_to_end_s),
        *(session_lines(point.sessions) if point.sessions else []),
        *_checks(point),
    ]


def _notes(summary: Summary) -> list[str]:
    """What must be known to read the numbers."""
    text = [f"  {count} × {note}" for note, count in summary.notes.items()]
    if summary.hidden_reasoning_tokens:
        text.append(f"  {summary.hidden_reasoning_tokens} output tokens are hidden reasoning")
    if (summary.output_tokens_per_chunk or 0.0) >= SEVERAL_TOKENS:
        per_chunk = f"{summary.output_tokens_per_chunk:.1f} tokens in each chunk"
        text.append(f"  {per_chunk}: inter-token latency is of chunks")
    return text


def _first_answer(summary: Summary) -> list[str]:
    """Where something was thought first; otherwise it is the first token."""
    thought = summary.time_to_first_answer_s != summary.ttft_s
    return [_row("time to first answer", summary.time_to_first_answer_s)] if thought else []


def _rates(summary: Summary, scenario: Scenario) -> list[str]:
    if summary.requests_per_s is None:
        return ["no steady interval: send more requests for each stream"]
    rates = [f"{summary.requests_per_s:.2f} requests/s over a window of {summary.steady_interval_s:.1f} s"]
    if summary.output_tokens_per_s is not None:
        rates.append(f"{summary.output_tokens_per_s:.1f} output tokens/s by the server's count")
    else:
        rates.append(f"output tokens/s unknown: {summary.completed_without_usage} answers came without usage")
    if summary.slo_attainment is not None:
        met = f"{summary.slo_attainment:.1%} of the requests met the SLOs (wanted: {scenario.slo.attainment:.0%})"
        rates.append(f"goodput {summary.goodput_rps or 0.0:.2f} requests/s; {met}")
    return rates


def _cost(cost: Cost) -> list[str]:
    names = {
        "joules_per_output_token": "joules per output token",
        "price_per_million_output_tokens": "for a million output tokens",
        "price_per_million_tokens": "for a million tokens, prompts included",
    }
    parts = []
    for key, name in names.items():
        value, bounds = getattr(cost, key), cost.intervals.get(key)
        if value is not None:
            known = Estimate(value, bounds.low, bounds.high) if bounds else Estimate(value, None, None)
            parts.append(f"{span(known)} {name}")
    if cost.price_per_hour is not None and cost.price_per_million_output_tokens is None:
        parts.append("price of a token unknown: output tokens/s are")
    return ["; ".join(parts)] if parts else []


def _row(name: str, values: Distribution | None) -> str:
    if values is None:
        return f"{name:<22} not measured"
    names = {"mean": "mean", "p50": "p50", "p90": "p90", "p95": "p95", "p99": "p99", "p999": "p99.9"}
    cells = []
    for field, label in names.items():
        bounds = values.interval.get(field)
        spread = f" [{1000 * bounds.low:.1f}–{1000 * bounds.high:.1f}]" if bounds else ""
        cells.append(f"{label} {1000 * getattr(values, field):.1f}{spread}")
    return f"{name:<22} " + "  ".join(cells) + " ms"


def _checks(point: Point) -> list[str]:
    lag = point.summary.lag_s
    parts = {"sends": lag.send_p99, "event loop": lag.loop_p99}
    text = ", ".join(f"{name} {1000 * lag_s:.1f} ms" for name, lag_s in parts.items() if lag_s is not None)
    checks = [f"generator's lag, p99: {text}"]
    checks += [f"INVALID: {reason}" for reason in point.invalid_because]
    for check in point.usage:
        if check.agrees is False:
            checks.append(
                f"usage does not agree with the server's counter: {check.usage_tokens} against "
                f"{check.counter_tokens} output tokens (another client of the server, or wrong usage)"
            )
    return checks


def quality_lines(quality: QualityResult) -> list[str]:
    """The result for people, the one number first."""
    text = [f"quality: {reason}" for reason in quality.unsupported]
    if (found := quality.right_answers) is not None:
        text.append(
            f"{VERDICTS[found.verdict]}; right answers {points_text(found.change)} of {found.judged} "
            f"(pass: above −{found.tolerance:.1%}); {quality.under_load_share:.0%} of the requests ran under load"
        )
    for task, (idle, loaded) in quality.tasks.items():
        text.append(f"  {task:<16} idle {_task(idle)}" + (f"   under load {_task(loaded)}" if loaded else ""))
    text += _changes("under load against idle", quality.under_load)
    if quality.against_base is not None:
        text += _changes("against the base", quality.against_base)
    probes = quality.probe_failures
    if probes.probes:
        text.append(
            f"  {probes.probes} greedy probes: {probes.same_text} with the same text under load, "
            f"{probes.new} new failures; failures idle {probes.idle or 'none'}, under load {probes.loaded or 'none'}"
        )
    return text


def _task(result: TaskResult) -> str:
    parts = (
        [f"{result.items - result.unanswered} of {result.items}"]
        if result.unanswered
        else [str(result.items)]
    )
    if result.acc_norm:
        parts.append(f"acc_norm {span(result.acc_norm, '{:.1%}')}")
    if result.perplexity:
        parts.append(f"perplexity {span(result.perplexity, '{:.2f}')}")
    return ", ".join(parts)


def _changes(title: str, found: Changes) -> list[str]:
    parts = []
    if found.flip_share and found.acc_norm_change:
        parts.append(
            f"{found.flips} of {found.items} choices flipped ({found.lost} lost, {found.gained} gained, "
            f"acc_norm {points_text(found.acc_norm_change)}, McNemar p {found.mcnemar_p:.2g})"
        )
    if found.mean_logprob_shift is not None:
        parts.append(f"mean shift of log p {found.mean_logprob_shift:.4f}")
    if found.kl_lower_bound:
        parts.append(f"KL at least {span(found.kl_lower_bound, '{:.4f}')} nats a token")
    return [f"  {title}: {'; '.join(parts)}"] if parts else []


def points_text(one: Estimate) -> str:
    low, high = one.low or 0.0, one.high or 0.0
    return f"{100 * one.value:+.1f} points [{100 * low:+.1f} to {100 * high:+.1f}]"
