"""The plan of a frontier, in strict YAML: checkpoints, loads, quality questions and constraints.

Knows nothing of processes and of HTTP.
"""

from pathlib import Path
from typing import Annotated

from pydantic import Field, model_validator

from lowbit_core.documents import SUFFIXES, DocumentPath, Section, document_path, load_document
from lowbit_loadtest.scenario import QUALITY_RENAMED, PositiveFloat, Quality, Scenario, load_scenario

RENAMED = {**QUALITY_RENAMED, "constraints.accuracy_of_base": "constraints.acc_norm_of_base"}
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
NameOrFile = Annotated[str, document_path(lambda text, path: path.suffix in SUFFIXES)]
DirectoryOrHubName = Annotated[str, document_path(lambda text, path: path.exists())]


class Checkpoint(Section):
    """A directory to serve: `path`. With `recipe` and `model` it is made first. `serve` has flags of `lowbit serve`."""

    name: Name
    path: DocumentPath
    recipe: NameOrFile | None = None
    model: DirectoryOrHubName | None = None
    serve: tuple[str, ...] = ()

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
    """What a checkpoint must keep: quality relative to the base's, and 95th percentiles of latency.

    A rate counts towards throughput only if it keeps the latencies and 99 % of its requests complete.
    """

    acc_norm_of_base: Annotated[float, Field(gt=0, le=1)] | None = None
    perplexity_of_base: Annotated[float, Field(ge=1)] | None = None
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


def load_plan(path: Path) -> FrontierPlan:
    """Read a plan; ConfigError names the key that is wrong."""
    return load_document("plan", path, FrontierPlan, bundled={}, renamed=RENAMED)


def scenarios_of(plan: FrontierPlan) -> dict[str, Scenario]:
    """The plan's scenarios, with one repetition each, because the frontier repeats whole runs."""
    return {
        load.name: load_scenario(load.scenario, load.set).model_copy(
            update={"repetitions": 1, "quality": None}
        )
        for load in plan.scenarios
    }
