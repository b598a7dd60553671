"""The schedule of one run: every request with its send time, its words and its limits, before the first is sent."""

from collections.abc import Sequence
from dataclasses import dataclass

from lowbit_core.errors import ConfigError
from lowbit_loadtest.generate.arrivals import Draw, OpenArrivals, draw_lengths, generator, send_times_s
from lowbit_loadtest.generate.client import Message
from lowbit_loadtest.generate.prompts import PromptMaker, Turns
from lowbit_loadtest.generate.tokens import Counter
from lowbit_loadtest.generate.traces import read_trace
from lowbit_loadtest.scenario import Closed, Conversations, Output, Poisson, Ramp, Replay, Scenario, Text

POOL_REQUESTS = 512  # distinct prompts of a closed loop that runs for a time and not for a count


@dataclass(frozen=True)
class Turn:
    """One request of a conversation: the messages that it adds, and its output limit in tokens."""

    messages: tuple[Message, ...]
    max_tokens: int


@dataclass(frozen=True)
class Job:
    """One arrival: a request, or a conversation of several. `at_s` counts from the start; None in a closed loop."""

    index: int
    at_s: float | None
    turns: tuple[Turn, ...]
    seed: int


@dataclass(frozen=True)
class Schedule:
    """One run. `offered_rps` is the arrival rate of requests; `length_s` the scheduled length, if any.

    A closed loop has `concurrency` streams and starts over with the jobs when `repeats`.
    """

    jobs: tuple[Job, ...]
    concurrency: int | None = None
    repeats: bool = False
    length_s: float | None = None
    offered_rps: float | None = None
    think_s: float = 0.0
    warm_up_requests: int = 0
    warm_up_s: float = 0.0
    cut_to_limits: int = 0  # a replay's rows whose lengths were cut

    @property
    def requests(self) -> int | None:
        """How many requests are planned; None when the length decides."""
        return None if self.repeats else sum(len(job.turns) for job in self.jobs)


async def make_schedule(
    scenario: Scenario, counter: Counter, repetition: int = 0, rate_rps: float | None = None, stage: int = 0
) -> Schedule:
    """The schedule of one repetition, at `rate_rps` instead of the scenario's own when given."""
    arrivals = scenario.arrivals
    maker = PromptMaker(counter, scenario.seed, (repetition, stage))
    if isinstance(arrivals, Replay):
        return await _replay(scenario, arrivals, maker)
    if isinstance(arrivals, Closed):
        count = scenario.requests or POOL_REQUESTS
        jobs = _jobs(scenario, [None] * count, await _turns(scenario, maker, count), repetition, stage)
        repeats = scenario.requests is None
        return _schedule(scenario, jobs, concurrency=arrivals.concurrency, repeats=repeats)
    rng = generator(Draw.ARRIVALS, scenario.seed, repetition, stage)
    timed: OpenArrivals
    if isinstance(arrivals, Ramp):
        timed = Poisson(kind="poisson", rate_rps=rate_rps or arrivals.start_rps)
        times_s = send_times_s(timed, rng, None, arrivals.stage_s)
    else:
        timed = arrivals if rate_rps is None else arrivals.model_copy(update={"rate_rps": rate_rps})
        times_s = send_times_s(timed, rng, scenario.requests, scenario.duration_s)
    turns = await _turns(scenario, maker, len(times_s))
    jobs = _jobs(scenario, [float(at_s) for at_s in times_s], turns, repetition, stage)
    if not jobs:
        raise ConfigError(
            f"{timed.rate_rps:g} requests/s gave none in the time; raise the rate or the duration"
        )
    return _schedule(scenario, jobs, offered_rps=timed.rate_rps)


def _schedule(scenario: Scenario, jobs: Sequence[Job], **fields: object) -> Schedule:
    stage_s = scenario.arrivals.stage_s if isinstance(scenario.arrivals, Ramp) else None
    think_s = scenario.prompts.think_s if isinstance(scenario.prompts, Conversations) else 0.0
    return Schedule(
        tuple(jobs),
        length_s=stage_s or scenario.duration_s,
        think_s=think_s,
        warm_up_requests=scenario.warm_up.requests,
        warm_up_s=scenario.warm_up.seconds,
        **fields,  # type: ignore[arg-type]
    )


async def _turns(scenario: Scenario, maker: PromptMaker, count: int) -> list[Turns]:
    return await maker.make(scenario.prompts or Text(kind="text"), count)


async def _replay(scenario: Scenario, replay: Replay, maker: PromptMaker) -> Schedule:
    trace = read_trace(replay)
    rows = trace.rows[: scenario.requests]
    if scenario.duration_s is not None:
        rows = tuple(row for row in rows if row.at_s < scenario.duration_s)
    turns = await (maker.of_trace(rows) if scenario.prompts is None else _turns(scenario, maker, len(rows)))
    from_trace = scenario.output is None and all(len(one) == 1 for one in turns)
    limits = [row.output_tokens for row in rows] if from_trace else None
    jobs = _jobs(scenario, [row.at_s for row in rows], turns, 0, 0, limits)
    span_s = rows[-1].at_s
    rate_rps = len(rows) / span_s if span_s > 0 else None
    return _schedule(scenario, jobs, offered_rps=rate_rps, cut_to_limits=trace.cut_to_limits)


def _jobs(
    scenario: Scenario,
    times_s: Sequence[float | None],
    turns: Sequence[Turns],
    repetition: int,
    stage: int,
    limits: list[int] | None = None,
) -> list[Job]:
    """Joins times, words and output limits; each request has its own seed, so that repeated prompts may differ."""
    needed = sum(map(len, turns))
    output = scenario.output or Output()
    rng = generator(Draw.OUTPUT_LENGTHS, scenario.seed, repetition, stage)
    tokens = iter(limits or draw_lengths(output.tokens, rng, needed))
    jobs, seed = [], scenario.seed
    for index, (at_s, one) in enumerate(zip(times_s, turns, strict=True)):
        planned = tuple(Turn(messages, max(1, next(tokens))) for messages in one)
        jobs.append(Job(index, at_s, planned, seed))
        seed += len(planned)
    return jobs
