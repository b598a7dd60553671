"""The section `arrivals` of a scenario: when requests are sent. `generate/arrivals.py` draws the times."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from lowbit_core.documents import DocumentPath, Section
from lowbit_loadtest.sections.distributions import NonNegativeFloat, PositiveFloat, TraceFormat


def _no_infinite_rate(value: Any) -> Any:
    if str(value).strip().lstrip("+.").lower() in ("inf", "infinity"):
        raise ValueError("inf is no rate; for all requests at once give arrivals: {kind: at_once}")
    return value


Rate = Annotated[PositiveFloat, BeforeValidator(_no_infinite_rate)]


class Poisson(Section):
    """Independent users: gaps are exponential with mean 1/rate_rps."""

    kind: Literal["poisson"]
    rate_rps: Rate


class Gamma(Section):
    """Gaps are gamma with mean 1/rate_rps and shape `burstiness`: 1 is Poisson, below 1 is burstier."""

    kind: Literal["gamma"]
    rate_rps: Rate
    burstiness: PositiveFloat


class Constant(Section):
    """One request every 1/rate_rps seconds."""

    kind: Literal["constant"]
    rate_rps: Rate


class Closed(Section):
    """`concurrency` streams, each sending its next request when its last one has ended."""

    kind: Literal["closed"]
    concurrency: int = Field(ge=1)


class AtOnce(Section):
    """All requests at time 0, as `rate inf` elsewhere: how fast a heap of work is done."""

    kind: Literal["at_once"]


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
    """A recorded trace with times; `format` overrides what its header or its keys say (`generate/traces/`).

    `speed` 2 plays twice as fast, recorded pauses too. Rows before `skip_s` are left out. Lengths above the limits are
    cut to them, and the result counts how many were. A row without output was answered with nothing (BurstGPT's
    failures): it is sent with the smallest limit there is, 1 token, or skipped; the result counts these too.
    """

    kind: Literal["replay"]
    path: DocumentPath
    format: TraceFormat | None = None
    speed: PositiveFloat = 1.0
    skip_s: NonNegativeFloat = 0.0
    max_prompt_tokens: int | None = Field(default=None, ge=1)
    max_output_tokens: int | None = Field(default=None, ge=1)
    without_output: Literal["send", "skip"] = "send"


Arrivals = Annotated[
    Poisson | Gamma | Constant | Closed | AtOnce | Ramp | Replay, Field(discriminator="kind")
]
