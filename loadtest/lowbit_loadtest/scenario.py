"""A scenario: when requests are sent, what they ask, and what counts as good, in strict YAML.

Unknown keys are refused with their path. Knows nothing of HTTP and of clocks; `arrivals.py` turns the section
`arrivals` into send times, `prompts.py` turns `prompts` and `output` into requests. `scenario_file.py` reads files.
"""

from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from lowbit_core.documents import DocumentPath, Section, load_document, parse_document

PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
QUALITY_RENAMED = {
    "quality.items": "quality.limit",
    "quality.own": "quality.items_file",
    "quality.text": "quality.text_file",
}
DEFAULT_PROMPT = "Explain in a few paragraphs how a refrigerator moves heat from a cold place to a warm one."


class Lengths(Section):
    """A distribution of lengths, clipped to `min`..`max`; a bare number means that number always.

    `fixed` takes `mean`; `uniform` takes `min` and `max`; `normal` and `lognormal` take `mean` and `sd`, both of
    the lengths themselves (not of their logarithms), before clipping.
    """

    kind: Literal["fixed", "uniform", "normal", "lognormal"] = "fixed"
    mean: PositiveFloat | None = None
    sd: PositiveFloat | None = None
    min: int = Field(default=1, ge=0)
    max: int = Field(default=1_000_000, ge=1)

    @model_validator(mode="after")
    def _complete(self) -> "Lengths":
        needs = {"fixed": {"mean"}, "uniform": set(), "normal": {"mean", "sd"}}.get(self.kind, {"mean", "sd"})
        given = {name for name in ("mean", "sd") if getattr(self, name) is not None}
        if given != needs:
            raise ValueError(f"{self.kind} takes {', '.join(sorted(needs)) or 'only min and max'}")
        if self.kind == "uniform" and not {"min", "max"} <= self.model_fields_set:
            raise ValueError("uniform takes min and max")
        if self.min > self.max:
            raise ValueError(f"min {self.min} is above max {self.max}")
        return self


def _number_means_fixed(value: Any) -> Any:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return {"kind": "fixed", "mean": value} if number else value


LengthsOrNumber = Annotated[Lengths, BeforeValidator(_number_means_fixed)]


class Poisson(Section):
    """Independent users: gaps are exponential with mean 1/rate_rps."""

    kind: Literal["poisson"]
    rate_rps: PositiveFloat


class Gamma(Section):
    """Gaps are gamma with mean 1/rate_rps and shape `burstiness`: 1 is Poisson, below 1 is burstier."""

    kind: Literal["gamma"]
    rate_rps: PositiveFloat
    burstiness: PositiveFloat


class Constant(Section):
    """One request every 1/rate_rps seconds."""

    kind: Literal["constant"]
    rate_rps: PositiveFloat


class Closed(Section):
    """`concurrency` streams, each sending its next request when its last one has ended."""

    kind: Literal["closed"]
    concurrency: int = Field(ge=1)


class Ramp(Section):
    """Poisson stages of `stage_s` seconds, each `growth` times the rate of the last, until saturation.

    Saturated: fewer than `saturation` of the offered requests complete per second, the SLOs are missed, or the
    generator falls behind.
    """

    kind: Literal["ramp"]
    start_rps: PositiveFloat
    growth: Annotated[float, Field(gt=1, le=10)] = 1.5
    max_rps: PositiveFloat
    stage_s: PositiveFloat
    saturation: Annotated[float, Field(gt=0, le=1)] = 0.9


class Replay(Section):
    """A recorded trace: Azure's LLM inference CSV (.csv) or Mooncake's JSONL (.jsonl).

    `speed` 2 plays twice as fast. Rows before `skip_s` are left out. Lengths above the limits are cut to them, and
    the result counts how many were.
    """

    kind: Literal["replay"]
    path: DocumentPath
    speed: PositiveFloat = 1.0
    skip_s: NonNegativeFloat = 0.0
    max_prompt_tokens: int | None = Field(default=None, ge=1)
    max_output_tokens: int | None = Field(default=None, ge=1)


Arrivals = Annotated[Poisson | Gamma | Constant | Closed | Ramp | Replay, Field(discriminator="kind")]


class Text(Section):
    """The same user message for every request."""

    kind: Literal["text"]
    text: str = Field(default=DEFAULT_PROMPT, min_length=1)


class FilePrompts(Section):
    """A JSONL file, taken in turn: one prompt, messages or turns object a line."""

    kind: Literal["file"]
    path: DocumentPath


class SharedPrefix(Section):
    """Requests are dealt over `groups`; those of one group begin with the same system message."""

    groups: int = Field(ge=1)
    tokens: int = Field(ge=1)


class Synthetic(Section):
    """Made-up words; `tokens` is the length of the whole prompt, chat template and shared prefix included."""

    kind: Literal["synthetic"]
    tokens: LengthsOrNumber
    shared_prefix: SharedPrefix | None = None


class Conversations(Section):
    """Each arrival starts a conversation; later turns carry the earlier ones with the server's own answers.

    A turn is due `think_s` after the answer before it has ended; its latency counts from then.
    """

    kind: Literal["conversations"]
    turns: LengthsOrNumber
    user_tokens: LengthsOrNumber
    think_s: NonNegativeFloat = 1.0
    shared_prefix: SharedPrefix | None = None


Prompts = Annotated[Text | FilePrompts | Synthetic | Conversations, Field(discriminator="kind")]


class Output(Section):
    """`tokens` limits each answer; `exact` also asks for that many (`ignore_eos`, understood by vLLM)."""

    tokens: LengthsOrNumber = Lengths(mean=128)
    exact: bool = False


class SLO(Section):
    """What a good answer is, and the share of all requests that must be good."""

    ttft_s: PositiveFloat | None = None
    tpot_s: PositiveFloat | None = None
    e2e_s: PositiveFloat | None = None
    attainment: Annotated[float, Field(gt=0, le=1)] = 0.95

    @property
    def limits_s(self) -> dict[str, float]:
        limits = {"ttft_s": self.ttft_s, "tpot_s": self.tpot_s, "e2e_s": self.e2e_s}
        return {name: limit for name, limit in limits.items() if limit is not None}


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
    """The whole scenario. One of `requests` and `duration_s`, except for ramp (neither) and replay (at most one)."""

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
        return self

    def _check_length(self) -> None:
        given = (self.requests is not None) + (self.duration_s is not None)
        if isinstance(self.arrivals, Ramp):
            if given:
                raise ValueError("a ramp's length is its stages; leave out requests and duration_s")
        elif given == 2 or (given == 0 and not isinstance(self.arrivals, Replay)):
            raise ValueError("give either requests or duration_s")

    def _check_search(self) -> None:
        if self.search is None:
            return
        if not isinstance(self.arrivals, Poisson | Gamma | Constant):
            raise ValueError("search needs arrivals poisson, gamma or constant")
        if not self.slo.limits_s:
            raise ValueError("search needs a limit in slo: ttft_s, tpot_s or e2e_s")
        if self.search.low_rps >= self.search.high_rps:
            raise ValueError("search.low_rps must be below search.high_rps")


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
