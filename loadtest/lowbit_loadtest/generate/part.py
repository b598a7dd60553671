"""One part of a plan: several machines send one load, each its share of the requests that all of them have planned.

Every part makes the whole plan from the seed, so that arrival i has the same time, words and seed whatever the number
of parts, and keeps each N-th arrival, or each N-th stream of a closed loop. A digest of the whole plan tells whether
parts belong together: it differs with the seed, the scenario, the files behind it, and the tokenizer that counted.
"""

import hashlib
import json
import re
from dataclasses import asdict, dataclass, replace

from lowbit_core.errors import ConfigError
from lowbit_loadtest.generate.schedule import Schedule

MOST_PARTS = 10_000


@dataclass(frozen=True)
class Part:
    """Part `number` of `of`, counted from 1."""

    number: int = 1
    of: int = 1

    def __str__(self) -> str:
        return f"{self.number}/{self.of}"


WHOLE = Part()


def parse_part(text: str) -> Part:
    """`2/3`; ConfigError for anything else."""
    found = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text)
    part = Part(int(found[1]), int(found[2])) if found else Part(0, 0)
    if not 1 <= part.number <= part.of <= MOST_PARTS:
        raise ConfigError(
            f"--part {text!r} is none; give I/N with I from 1 to N, such as 1/4, 2/4, 3/4 and 4/4"
        )
    return part


def own_part(schedule: Schedule, part: Part) -> Schedule:
    """What this part sends of a schedule; ConfigError where nothing would be left for one of the parts."""
    streams = schedule.concurrency
    shared, word = (len(schedule.jobs), "arrivals") if streams is None else (streams, "streams")
    if shared < part.of:
        raise ConfigError(f"--part {part}: the plan has {shared} {word}; give at most {shared} parts")
    first, step = part.number - 1, part.of
    if streams is None:
        return replace(schedule, jobs=schedule.jobs[first::step])
    return replace(schedule, concurrency=len(range(first, streams, step)), first=first, step=step)


def digest(schedule: Schedule) -> str:
    """A digest of everything that is sent, and when."""
    found = hashlib.sha256()
    for job in schedule.jobs:
        found.update(json.dumps(asdict(job), sort_keys=True).encode())
    rest = (
        schedule.concurrency, schedule.repeats, schedule.length_s, schedule.warm_up_requests, schedule.warm_up_s,
    )  # fmt: skip
    found.update(json.dumps(rest).encode())
    return found.hexdigest()
