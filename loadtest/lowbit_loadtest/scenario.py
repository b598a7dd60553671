"""A scenario: when requests are sent, what they ask, and what counts as good, in strict YAML.

Unknown keys are refused with their path. Knows nothing of HTTP and of clocks. Sections that have several kinds are in
`sections/`.
"""

import math
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, field_validator, model_validator

from lowbit_core.documents import DocumentPath, Section, load_document, parse_document
from lowbit_loadtest.sections.arrivals import Arrivals, AtOnce, Closed, Constant, Gamma, Poisson, Ramp, Replay
from lowbit_loadtest.sections.distributions import LengthsOrNumber, NonNegativeFloat
from lowbit_loadtest.sections.distributions import PositiveFloat as PositiveFloat
from lowbit_loadtest.sections.prompts import Prompts, Synthetic

PositiveInt = Annotated[int, Field(ge=1)]
MOST_POINTS = 200
QUALITY_RENAMED = {
    "quality.items": "quality.limit",
    "quality.own": "quality.items_file",
    "quality.text": "quality.text_file",
}


class Output(Section):
    """`tokens` limits each answer; `exact` also asks for that many (`ignore_eos`, understood by vLLM).

    Without `tokens` answers are as long as the recording's, or 128 tokens where there is none.
    """

    tokens: LengthsOrNumber | None = None
    exact: bool = False


class SLO(Section):
    """What a good answer is, and the share of all requests that must be good."""

    ttft_s: PositiveFloat | None = None
    tpot_s: PositiveFloat | None = None
    e2e_s: PositiveFloat | None = None
    session_s: PositiveFloat | None = (
        None  # from a session's first request to its last answer, tools included
    )
    attainment: Annotated[float, Field(gt=0, le=1)] = 0.95

    @property
    def limits_s(self) -> dict[str, float]:
        limits = {"ttft_s": self.ttft_s, "tpot_s": self.tpot_s, "e2e_s": self.e2e_s}
        return {name: limit for name, limit in limits.items() if limit is not None}

    @property
    def has_limits(self) -> bool:
        """Whether anything can be missed."""
        return bool(self.limits_s) or self.session_s is not None


class Sweep(Section):
    """Every combination of these is measured, one after the other; the knee is named along the first key given."""

    concurrency: tuple[PositiveInt, ...] = ()
    rate_rps: tuple[PositiveFloat, ...] = ()
    prompt_tokens: tuple[PositiveInt, ...] = ()
    output_tokens: tuple[PositiveInt, ...] = ()

    @field_validator("concurrency", "rate_rps", "prompt_tokens", "output_tokens")
    @classmethod
    def _ascending(cls, values: tuple[float, ...]) -> tuple[float, ...]:
        if len(set(values)) < len(values):
            raise ValueError("each value stands once")
        return tuple(sorted(values))

    @property
    def axes(self) -> dict[str, tuple[float, ...]]:
        """The keys that were given, with their values in ascending order."""
        return {name: values for name in type(self).model_fields if (values := getattr(self, name))}

    @property
    def points(self) -> int:
        """How many combinations there are."""
        return math.prod(map(len, self.axes.values()))

    @model_validator(mode="after")
    def _is_a_sweep(self) -> "Sweep":
        if not self.axes:
            raise ValueError(f"give one or more of {', '.join(type(self).model_fields)}")
        if self.concurrency and self.rate_rps:
            raise ValueError(
                "concurrency is of closed arrivals and rate_rps of open ones; give one of the two"
            )
        if self.points > MOST_POINTS:
            raise ValueError(f"{self.points} combinations; at most {MOST_POINTS} are measured in one run")
        return self


class WarmUp(Section):
    """The first requests are sent and accounted for, and stay out of every number."""

    requests: int = Field(default=0, ge=0)
    seconds: NonNegativeFloat = 0.0


class Search(Section):
    """Bisect for the highest rate that meets the SLOs, until the lowest that misses them is less than that much above:
    0.1 is 10 %."""

    low_rps: PositiveFloat
    high_rps: PositiveFloat
    resolution: PositiveFloat = 0.1


class Generator(Section):
    """The load tester itself: a run with a lag p99 above `max_lag_s` is marked invalid."""

    workers: int | None = Field(default=None, ge=1, le=64)
    max_lag_s: PositiveFloat = 0.01


class Quality(Section):
    """The same questions idle and under the scenario's load: tasks by name, a file of items, held-out text, probes.

    Quality passes where the change of the share of right answers under load surely stays above −`tolerance`.
    """

    tasks: tuple[str, ...] = ("arc_easy", "hellaswag", "piqa", "sciq", "lambada")
    limit: int = Field(default=50, ge=1)  # items of each task
    tasks_dir: DocumentPath | None = None
    items_file: DocumentPath | None = None  # JSONL
    text_file: DocumentPath | None = None  # JSONL of held-out text
    texts: int = Field(default=4, ge=1)  # of each domain
    text_characters: int = Field(default=1000, ge=50)
    probes: int = Field(default=12, ge=0)  # greedy answers, every third of them JSON
    probe_tokens: int = Field(default=96, ge=1)
    concurrency: int = Field(default=4, ge=1)
    top_logprobs: int = Field(default=20, ge=1)
    tolerance: Annotated[float, Field(gt=0, lt=1)] = 0.02
    seed: int = Field(default=0, ge=0)


