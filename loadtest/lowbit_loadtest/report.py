"""Shows a run: progress and a few lines for people on stderr, one JSON object for programs.

It formats what `metrics` computed and computes nothing.
"""

import json
import os
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import httpx
from rich.console import Console
from rich.progress import Progress

from lowbit_core import __version__
from lowbit_core.log import get_logger
from lowbit_loadtest.metrics import Distribution, Outcome, RequestRecord, Summary
from lowbit_loadtest.runner import Options, Result

log = get_logger("loadtest")

PROGRESS_LINES = 10  # without a terminal: one line for each tenth


@contextmanager
def progress(requests: int) -> Iterator[Callable[[RequestRecord], None]]:
    """A callback for each ended request: a bar on a terminal, a line for each tenth elsewhere."""
    console = Console(stderr=True)
    if console.is_terminal:
        with Progress(console=console, transient=True) as bar:
            task = bar.add_task("requests", total=requests)
            yield lambda record: bar.advance(task)
    else:
        yield _line_for_each_tenth(requests)


def _line_for_each_tenth(requests: int) -> Callable[[RequestRecord], None]:
    ended = completed = 0

    def count(record: RequestRecord) -> None:
        nonlocal ended, completed
        ended += 1
        completed += record.outcome is Outcome.COMPLETED
        if ended * PROGRESS_LINES // requests > (ended - 1) * PROGRESS_LINES // requests:
            log.info("%d of %d requests ended, %d completed", ended, requests, completed)

    return count


def as_json(options: Options, result: Result, started: str) -> str:
    """The result as one line: what was asked, by what client, and what was measured."""
    return json.dumps(
        {
            "kind": "lowbit.loadtest",
            "started": started,
            "scenario": _scenario(options, result.model),
            "client": {
                "lowbit": __version__,
                "python": platform.python_version(),
                "httpx": httpx.__version__,
                "machine": platform.machine(),
                "cpus": os.cpu_count(),
            },
            **asdict(result.summary),
        },
        ensure_ascii=False,
        allow_nan=False,
    )


def _scenario(options: Options, model: str) -> dict[str, Any]:
    return {
        "loop": "closed",
        "target": options.target,
        "model": model,
        "concurrency": options.concurrency,
        "requests": options.requests,
        "distinct_prompts": len(set(map(repr, options.prompts))),
        "max_tokens": options.max_tokens,
        "temperature": options.temperature,
        "seed": options.seed,
        "timeout_s": options.timeout_s,
    }


def lines(summary: Summary) -> list[str]:
    """The result for people."""
    counts = ", ".join(f"{count} {name}" for name, count in summary.outcomes.items())
    return [
        f"{summary.requests} requests in {summary.duration_s:.1f} s: {counts}",
        *(f"  {count} × {detail}" for detail, count in list(summary.details.items())[:5]),
        *_rates(summary),
        _row("time to first token", summary.ttft_s),
        _row("inter-token latency", summary.inter_token_latency_s),
        _row("time per output token", summary.time_per_output_token_s),
        _row("end to end", summary.end_to_end_s),
    ]


def _rates(summary: Summary) -> list[str]:
    if summary.requests_per_s is None:
        return ["no steady interval: send more requests for each stream"]
    rates = [
        f"{summary.requests_per_s:.2f} requests/s over a steady interval of {summary.steady_interval_s:.1f} s"
    ]
    if summary.output_tokens_per_s is not None:
        rates.append(f"{summary.output_tokens_per_s:.1f} output tokens/s by the server's count")
    else:
        rates.append(f"output tokens/s unknown: {summary.completed_without_usage} answers came without usage")
    return rates


def _row(name: str, values: Distribution | None) -> str:
    if values is None:
        return f"{name:<22} not measured"
    parts = (("mean", values.mean), ("p50", values.p50), ("p95", values.p95), ("p99", values.p99))
    return f"{name:<22} " + "  ".join(f"{label} {1000 * value:8.1f} ms" for label, value in parts)
