"""Quality for programs (part of the result's JSON) and for people (a few lines). It computes nothing."""

from dataclasses import asdict
from typing import Any

from lowbit_core.evals.arithmetic import Estimate, span
from lowbit_core.evals.results import Changes, TaskResult, as_rows
from lowbit_loadtest.quality import Quality

VERDICTS = {
    "held": "quality held under load",
    "fell": "QUALITY FELL under load",
    "undecided": "whether quality held under load is undecided: ask more items",
}


def quality_document(quality: Quality, answers: bool) -> dict[str, Any]:
    """The result; with `answers`, every answer too, for `--quality-base` of a later run."""
    tasks = {
        task: {"idle": asdict(idle), "loaded": asdict(loaded) if loaded else None}
        for task, (idle, loaded) in quality.tasks.items()
    }
    sittings = {"idle": quality.idle.answers, "loaded": quality.loaded.answers}
    return {
        "held": asdict(quality.held) if quality.held else None,
        "tasks": tasks,
        "under_load": asdict(quality.under_load),
        "against_base": asdict(quality.against_base) if quality.against_base else None,
        "form": asdict(quality.form),
        "under_load_share": quality.under_load_share,
        "load": quality.load,
        "unsupported": list(quality.unsupported),
        **({"answers": {name: as_rows(one) for name, one in sittings.items()}} if answers else {}),
    }


def quality_lines(quality: Quality) -> list[str]:
    """The result for people, the one number first."""
    text = [f"quality: {reason}" for reason in quality.unsupported]
    if (held := quality.held) is not None:
        change = points_text(held.change)
        text.append(
            f"{VERDICTS[held.verdict]}: right answers {change} of {held.judged} (held: above −{held.tolerance:.1%}); "
            f"{quality.under_load_share:.0%} of the requests met load"
        )
    for task, (idle, loaded) in quality.tasks.items():
        text.append(f"  {task:<16} idle {_task(idle)}" + (f"   under load {_task(loaded)}" if loaded else ""))
    text += _changes("under load against idle", quality.under_load)
    if quality.against_base is not None:
        text += _changes("against the base", quality.against_base)
    form = quality.form
    if form.probes:
        text.append(
            f"  {form.probes} greedy probes: {form.same_text} the same text under load, {form.new} newly unsound; "
            f"failures idle {form.idle or 'none'}, under load {form.loaded or 'none'}"
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
