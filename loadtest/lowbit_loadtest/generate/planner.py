"""Makes the schedule of one run from a scenario: the same one every time, and in every part of it (`--part`)."""

from collections.abc import Sequence
from dataclasses import replace

from lowbit_core.errors import ConfigError
from lowbit_loadtest.generate.arrivals import Draw, OpenArrivals, draw_lengths, generator, send_times_s
from lowbit_loadtest.generate.driver import Share
from lowbit_loadtest.generate.http.target import Target
from lowbit_loadtest.generate.prompts import PlannedSession, PromptMaker
from lowbit_loadtest.generate.replay import play
from lowbit_loadtest.generate.schedule import Job, Recording, Schedule, Turn
from lowbit_loadtest.generate.tokens import Counter
from lowbit_loadtest.scenario import Scenario
from lowbit_loadtest.sections.arrivals import AtOnce, Closed, Ramp, Replay
from lowbit_loadtest.sections.distributions import Lengths
from lowbit_loadtest.sections.prompts import FilePrompts, Text

POOL_REQUESTS = 512  # distinct prompts of a closed loop that runs for a time and not for a count
DEFAULT_OUTPUT = Lengths(mean=128)


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
    scenario: Scenario, counter: Counter, repetition: int = 0, stage: int = 0
) -> Schedule:
    """The schedule of one repetition; a ramp is one of its stages by now (`rates.at_rate`)."""
    arrivals = scenario.arrivals
    maker = PromptMaker(counter, scenario.seed, (repetition, stage))
    match arrivals:
        case Replay():
            return await _replay(scenario, arrivals, maker)
        case Closed():
            count = scenario.requests or POOL_REQUESTS
            jobs, recording = await _jobs(scenario, maker, [None] * count)
            repeats = scenario.requests is None
            return _schedule(scenario, jobs, recording, concurrency=arrivals.concurrency, repeats=repeats)
        case AtOnce():
            jobs, recording = await _jobs(scenario, maker, [None] * (scenario.requests or 1))
            return _schedule(scenario, jobs, recording, concurrency=len(jobs))
        case Ramp():
            raise ValueError("a ramp has stages; `rates.at_rate` makes the scenario of one")
    return await _open_loop(scenario, arrivals, maker)


async def _open_loop(scenario: Scenario, arrivals: OpenArrivals, maker: PromptMaker) -> Schedule:
    rng = generator(Draw.ARRIVALS, scenario.seed, *maker.salt)
    times_s = send_times_s(arrivals, rng, scenario.requests, scenario.duration_s)
    if not times_s.size:
        raise ConfigError(
            f"{arrivals.rate_rps:g} requests/s gave none in the time; raise the rate or the duration"
        )
    jobs, recording = await _jobs(scenario, maker, [float(at_s) for at_s in times_s])
    return _schedule(scenario, jobs, recording, offered_rps=arrivals.rate_rps)


def _schedule(
    scenario: Scenario, jobs: Sequence[Job], recording: Recording | None, **fields: object
) -> Schedule:
    return Schedule(
        tuple(jobs),
        length_s=scenario.duration_s,
        warm_up_requests=scenario.warm_up.requests,
        warm_up_s=scenario.warm_up.seconds,
        recording=recording,
        **fields,  # type: ignore[arg-type]
    )


async def _replay(scenario: Scenario, arrivals: Replay, maker: PromptMaker) -> Schedule:
    """The recording's times; its words or lengths too, unless the scenario has `prompts` of its own."""
    played = play(arrivals, scenario.requests, scenario.duration_s)
    if scenario.prompts is None:
        prompts = FilePrompts(kind="file", path=arrivals.path)
        sessions = await maker.of_recording(played.sessions, prompts.think_s, prompts.tool_s)
    else:
        made, _ = await maker.make(scenario.prompts, len(played.sessions))
        recorded = [session.turns[-1].output_tokens for session in played.sessions]
        sessions = [_answered(one, tokens) for one, tokens in zip(made, recorded, strict=True)]
    jobs = _planned(scenario, maker.salt, played.times_s, sessions)
    span_s = played.times_s[-1]
    rate_rps = len(jobs) / span_s if span_s > 0 else None
    return _schedule(scenario, jobs, played.recording, offered_rps=rate_rps)


def _answered(session: PlannedSession, output_tokens: int | None) -> PlannedSession:
    """A single request, with the length that the recording has for it."""
    if len(session.turns) > 1 or session.turns[0].output_tokens is not None:
        return session
    return replace(session, turns=(replace(session.turns[0], output_tokens=output_tokens),))


async def _jobs(
    scenario: Scenario, maker: PromptMaker, times_s: Sequence[float | None]
) -> tuple[list[Job], Recording | None]:
    sessions, recording = await maker.make(scenario.prompts or Text(kind="text"), len(times_s))
    return _planned(scenario, maker.salt, times_s, sessions), recording


def _planned(
    scenario: Scenario,
    salt: tuple[int, ...],
    times_s: Sequence[float | None],
    sessions: Sequence[PlannedSession],
) -> list[Job]:
    """Joins times, words and output limits; each request has its own seed, so that repeated prompts may differ."""
    given = scenario.output.tokens if scenario.output else None
    rng = generator(Draw.OUTPUT_LENGTHS, scenario.seed, *salt)
    drawn = iter(draw_lengths(given or DEFAULT_OUTPUT, rng, sum(len(one.turns) for one in sessions)))
    jobs, seed = [], scenario.seed
    for index, (at_s, session) in enumerate(zip(times_s, sessions, strict=True)):
        turns = []
        for turn in session.turns:
            tokens = next(drawn)
            if given is None and turn.output_tokens is not None:
                tokens = turn.output_tokens
            turns.append(Turn(turn.messages, max(1, tokens), turn.pause_s, turn.answer))
        jobs.append(Job(index, at_s, tuple(turns), seed, session.tools))
        seed += len(turns)
    return jobs
