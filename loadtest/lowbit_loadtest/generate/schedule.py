"""The schedule of one run: every request with its send time, its words and its limits, before the first is sent.

Workers import this file, so it imports neither numpy nor pydantic; `planner.py` makes schedules.
"""

from dataclasses import dataclass

from lowbit_loadtest.generate.request import Message


@dataclass(frozen=True)
class Turn:
    """One request of a session: the messages that it adds, and its output limit in tokens.

    It is due `pause_s` after the answer before it: a person thinks, or a tool works. `answer` has the keys that the
    next turn needs in this turn's answer whatever the server says, such as the calls whose results come next.
    """

    messages: tuple[Message, ...]
    max_tokens: int
    pause_s: float = 0.0
    answer: Message | None = None


@dataclass(frozen=True)
class Job:
    """One arrival: a request, or a session of several. `at_s` counts from the start; None in a closed loop.

    `tools` are the functions that every request of it offers to the model.
    """

    index: int
    at_s: float | None
    turns: tuple[Turn, ...]
    seed: int
    tools: tuple[Message, ...] = ()


@dataclass(frozen=True)
class Recording:
    """What a schedule took from a recorded file: how many of its sessions, and what they lacked.

    Requests recorded without output are sent with a limit of 1 token, those without a prompt with one word: no server
    takes less. `skipped` were left out because they had no output.
    """

    format: str
    recorded: int
    played: int
    cut_to_limits: int = 0
    without_prompt: int = 0
    without_output: int = 0
    skipped: int = 0


@dataclass(frozen=True)
class Schedule:
    """One run. `offered_rps` is the arrival rate of requests; `length_s` the scheduled length, if any.

    A closed loop has `concurrency` streams and starts over with the jobs when `repeats`. Its streams take the jobs
    `first`, `first + step`, …: the others are those of other parts.
    """

    jobs: tuple[Job, ...]
    concurrency: int | None = None
    repeats: bool = False
    length_s: float | None = None
    offered_rps: float | None = None
    warm_up_requests: int = 0
    warm_up_s: float = 0.0
    recording: Recording | None = None
    first: int = 0
    step: int = 1

    @property
    def requests(self) -> int | None:
        """How many requests are planned; None when the length decides."""
        return None if self.repeats else sum(len(job.turns) for job in self.jobs[self.first :: self.step])

    @property
    def planned_s(self) -> float | None:
        """From the start to the last arrival; None of a closed loop with a number of requests."""
        last_s = self.jobs[-1].at_s if self.jobs else None
        return last_s if self.length_s is None else self.length_s
