"""Results of `vllm bench serve --save-result`, with the requests where `--save-detailed` was given.

Written from vllm/benchmarks/serve.py (vLLM 0.32). `ttfts`, `itls`, `latencies` (seconds), `output_lens` and `errors`
have one entry a request, failed ones too, whose times mean nothing. A failure has an error, or, where the server gave
no reason, at least no output; if that does not add up to `failed`, the requests are not used. `latencies` stays in the
short form too, where nothing says which of them failed: it is not read there. A percentile that was not asked for is
absent, and zeros stand where nothing was measured: both are missing here. `--append-result` writes one object a line.
"""

from typing import Any

from lowbit_loadtest.compare.side import (
    COMPLETED,
    FAILED,
    OUTPUT_RATE,
    REJECTED,
    At,
    Key,
    Load,
    Request,
    Side,
    counted,
)

TOOL = "vllm bench serve"
METRICS = {"ttft_s": "ttft", "tpot_s": "tpot", "e2e_s": "e2el"}
STATISTICS = {"p50": ("p50", "median"), "p95": ("p95",)}
DETAILS = ("ttfts", "itls", "output_lens", "errors")
FULL = (
    "too many requests",
    "service unavailable",
)  # `errors` has the reason of the HTTP status, or a traceback

Document = dict[str, Any]


def reads(document: Any) -> bool:
    lines = document if isinstance(document, list) else [document]
    return bool(lines) and all(
        isinstance(line, dict) and {"completed", "request_throughput", "duration"} <= line.keys()
        for line in lines
    )


def read(document: Document | list[Document], name: str) -> Side:
    """The result, or those of a file with one a line: of the same load they are repetitions."""
    lines = document if isinstance(document, list) else [document]
    loads: dict[At, list[Document]] = {}
    for line in lines:
        loads.setdefault(_at(line), []).append(line)
    missing: tuple[str, ...] = ()
    if not all(_is_detailed(line) for line in lines):
        missing = ("its requests (--save-detailed keeps them), so its latencies have no intervals",)
    elif any(_failures(line) is None for line in lines):
        missing = ("which of its requests failed, so its latencies have no intervals",)
    return Side(TOOL, tuple(_load(at, runs) for at, runs in loads.items()), missing=missing)


def _at(line: Document) -> At:
    rate, streams = line.get("request_rate"), line.get("max_concurrency")
    at = (("requests/s", float(rate)),) if isinstance(rate, int | float) else ()
    return at or ((("streams", float(streams)),) if streams else ())


def _load(at: At, runs: list[Document]) -> Load:
    rates = tuple(run.get("output_throughput") or 0.0 for run in runs)
    if all(_is_detailed(run) and _failures(run) is not None for run in runs):
        requests = {
            key: one for number, run in enumerate(runs) for key, one in _requests(run, number).items()
        }
        return Load(at, counted(requests), requests, per_repetition={OUTPUT_RATE: rates})
    completed, failed = (sum(_counts(run)[place] for run in runs) for place in (0, 1))
    statistics = _statistics(runs[0]) if len(runs) == 1 else {}
    return Load(at, {COMPLETED: completed, FAILED: failed}, None, statistics, {OUTPUT_RATE: rates})


def _counts(run: Document) -> tuple[int, int]:
    """Completed and failed; older versions say only how many completed of how many prompts."""
    completed = int(run["completed"])
    failed = run.get("failed")
    return completed, max(0, run.get("num_prompts", completed) - completed) if failed is None else int(failed)


def _is_detailed(run: Document) -> bool:
    return all(isinstance(run.get(name), list) for name in DETAILS)


def _failures(run: Document) -> set[int] | None:
    """Places of the failed requests; None where the file does not tell."""
    with_error = {place for place, error in enumerate(run["errors"]) if error}
    empty = {place for place, tokens in enumerate(run["output_lens"]) if not tokens}
    failed = _counts(run)[1]
    return next((one for one in (with_error, with_error | empty) if len(one) == failed), None)


def _requests(run: Document, repetition: int) -> dict[Key, Request]:
    failures = _failures(run) or set()
    ends_s = run.get("latencies") or [None] * len(run["ttfts"])
    entries = zip(run["ttfts"], run["itls"], run["output_lens"], ends_s, strict=True)
    return {
        (repetition, place, 0): _failure(run["errors"][place])
        if place in failures
        else _answer(ttft_s, sum(gaps_s), tokens, end_s)
        for place, (ttft_s, gaps_s, tokens, end_s) in enumerate(entries)
    }


def _failure(error: str) -> Request:
    return Request(REJECTED if error.strip().lower() in FULL else FAILED)


def _answer(ttft_s: float, gaps_s: float, tokens: int, end_s: float | None) -> Request:
    """As the tool computes it: end to end is the first token and all gaps; per token, the gaps over tokens − 1."""
    streamed = ttft_s > 0
    whole_s = end_s or (ttft_s + gaps_s if streamed else None)
    per_token_s = (whole_s - ttft_s) / (tokens - 1) if streamed and whole_s and tokens > 1 else None
    return Request.of(COMPLETED, ttft_s=ttft_s if streamed else None, tpot_s=per_token_s, e2e_s=whole_s)


def _statistics(run: Document) -> dict[tuple[str, str], float]:
    found = {}
    for metric, theirs in METRICS.items():
        for statistic, words in STATISTICS.items():
            values = [run.get(f"{word}_{theirs}_ms") for word in words]
            value = next((one for one in values if one), None)
            if run["completed"] and value is not None:
                found[metric, statistic] = value / 1000
    return found
