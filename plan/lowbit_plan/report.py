"""A plan for a person, as tables and lines, and for programs, as one JSON object. It computes nothing."""

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Group
from rich.table import Table

from lowbit_core.kv_cache import GIB
from lowbit_plan.place import Place
from lowbit_plan.targets import Targets
from lowbit_plan.verdict import ITL, KL, MEMORY, TTFT, Check, Verdict

MISSES = 3  # that are told in words
UNKNOWN = "not known"


def check_words(check: Check) -> str:
    """`memory 1.23 GiB of 8.00 (85 % left)`."""
    shown, limit = _amount(check, check.predicted), _amount(check, check.limit)
    if check.margin is None or not math.isfinite(check.margin):
        return f"{check.target} {shown}, at most {limit}"
    left = f"{check.margin:.0%} left" if check.margin >= 0 else f"{-check.margin:.0%} too much"
    return f"{check.target} {shown} of {limit} ({left})"


def table(met: Sequence[Verdict], missed: Sequence[Verdict], targets: Targets) -> Group:
    """All candidates, the chosen one first, each target with its margin; then what the nearest misses would take."""
    limits = {check.target: _amount(check, check.limit) for check in (met or missed)[0].checks}
    shown = Table(caption=", ".join(f"{target} at most {limit}" for target, limit in limits.items()))
    for column in ("candidate", "weights", "KV tokens", MEMORY, "ITL", "TTFT", "KL"):
        shown.add_column(column, justify="left" if column == "candidate" else "right")
    for one in (*met, *missed):
        shown.add_row(*_cells(one))
    misses = [f"{one.candidate.name}: {'; '.join(one.takes)}" for one in missed[:MISSES]]
    head = f"{targets.streams} streams of {targets.context} tokens, prompts of {targets.prompt}"
    words = [] if met else ["nothing meets all targets; the nearest misses:", *misses]
    return Group(head, shown, *words)


def _cells(one: Verdict) -> list[str]:
    margins = {check.target: _margin(check) for check in one.checks}
    kl = UNKNOWN if one.candidate.kl is None else f"{one.candidate.kl:.3g}"
    return [
        one.candidate.name,
        f"{one.weights_bytes / GIB:.3f} GiB",
        f"{one.kv_tokens:,}",
        f"{one.needed_bytes / GIB:.3f} GiB" + margins[MEMORY],
        _milliseconds(one.itl.total) + margins.get(ITL, ""),
        _milliseconds(one.ttft.total) + margins.get(TTFT, ""),
        kl + margins.get(KL, ""),
    ]


def _margin(check: Check) -> str:
    """` ok +28%`, ` no -3%`, in a line of its own."""
    word = "ok" if check.met else "no"
    known = check.margin is not None and math.isfinite(check.margin)
    return f"\n{word} {check.margin:+.0%}" if known else f"\n{word}"


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.1f} ms" if math.isfinite(seconds) else "no kernel"


def _amount(check: Check, value: float | None) -> str:
    if value is None:
        return UNKNOWN
    if check.target == MEMORY:
        return f"{value / GIB:.3f} GiB"
    return f"{value:.3g} nats a token" if check.target == KL else _milliseconds(value)


def document(
    model: str,
    place: Place,
    targets: Targets,
    met: Sequence[Verdict],
    missed: Sequence[Verdict],
    *,
    closeness: str,
    price_per_hour: float | None,
) -> dict[str, Any]:
    """The whole plan."""
    return {
        "kind": "lowbit.plan",
        "model": model,
        "place": place.name,
        "measured": place.card is None,
        "source": place.card.source if place.card else None,
        "targets": asdict(targets),
        "closeness": closeness,
        "met": [verdict_document(one, targets, price_per_hour) for one in met],
        "missed": [verdict_document(one, targets, price_per_hour) for one in missed],
    }


def verdict_document(one: Verdict, targets: Targets, price_per_hour: float | None) -> dict[str, Any]:
    """One candidate's figures. Seconds without end, where there is no kernel, are null."""
    rate = targets.streams / one.itl.total
    return {
        "candidate": one.candidate.name,
        "weights_bytes": one.weights_bytes,
        "kv_bytes": one.kv_bytes,
        "kv_bytes_per_token": one.kv_bytes_per_token,
        "kv_tokens": one.kv_tokens,
        "needed_bytes": one.needed_bytes,
        "itl_s": _finite(one.itl.total),
        "itl_parts_s": {name: _finite(value) for name, value in one.itl.parts().items()},
        "ttft_s": _finite(one.ttft.total),
        "ttft_parts_s": {name: _finite(value) for name, value in one.ttft.parts().items()},
        "kl": one.candidate.kl,
        "price_per_million_output_tokens": _finite(price_per_hour / 3600 / rate * 1e6)
        if price_per_hour is not None and rate
        else None,
        "checks": [
            {
                "target": check.target, "predicted": _finite(check.predicted), "limit": check.limit, "met": check.met,
                "margin": _finite(check.margin),
            }
            for check in one.checks
        ],
        "takes": list(one.takes),
    }  # fmt: skip


def one_line(model: str, met: Sequence[Verdict], missed: Sequence[Verdict]) -> str:
    """For a page or a demo: what was chosen and what is predicted of it."""
    if not met:
        return f"{model}: nothing meets all targets; {missed[0].candidate.name}: {'; '.join(missed[0].takes)}"
    one = met[0]
    return (
        f"{model}: {one.candidate.name}; weights {one.weights_bytes / GIB:.2f} GiB, {one.kv_tokens:,} KV tokens, "
        f"predicted {_milliseconds(one.itl.total)} between tokens, {_milliseconds(one.ttft.total)} to the first"
    )


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
