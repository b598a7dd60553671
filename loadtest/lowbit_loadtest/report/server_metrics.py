"""The server's own metrics beside ours: scraped from /metrics once a second, if the server has it.

Counters give what the server did during the run; gauges their mean and maximum. Several labels are added up, except
shares, of which the largest counts. Energy is a counter of joules where there is one (DCGM's of GPUs, RAPL's of
processors), else the integral of the power between scrapes. The scraper has its own thread in the parent process, away
from the clocks.
"""

import threading
import time
from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import httpx
import numpy as np
from prometheus_client.parser import text_string_to_metric_families

from lowbit_loadtest.generate.http.target import Target, open_beside
from lowbit_loadtest.generate.records import Outcome, RequestRecord

COUNTERS = {
    "vllm:prompt_tokens_total": "prompt_tokens",
    "vllm:generation_tokens_total": "generation_tokens",
    "vllm:num_preemptions_total": "preemptions",
    "vllm:prefix_cache_queries_total": "prefix_cache_queries_tokens",
    "vllm:prefix_cache_hits_total": "prefix_cache_hits_tokens",
}
GAUGES = {
    "vllm:num_requests_running": "requests_running",
    "vllm:num_requests_waiting": "requests_waiting",
    "vllm:kv_cache_usage_perc": "kv_cache_usage",
    "lowbit_generation_tokens_per_second": "generation_tokens_per_s",
    "lowbit_prompt_tokens_per_second": "prompt_tokens_per_s",
    "lowbit_requests_active": "requests_active",
}
JOULES = {  # counters, and what one of them is in joules
    "DCGM_FI_DEV_TOTAL_ENERGY_CONSUMPTION": 1e-3,
    "node_rapl_package_joules_total": 1.0,
    "node_rapl_dram_joules_total": 1.0,
    "kepler_node_cpu_joules_total": 1.0,
    "kepler_node_gpu_joules_total": 1.0,
}
WATTS = {
    "DCGM_FI_DEV_POWER_USAGE": 1.0,
    "nvidia_smi_power_draw_watts": 1.0,
}  # gauges, and what one is in watts
ENERGY, POWER = "energy_joules", "power_watts"
SHARES = ("kv_cache_usage",)
MEMORY = "lowbit_memory_bytes"
NAMES = (
    *COUNTERS,
    *GAUGES,
    *JOULES,
    *WATTS,
    MEMORY,
)  # only these lines are parsed: a whole page of vLLM's takes 25 ms of a core

Values = dict[str, float]


def parse_metrics(text: str) -> Values:
    """The metrics above, by our short names; what a server does not have is absent. ValueError for another format."""
    found: defaultdict[str, float] = defaultdict(float)
    wanted = "".join(line + "\n" for line in text.splitlines() if line.startswith(NAMES))
    for sample in (one for family in text_string_to_metric_families(wanted) for one in family.samples):
        short = COUNTERS.get(sample.name) or GAUGES.get(sample.name)
        if sample.name == MEMORY and "component" in sample.labels:
            short = f"memory_{sample.labels['component']}_bytes"
        if sample.name in JOULES:
            found[ENERGY] += JOULES[sample.name] * sample.value
        elif sample.name in WATTS:
            found[POWER] += WATTS[sample.name] * sample.value
        elif short in SHARES:
            found[short] = max(found[short], sample.value)
        elif short is not None:
            found[short] += sample.value
    return dict(found)


class Scraper:
    """Context manager: samples before, every `every_s` during, and after a run."""

    def __init__(self, target: Target, every_s: float = 1.0) -> None:
        self._http = open_beside(target)
        self._every_s = every_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._loop, daemon=True)
        self.samples: list[Values] = []
        self.times_s: list[float] = []

    def __enter__(self) -> "Scraper":
        if self._scrape():
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()
            self._scrape()
        self._http.close()

    def _loop(self) -> None:
        while not self._stop.wait(self._every_s):
            self._scrape()

    def _scrape(self) -> bool:
        with suppress(httpx.HTTPError, OSError, ValueError):
            response = self._http.get("/metrics")
            if response.status_code == httpx.codes.OK and (values := parse_metrics(response.text)):
                self.samples.append(values)
                self.times_s.append(time.monotonic())
                return True
        return False

    def summary(self) -> dict[str, Any] | None:
        """Counters as increases over the run, gauges as mean and max; None without two samples."""
        return summarize_samples(self.samples, self.times_s)


def summarize_samples(samples: Sequence[Values], times_s: Sequence[float]) -> dict[str, Any] | None:
    """What happened between the first sample and the last; None of fewer than two."""
    if len(samples) < 2:
        return None
    first, last = samples[0], samples[-1]
    result: dict[str, Any] = {}
    for name in last:
        series = [sample[name] for sample in samples if name in sample]
        if name in (*COUNTERS.values(), ENERGY):
            result[name] = last[name] - first.get(name, 0.0)
        else:
            result[name] = {"mean": float(np.mean(series)), "max": float(np.max(series))}
    if POWER in last and ENERGY not in last:
        known = [
            (at_s, sample[POWER]) for at_s, sample in zip(times_s, samples, strict=True) if POWER in sample
        ]
        result[ENERGY] = float(np.trapezoid([watts for _, watts in known], [at_s for at_s, _ in known]))
    return result


@dataclass(frozen=True)
class UsageCheck:
    """The answers' usage against the server's counters; `agrees` is None where that cannot be decided."""

    usage_tokens: int
    counter_tokens: int
    agrees: bool | None


def check_usage(server: dict[str, Any] | None, records: Sequence[RequestRecord]) -> UsageCheck | None:
    """Output tokens claimed in `usage` and counted in /metrics; None without that counter.

    Equal when every request completed with usage. Requests that ended otherwise have tokens that only the counter
    knows: then the counter must not be below the claims, and more cannot be said.
    """
    if server is None or "generation_tokens" not in server:
        return None
    claimed = sum(record.output_tokens or 0 for record in records)
    counted = round(server["generation_tokens"])
    whole = all(
        record.outcome is Outcome.COMPLETED and record.output_tokens is not None for record in records
    )
    agrees: bool | None = claimed == counted if whole else (False if counted < claimed else None)
    return UsageCheck(claimed, counted, agrees)
