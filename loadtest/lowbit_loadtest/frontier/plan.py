"""The plan of a frontier, in strict YAML: checkpoints, loads, quality questions, constraints, and whether it decides.

Knows nothing of processes and of HTTP.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from lowbit_core.documents import SUFFIXES, DocumentPath, Section, document_path, load_document
from lowbit_core.errors import ConfigError
from lowbit_loadtest.scenario import (
    QUALITY_RENAMED,
    PositiveFloat,
    Quality,
    Scenario,
    load_scenario,
)
from lowbit_loadtest.sections.arrivals import Ramp

RENAMED = {**QUALITY_RENAMED, "constraints.accuracy_of_base": "constraints.acc_norm_of_base"}
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
NameOrFile = Annotated[str, document_path(lambda text, path: path.suffix in SUFFIXES)]
Share = Annotated[float, Field(gt=0, lt=1)]
SECONDS = {"s": 1.0, "m": 60.0, "h": 3600.0}
Measure = Literal["acc_norm", "choice_probability"]
Objective = Literal["throughput", "goodput", "latency", "cost"]
DirectoryOrHubName = Annotated[str, document_path(lambda text, path: path.exists())]


def _seconds(value: Any) -> Any:
    """90s, 60m and 1.5h as seconds; a bare number is seconds already."""
    if not isinstance(value, str):
        return value
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([smh]?)\s*", value)
    if found is None:
        raise ValueError("allowed is a number above 0 of seconds, or text like 90s, 60m, 1.5h")
    return float(found[1]) * SECONDS[found[2] or "s"]


Seconds = Annotated[PositiveFloat, BeforeValidator(_seconds)]


class Checkpoint(Section):
    """A directory to serve: `path`. With `recipe` and `model` it is made first. `serve` has flags of `lowbit serve`.

    `price_per_hour` is what the machine that serves it costs, in any money: the objective `cost` asks for it.
    """

    name: Name
    path: DocumentPath
    recipe: NameOrFile | None = None
    model: DirectoryOrHubName | None = None
    serve: tuple[str, ...] = ()
    price_per_hour: PositiveFloat | None = None

    @model_validator(mode="after")
    def _recipe_needs_model(self) -> "Checkpoint":
        if (self.recipe is None) != (self.model is None):
            raise ValueError("recipe and model belong together")
        return self


class Load(Section):
    """A scenario by name or file; `set` overrides keys, as --set does (paths: relative to the working directory)."""

    name: Name
    scenario: NameOrFile
    set: tuple[str, ...] = ()


class Constraints(Section):
    """What a checkpoint must keep: quality and size relative to the base's, KV tokens, 95th percentiles of latency.

    A rate counts towards throughput only if it keeps the latencies and 99 % of its requests complete.
    """

    acc_norm_of_base: Annotated[float, Field(gt=0, le=1)] | None = None
    choice_probability_of_base: Annotated[float, Field(gt=0, le=1)] | None = None
    perplexity_of_base: Annotated[float, Field(ge=1)] | None = None
    kl_from_base: PositiveFloat | None = (
        None  # nats per token: the lower bound that the likeliest tokens give
    )
    bytes_of_base: PositiveFloat | None = None  # of the files with weights
    kv_tokens: int | None = Field(default=None, ge=1)  # at least
    ttft_p95_s: PositiveFloat | None = None
    tpot_p95_s: PositiveFloat | None = None
    e2e_p95_s: PositiveFloat | None = None

    @property
    def latencies_s(self) -> dict[str, float]:
        """Limits by the name that a result's point has for the distribution."""
        limits = {
            "ttft_s": self.ttft_p95_s,
            "time_per_output_token_s": self.tpot_p95_s,
            "end_to_end_s": self.e2e_p95_s,
        }
        return {name: limit for name, limit in limits.items() if limit is not None}


class Margins(Section):
    """How near two are equal: a share of the objective, a difference of accuracy (0.01: one point), nats of KL."""

    objective: Share = 0.03
    accuracy: Share = 0.01
    kl: PositiveFloat = 0.01


class Decide(Section):
    """Measure in rounds where the decision hangs, until it is made or the time is over.

    Everything counts towards `within`: making checkpoints, starting servers, measuring. `confidence` is that of all
    statements together. `at_once` servers stay up side by side, one under load at a time; with fewer than there are
    checkpoints, each change of checkpoint starts a server. `seed` draws items, prompts and the order within rounds.
    """

    within: Seconds
    objective: Objective = "throughput"
    accuracy: Measure = "acc_norm"
    margins: Margins = Margins()
    confidence: Annotated[float, Field(gt=0.5, lt=1)] = 0.95
    at_once: int = Field(default=1, ge=1)
    questions: int = Field(default=32, ge=1)  # a round
    texts: int = Field(default=8, ge=1)  # a round
    seed: int = Field(default=0, ge=0)


