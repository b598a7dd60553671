"""The plan of a frontier: which checkpoints, under which loads, what is asked of them, and what must hold; strict YAML.

Paths are relative to the plan's file. Knows nothing of processes and of HTTP.
"""

from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import Field, ValidationError, model_validator

from lowbit_core.errors import ConfigError
from lowbit_core.strict_yaml import strict_load
from lowbit_loadtest.scenario import PositiveFloat, Quality, Scenario, Section
from lowbit_loadtest.scenario_file import bundled_scenarios, load_scenario, resolve_quality_paths

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]


class Checkpoint(Section):
    """A directory to serve: `path`; or a `recipe` that is run on `model` first, into `path`. `serve` are flags of
    `lowbit serve` for this one."""

    name: Name
    path: str
    recipe: str | None = None
    model: str | None = None
    serve: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _recipe_needs_model(self) -> "Checkpoint":
        if (self.recipe is None) != (self.model is None):
            raise ValueError("recipe and model belong together")
        return self


class Load(Section):
    """A scenario by name or file, with overrides as `--set` takes them."""

    name: Name
    scenario: str
    set: tuple[str, ...] = ()


class Constraints(Section):
    """What a checkpoint must keep: shares of the base's quality, and 95th percentiles.

    A rate counts towards throughput only where the latencies hold and 99 % of the requests complete.
    """

    accuracy_of_base: Annotated[float, Field(gt=0, le=1)] | None = None
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
    """The whole plan; `base` is the checkpoint that quality is compared with, `serve` are flags for all."""

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
    try:
        data = strict_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"plan {path} cannot be read: {error}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"plan {path} is not YAML: {error}") from error
    if not isinstance(data, dict):
        raise ConfigError(
            f"plan {path} must be a mapping with the keys {', '.join(FrontierPlan.model_fields)}"
        )
    _resolve(data, path.parent)
    try:
        return FrontierPlan.model_validate(data)
    except ValidationError as error:
        first = min(error.errors(), key=lambda one: one["type"] != "extra_forbidden")
        key = ".".join(map(str, first["loc"]))
        unknown = first["type"] == "extra_forbidden"
        message = "unknown key" if unknown else first["msg"].removeprefix("Value error, ")
        raise ConfigError(f"plan {path}: {f'{key}: ' if key else ''}{message}") from None


def scenarios_of(plan: FrontierPlan) -> dict[str, Scenario]:
    """The plan's scenarios, read; one repetition each, because the frontier repeats whole visits."""
    return {
        load.name: load_scenario(load.scenario, load.set).model_copy(
            update={"repetitions": 1, "quality": None}
        )
        for load in plan.scenarios
    }


def _resolve(data: dict[str, Any], folder: Path) -> None:
    for one in data.get("checkpoints") or ():
        for key in ("path", "model"):
            if isinstance(one, dict) and isinstance(one.get(key), str) and _is_path(one[key], key, folder):
                one[key] = str(folder / one[key])
        if isinstance(one, dict) and str(one.get("recipe", "")).endswith((".yaml", ".yml")):
            one["recipe"] = str(folder / one["recipe"])
    for one in data.get("scenarios") or ():
        if isinstance(one, dict) and isinstance(one.get("scenario"), str):
            name = one["scenario"]
            one["scenario"] = name if name in bundled_scenarios() else str(folder / name)
    resolve_quality_paths(data.get("quality"), folder)


def _is_path(text: str, key: str, folder: Path) -> bool:
    """A model may also be a name on a hub, which stays as it is."""
    return key == "path" or (folder / text).exists()
