"""The knees of a sweep: one for each combination of the keys after the first, along the first."""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from lowbit_loadtest.generate.records import Interval, Outcome, RequestRecord
from lowbit_loadtest.report.knee import FEW, FEWEST, Knee, find_knee
from lowbit_loadtest.report.result import Point
from lowbit_loadtest.report.statistics import Floats
from lowbit_loadtest.report.summary import Run
from lowbit_loadtest.scenario import Scenario

SLICES = 8  # of each window
MEASURES = {  # what throughput is, along each key
    "concurrency": "output_tokens_per_s",
    "rate_rps": "requests_per_s",
    "prompt_tokens": "total_tokens_per_s",
    "output_tokens": "total_tokens_per_s",
}


def knees_of(scenario: Scenario, points: Sequence[Point]) -> tuple[Knee, ...]:
    """Empty for a run that is no sweep."""
    if scenario.sweep is None:
        return ()
    along = next(iter(scenario.sweep.axes))
    groups: dict[tuple[tuple[str, float], ...], list[Point]] = {}
    for point in points:
        rest = tuple((name, value) for name, value in point.setting.items() if name != along)
        groups.setdefault(rest, []).append(point)
    return tuple(_knee(along, dict(rest), group) for rest, group in groups.items())


def _knee(along: str, at: dict[str, float], points: Sequence[Point]) -> Knee:
    """Points without a window, or that are not believed, are left out."""
    used = [point for point in points if point.valid and all(run.window is not None for run in point.runs)]
    measure = MEASURES[along]
    if any(getattr(point.summary, measure) is None for point in used):
        measure = "requests_per_s"  # the server does not count tokens
    if len(used) < FEWEST:
        left_out = f"; {len(points) - len(used)} of {len(points)} were not valid or never steady"
        return Knee(
            along, at, measure, None, None, None, {}, FEW + (left_out if len(used) < len(points) else "")
        )
    xs = [point.setting[along] for point in used]
    slices = [np.stack([throughput_of_slices(run, measure) for run in point.runs]) for point in used]
    return find_knee(along, at, measure, xs, slices)


def throughput_of_slices(run: Run, measure: str) -> Floats:
    """Throughput in equal parts of the run's window; their mean is that of the whole window."""
    assert run.window is not None
    edges = np.linspace(run.window.start_s, run.window.end_s, SLICES + 1)
    completed = [record for record in run.records if record.outcome is Outcome.COMPLETED]
    if measure == "requests_per_s":
        parts = [Interval(float(start_s), float(end_s)) for start_s, end_s in pairwise(edges)]
        done = [sum(part.share(one.sent_s, one.ended_s) for one in completed) for part in parts]
        return np.array(done) / np.diff(edges)
    times_s, tokens = _tokens(completed, prompts=measure == "total_tokens_per_s")
    counted, _ = np.histogram(times_s, bins=edges, weights=tokens)
    return counted.astype(np.float64) / np.diff(edges)


def _tokens(records: Sequence[RequestRecord], prompts: bool) -> tuple[list[float], list[float]]:
    """When tokens came: an answer's with its chunks, a prompt's with the first of them."""
    times_s: list[float] = []
    tokens: list[float] = []
    for record in records:
        chunks = record.chunk_times_s or (record.ended_s,)
        times_s += chunks
        tokens += [(record.output_tokens or 0) / len(chunks)] * len(chunks)
        if prompts:
            times_s.append(chunks[0])
            tokens.append(float(record.prompt_tokens or 0))
    return times_s, tokens