class Scenario(Section):
    """The whole scenario. One of `requests` and `duration_s`, except for ramp (neither), replay (at most one) and
    at_once (`requests`)."""

    description: str = ""
    arrivals: Arrivals
    prompts: Prompts | None = None
    output: Output | None = None
    slo: SLO = SLO()
    warm_up: WarmUp = WarmUp()
    requests: int | None = Field(default=None, ge=1)
    duration_s: PositiveFloat | None = None
    repetitions: int = Field(default=1, ge=1, le=100)
    seed: int = Field(default=0, ge=0)
    model: str | None = None
    temperature: NonNegativeFloat = 0.0
    timeout_s: PositiveFloat = 300.0
    api_key_env: str = "LOWBIT_API_KEY"
    search: Search | None = None
    sweep: Sweep | None = None
    quality: Quality | None = None
    generator: Generator = Generator()

    @model_validator(mode="after")
    def _sections_fit_together(self) -> "Scenario":
        self._check_length()
        arrivals = self.arrivals
        if self.prompts is None and not isinstance(arrivals, Replay):
            raise ValueError("prompts is missing; only a replay can take its lengths from the trace")
        if (
            isinstance(arrivals, Closed)
            and self.requests is not None
            and self.requests < arrivals.concurrency
        ):
            raise ValueError(
                f"requests {self.requests} is fewer than concurrency {arrivals.concurrency}; "
                "give several requests for each stream"
            )
        if self.warm_up.requests and self.requests is not None and self.warm_up.requests >= self.requests:
            raise ValueError(
                f"warm_up.requests {self.warm_up.requests} leaves none of {self.requests} to measure"
            )
        if self.duration_s is not None and self.warm_up.seconds >= self.duration_s:
            raise ValueError(
                f"warm_up.seconds {self.warm_up.seconds:g} leaves nothing of {self.duration_s:g} s"
            )
        self._check_search()
        self._check_sweep()
        return self

    def _check_length(self) -> None:
        given = (self.requests is not None) + (self.duration_s is not None)
        if isinstance(self.arrivals, Ramp):
            if given:
                raise ValueError("a ramp's length is its stages; leave out requests and duration_s")
        elif isinstance(self.arrivals, AtOnce):
            if self.requests is None or self.duration_s is not None:
                raise ValueError("at_once takes requests, and no duration_s")
        elif given == 2 or (given == 0 and not isinstance(self.arrivals, Replay)):
            raise ValueError("give either requests or duration_s")

    def _check_search(self) -> None:
        if self.search is None:
            return
        if not isinstance(self.arrivals, Poisson | Gamma | Constant):
            raise ValueError("search needs arrivals poisson, gamma or constant")
        if not self.slo.has_limits:
            raise ValueError("search needs a limit in slo: ttft_s, tpot_s, e2e_s or session_s")
        if self.search.low_rps >= self.search.high_rps:
            raise ValueError("search.low_rps must be below search.high_rps")

    def _check_sweep(self) -> None:
        if (sweep := self.sweep) is None:
            return
        if self.search is not None or isinstance(self.arrivals, Ramp):
            raise ValueError("sweep measures what it lists; leave out search, and arrivals of kind ramp")
        if sweep.concurrency and not isinstance(self.arrivals, Closed):
            raise ValueError("sweep.concurrency needs arrivals closed")
        if sweep.rate_rps and not isinstance(self.arrivals, Poisson | Gamma | Constant):
            raise ValueError("sweep.rate_rps needs arrivals poisson, gamma or constant")
        if sweep.prompt_tokens and not isinstance(self.prompts, Synthetic):
            raise ValueError("sweep.prompt_tokens needs prompts synthetic")
        if self.requests is not None and max(sweep.concurrency, default=0) > self.requests:
            raise ValueError(
                f"sweep.concurrency reaches {max(sweep.concurrency)} with requests {self.requests}; "
                "give several requests for each stream, or duration_s"
            )


def bundled_scenarios() -> dict[str, Path]:
    """Scenarios that ship with Lowbit, by name."""
    package = Path(str(files("lowbit_loadtest")))
    folder = next(path for path in (package / "scenarios", package.parent / "scenarios") if path.is_dir())
    return {path.stem: path for path in sorted(folder.glob("*.yaml"), key=lambda path: path.stem)}


def load_scenario(name_or_path: str, overrides: tuple[str, ...] = ()) -> Scenario:
    """Read a scenario by bundled name or path and apply `key.path=value` overrides; raises ConfigError."""
    return load_document(
        "scenario",
        name_or_path,
        Scenario,
        bundled=bundled_scenarios(),
        overrides=overrides,
        renamed=QUALITY_RENAMED,
    )


def parse_scenario(data: Mapping[str, Any], origin: str) -> Scenario:
    """Validate scenario data; paths in it are relative to the working directory. Raises ConfigError."""
    return parse_document("scenario", data, origin, Scenario, renamed=QUALITY_RENAMED)
