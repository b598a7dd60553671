"""What serving costs, and how close it stays to the base model: what is watched in production, and its metrics.

docs/metrics.md lists each one. What was not asked for, or cannot be read on this machine, has no metric.
"""

import contextlib
import heapq
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from dataclasses import dataclass

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from lowbit_server.cost.energy import EnergyMeter
from lowbit_server.cost.price import Cost
from lowbit_server.cost.usage_book import UsageBook
from lowbit_server.engine.interface import ServingEngine
from lowbit_server.gateway.keys import Key
from lowbit_server.gateway.request_tracker import MOST_KEY_LABELS
from lowbit_server.shadow.worker import Shadow


@dataclass(frozen=True)
class Production:
    """What there is to tell of; `limited`: the keys that have a quota of a month."""

    energy: EnergyMeter | None = None
    cost: Cost | None = None
    usage: UsageBook | None = None
    limited: Callable[[], Iterable[Key]] = tuple
    shadow: Shadow | None = None

    @contextlib.asynccontextmanager
    async def kept(self, engine: ServingEngine, max_model_len: int) -> AsyncIterator[None]:
        """From now on the server is ready; what must be done now and then is done while the block runs."""
        if self.cost is not None:
            self.cost.begin()
        async with contextlib.AsyncExitStack() as stack:
            if self.energy is not None:
                await stack.enter_async_context(self.energy.kept())
            if self.shadow is not None:
                await stack.enter_async_context(self.shadow.kept(engine.score, max_model_len))
            yield

    def joules(self) -> float | None:
        """What all devices have used since the server was ready; None where none of them tells."""
        read = self.energy.read() if self.energy is not None else {}
        return sum(read.values()) if read else None

    def families(self, model: str) -> Iterator[Metric]:
        """The families, in the order of docs/metrics.md."""
        if self.energy is not None:
            yield _energy(self.energy)
        if self.cost is not None:
            yield from _cost(self.cost, model)
        if self.usage is not None:
            yield from _usage(self.usage, self.limited())
        if self.shadow is not None:
            yield from _shadow(self.shadow, model)


def _energy(energy: EnergyMeter) -> Metric:
    family = CounterMetricFamily(
        "lowbit_energy_joules",
        "Energy since the server was ready, as the machine's own counters have it, whoever used it.",
        labels=["source", "device"],
    )
    for place, joules in sorted(energy.read().items()):
        family.add_metric(list(place), joules)
    return family


def _cost(cost: Cost, model: str) -> Iterator[Metric]:
    price = GaugeMetricFamily(
        "lowbit_price_per_hour", "What an hour costs, as --price-per-hour says.", labels=["model"]
    )
    price.add_metric([model], cost.price_per_hour)
    yield price
    family = GaugeMetricFamily(
        "lowbit_cost_per_million_tokens",
        "Price of the last 10 minutes over the tokens of the last 10 minutes, for a million of them.",
        labels=["model", "kind"],
    )
    for kind, found in cost.per_million().items():
        family.add_metric([model, kind], found)
    yield family


def _usage(usage: UsageBook, limited: Iterable[Key]) -> Iterator[Metric]:
    failures = CounterMetricFamily(
        "lowbit_usage_write_failures", "Writes of the usage file that failed and were tried again."
    )
    failures.add_metric([], usage.failures)
    yield failures
    used = GaugeMetricFamily(
        "lowbit_key_month_tokens",
        "Tokens of this calendar month (UTC), prompt and generated, of keys that have a quota.",
        labels=["key"],
    )
    quota = GaugeMetricFamily(
        "lowbit_key_month_quota_tokens", "What the key file allows it in a month.", labels=["key"]
    )
    most_used = heapq.nlargest(
        MOST_KEY_LABELS, limited, key=lambda one: usage.used(one.name).tokens / (one.tokens_per_month or 1)
    )
    for key in most_used:
        used.add_metric([key.name], usage.used(key.name).tokens)
        quota.add_metric([key.name], key.tokens_per_month or 0)
    yield used
    yield quota


def _shadow(shadow: Shadow, model: str) -> Iterator[Metric]:
    found = shadow.divergence
    for name, documentation, value in (
        ("lowbit_shadow_kld", "Estimated KL divergence from the base in nats per served token.", found.mean),
        ("lowbit_shadow_kld_stderr", "Standard error of lowbit_shadow_kld over answers.", found.stderr),
        (
            "lowbit_shadow_remainder",
            "The base's probability outside the tokens compared.",
            found.mean_remainder,
        ),
        ("lowbit_shadow_waiting", "Answers that wait to be scored.", float(shadow.waiting)),
    ):
        gauge = GaugeMetricFamily(name, documentation, labels=["model"])
        if value is not None:
            gauge.add_metric([model], value)
        yield gauge
    for name, documentation, total in (
        ("lowbit_shadow_nats", "Sum of the estimated KL divergence over scored tokens.", found.nats),
        ("lowbit_shadow_tokens", "Served tokens that both models have scored.", float(found.tokens)),
    ):
        counter = CounterMetricFamily(name, documentation, labels=["model"])
        counter.add_metric([model], total)
        yield counter
    outcomes = CounterMetricFamily(
        "lowbit_shadow_answers", "Drawn answers by what became of them.", labels=["outcome"]
    )
    for outcome, count in sorted(shadow.outcomes.items()):
        outcomes.add_metric([outcome], count)
    yield outcomes