class FrontierPlan(Section):
    """The whole plan. Quality is compared with the checkpoint `base`; `serve` has flags for all."""

    description: str = ""
    checkpoints: tuple[Checkpoint, ...] = Field(min_length=1)
    base: str
    scenarios: tuple[Load, ...] = Field(min_length=1)
    repetitions: int = Field(default=3, ge=1, le=20)
    serve: tuple[str, ...] = ()
    start_timeout_s: PositiveFloat = 600.0
    quality: Quality = Quality()
    quality_under: str | None = None  # the scenario whose load runs meanwhile; default: the first
    objective: str | None = None  # the scenario whose throughput decides; default: the first
    constraints: Constraints = Constraints()
    decide: Decide | None = None

    @property
    def deciding_scenario(self) -> str:
        """The scenario whose speed decides."""
        return self.objective or self.scenarios[0].name

    @model_validator(mode="after")
    def _decides_by_what_it_measures(self) -> "FrontierPlan":
        asks = self.constraints.choice_probability_of_base is not None
        if self.decide is None:
            if asks:
                raise ValueError(
                    "constraints.choice_probability_of_base is measured where the plan has decide"
                )
            return self
        if given := [key for key in ("repetitions", "quality_under") if key in self.model_fields_set]:
            raise ValueError(
                f"decide chooses the rounds itself and asks without other load; leave out {given[0]}"
            )
        if len(self.scenarios) > 1:
            raise ValueError(f"decide repeats one scenario; {len(self.scenarios)} are given: leave one")
        if asks and self.decide.accuracy != "choice_probability":
            raise ValueError(
                "constraints.choice_probability_of_base needs decide.accuracy: choice_probability"
            )
        if self.constraints.acc_norm_of_base is not None and self.decide.accuracy != "acc_norm":
            raise ValueError("constraints.acc_norm_of_base needs decide.accuracy: acc_norm")
        unpriced = [one.name for one in self.checkpoints if one.price_per_hour is None]
        if self.decide.objective == "cost" and unpriced:
            raise ValueError(
                f"decide.objective cost needs a price_per_hour of each checkpoint; {unpriced[0]} has none"
            )
        return self

    @model_validator(mode="after")
    def _names_fit(self) -> "FrontierPlan":
        for kind, names in (
            ("checkpoint", [one.name for one in self.checkpoints]),
            ("scenario", [one.name for one in self.scenarios]),
        ):
            if twice := next((name for name in names if names.count(name) > 1), None):
                raise ValueError(f"two of the {kind}s are called {twice!r}")
        if self.base not in [one.name for one in self.checkpoints]:
            raise ValueError(f"base {self.base!r} is none of the checkpoints")
        for key in ("quality_under", "objective"):
            if getattr(self, key) not in (None, *(one.name for one in self.scenarios)):
                raise ValueError(f"{key} {getattr(self, key)!r} is none of the scenarios")
        return self


def load_plan(path: Path, overrides: Sequence[str] = ()) -> FrontierPlan:
    """Read a plan and apply `key.path=value` overrides; ConfigError names the key that is wrong."""
    return load_document("plan", path, FrontierPlan, bundled={}, overrides=overrides, renamed=RENAMED)


def scenarios_of(plan: FrontierPlan) -> dict[str, Scenario]:
    """The plan's scenarios, with one repetition each, because the frontier repeats whole runs."""
    return {
        load.name: load_scenario(load.scenario, load.set).model_copy(
            update={"repetitions": 1, "quality": None}
        )
        for load in plan.scenarios
    }


def deciding_load(plan: FrontierPlan) -> Scenario:
    """The load that a round repeats; ConfigError where it is not one load, or has no SLO where goodput decides."""
    scenario = scenarios_of(plan)[plan.deciding_scenario]
    if isinstance(scenario.arrivals, Ramp) or scenario.search is not None or scenario.sweep is not None:
        raise ConfigError(
            f"scenario {plan.deciding_scenario}: decide repeats one load; a ramp, a search and a sweep are several: "
            "give the rate (poisson, gamma, constant) or the streams (closed) that matter"
        )
    if plan.decide and plan.decide.objective == "goodput" and not scenario.slo.limits_s:
        raise ConfigError(
            f"scenario {plan.deciding_scenario}: the objective goodput needs a limit in slo: ttft_s, tpot_s or e2e_s"
        )
    return scenario
