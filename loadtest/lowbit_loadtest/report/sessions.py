"""The numbers of sessions: conversations and agents, whose requests wait for one another. Pure arithmetic.

A session's time to finish is from when its first request was due to the end of its last answer: people's and tools'
time included, because that is what its deadline counts. The share of the prefix in cache is over the later requests of
a session: the prefix is the prompt before and its answer, which a server that forgets nothing need not compute again.
Templates may leave parts of an answer out (reasoning), so that a share of 1 cannot always be reached.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from lowbit_loadtest.generate.records import Outcome, RequestRecord
from lowbit_loadtest.report.statistics import Distribution, Sample, distribution
from lowbit_loadtest.report.summary import Run
from lowbit_loadtest.scenario import SLO

Session = Sequence[RequestRecord]  # its requests in order


@dataclass(frozen=True)
class Sessions:
    """The sessions of one point. Shares are None where the server does not say what it found in its cache."""

    sessions: int  # measured: those whose first request came after the warm-up
    finished: int  # every planned request completed
    time_to_finish_s: Distribution | None
    waiting_s: Distribution | None  # of that time, what was spent on answers
    requests_per_session: float | None
    cached_prompt_share: float | None  # of all prompt tokens
    cached_prefix_share: float | None  # of the tokens that an earlier request of the session had or got
    deadline_s: float | None
    attainment: float | None  # share of the sessions that finished within the deadline
    goodput_per_s: float | None  # such sessions a second


def sessions_of(runs: Sequence[Run], slo: SLO) -> Sessions:
    """The sessions of all repetitions."""
    grouped = [_grouped(run) for run in runs]
    every = [session for group in grouped for session in group]
    finished = [session for session in every if is_finished(session)]
    good = [one for one in finished if slo.session_s is not None and time_to_finish_s(one) <= slo.session_s]
    seconds = sum(_span_s(run) for run in runs)
    has_deadline = slo.session_s is not None and bool(every)
    return Sessions(
        sessions=len(every),
        finished=len(finished),
        time_to_finish_s=_spread(
            [[time_to_finish_s(one) for one in group if is_finished(one)] for group in grouped]
        ),
        waiting_s=_spread([[waiting_s(one) for one in group if is_finished(one)] for group in grouped]),
        requests_per_session=sum(map(len, every)) / len(every) if every else None,
        cached_prompt_share=_share([pair for session in every for pair in _prompts(session)]),
        cached_prefix_share=_share([pair for session in every for pair in _prefixes(session)]),
        deadline_s=slo.session_s,
        attainment=len(good) / len(every) if has_deadline else None,
        goodput_per_s=len(good) / seconds if has_deadline and seconds > 0 else None,
    )


def is_finished(session: Session) -> bool:
    """Whether every request that was planned completed."""
    return len(session) == session[0].turns and all(one.outcome is Outcome.COMPLETED for one in session)


def time_to_finish_s(session: Session) -> float:
    """From when the first request was due to the end of the last answer."""
    return session[-1].ended_s - session[0].due_s


def waiting_s(session: Session) -> float:
    """The sum of its requests' latencies."""
    return sum(one.end_to_end_s for one in session)


def _grouped(run: Run) -> list[Session]:
    """In order of time. A request's index is its session's; a session belongs where its first request does."""
    found: defaultdict[int, list[RequestRecord]] = defaultdict(list)
    for record in run.records:
        found[record.index].append(record)
    ordered = [sorted(one, key=lambda record: record.turn) for one in found.values()]
    return [one for one in sorted(ordered, key=lambda one: one[0].due_s) if not one[0].warm_up]


def _span_s(run: Run) -> float:
    """From the first measured request to the last end: a session that began in the window counts where it ends."""
    measured = run.measured
    if not measured:
        return 0.0
    return max(one.ended_s for one in measured) - min(one.due_s for one in measured)


def _spread(repetitions: Sequence[Sequence[float]]) -> Distribution | None:
    return distribution([Sample.of([(value,) for value in values]) for values in repetitions])


def _prompts(session: Session) -> list[tuple[int, int]]:
    return [
        (one.cached_tokens, one.prompt_tokens)
        for one in session
        if one.cached_tokens is not None and one.prompt_tokens is not None
    ]


def _prefixes(session: Session) -> list[tuple[int, int]]:
    """Cached and possible tokens of each request but the first."""
    pairs = []
    for before, one in pairwise(session):
        if (
            one.cached_tokens is not None
            and before.prompt_tokens is not None
            and before.output_tokens is not None
        ):
            prefix = before.prompt_tokens + before.output_tokens
            pairs.append((min(one.cached_tokens, prefix), prefix))
    return pairs


def _share(pairs: Sequence[tuple[int, int]]) -> float | None:
    whole = sum(possible for _, possible in pairs)
    return sum(cached for cached, _ in pairs) / whole if whole else None
