"""What a token costs: joules, where the server's metrics tell its energy, and money, where a price per hour is given.

Joules are all that was drawn during a repetition, over the output tokens of the requests that completed: energy spent
on failures is paid for by the answers. Money is the price of a second over the tokens of a second, in the window of the
rates. Both are unknown, rather than guessed, where tokens or energy are.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lowbit_loadtest.generate.records import Outcome
from lowbit_loadtest.report.result import Point
from lowbit_loadtest.report.server_metrics import ENERGY
from lowbit_loadtest.report.statistics import Bounds, student_mean
from lowbit_loadtest.report.summary import Run

MILLION, HOUR_S = 1_000_000, 3600
COSTS = ("joules_per_output_token", "price_per_million_output_tokens", "price_per_million_tokens")

Row = dict[str, float | None]


@dataclass(frozen=True)
class Cost:
    """The means over repetitions, their intervals by Student's t, and one row a repetition."""

    price_per_hour: float | None
    joules_per_output_token: float | None
    price_per_million_output_tokens: float | None
    price_per_million_tokens: float | None  # prompt and output
    intervals: dict[str, Bounds]
    repetitions: list[Row]


def point_cost(point: Point, price_per_hour: float | None) -> Cost:
    """What the tokens of one rate cost."""
    return cost_of(point.runs, point.server, point.summary.repetition_rates, price_per_hour)


def cost_of(
    runs: Sequence[Run],
    servers: Sequence[dict[str, Any]],
    rates: Sequence[Mapping[str, float | None]],
    price_per_hour: float | None,
) -> Cost:
    """`servers` and `rates` have one entry a repetition; fewer servers than runs say nothing of energy."""
    energies = [server.get(ENERGY) for server in servers] if len(servers) == len(runs) else [None] * len(runs)
    rows = [
        {COSTS[0]: _joules(run, energy), **_prices(rate, price_per_hour)}
        for run, energy, rate in zip(runs, energies, rates, strict=True)
    ]
    known = {name: [value for row in rows if (value := row[name]) is not None] for name in COSTS}
    whole = {name: values for name, values in known.items() if values and len(values) == len(rows)}
    bounds = {name: found for name, values in whole.items() if (found := student_mean(values)) is not None}
    means = {name: sum(whole[name]) / len(rows) if name in whole else None for name in COSTS}
    return Cost(price_per_hour, **means, intervals=bounds, repetitions=rows)


def _joules(run: Run, energy: float | None) -> float | None:
    completed = [record for record in run.records if record.outcome is Outcome.COMPLETED]
    tokens = [record.output_tokens for record in completed]
    if energy is None or energy <= 0 or None in tokens or not sum(count or 0 for count in tokens):
        return None
    return energy / sum(count or 0 for count in tokens)


def _prices(rate: Mapping[str, float | None], price_per_hour: float | None) -> Row:
    return {
        cost: _price(rate.get(tokens_per_s), price_per_hour)
        for cost, tokens_per_s in zip(COSTS[1:], ("output_tokens_per_s", "total_tokens_per_s"), strict=True)
    }


def _price(tokens_per_s: float | None, price_per_hour: float | None) -> float | None:
    if not tokens_per_s or price_per_hour is None:
        return None
    return price_per_hour / HOUR_S / tokens_per_s * MILLION
