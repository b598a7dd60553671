"""Makes the schedule of one run from a scenario."""

from collections.abc import Sequence

from lowbit_core.errors import ConfigError
from lowbit_loadtest.generate.arrivals import Draw, OpenArrivals, draw_lengths, generator, send_times_s
from lowbit_loadtest.generate.driver import Share
from lowbit_loadtest.generate.http.target import Target
from lowbit_loadtest.generate.prompts import PromptMaker, Turns
from lowbit_loadtest.generate.schedule import Job, Schedule, Turn
from lowbit_loadtest.generate.tokens import Counter
from lowbit_loadtest.generate.traces import read_trace
from lowbit_loadtest.scenario import Closed, Conversations, Output, Poisson, Ramp, Replay, Scenario, Text

POOL_REQUESTS = 512  # distinct prompts of a closed loop that runs for a time and not for a count


def whole_share(scenario: Scenario, target: Target, schedule: Schedule) -> Share:
    """How a schedule is sent; `workers.shares_of` gives each worker its jobs or streams."""
    return Share(
        target,
        (),
        temperature=scenario.temperature,
        exact=scenario.output.exact if scenario.output else False,
        repeats=schedule.repeats,
        length_s=schedule.length_s,
        warm_up_requests=schedule.warm_up_requests,
        warm_up_s=schedule.warm_up_s,
    )


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
    return Schedule(
        tuple(jobs),
        length_s=stage_s or scenario.duration_s,
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
    think_s = scenario.prompts.think_s if isinstance(scenario.prompts, Conversations) else 0.0
    jobs, seed = [], scenario.seed
    for index, (at_s, one) in enumerate(zip(times_s, turns, strict=True)):
        planned = tuple(Turn(messages, max(1, next(tokens)), think_s) for messages in one)
        jobs.append(Job(index, at_s, planned, seed))
        seed += len(planned)
    return jobs
