"""The file of `lowbit compose`: runs of quantize and of distill in their order, in strict YAML."""

from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from lowbit_core.documents import Section, document_path, load_document
from lowbit_core.errors import ConfigError, RecipeError
from lowbit_quantize.recipe import BUNDLED, Recipe, bundled_recipes, load_recipe
from lowbit_recover.distill.settings import LEARNING_RATES, Settings

KINDS = ("quantize", "distill")


def _is_file(text: str, path: Path) -> bool:
    return text not in ("", BUNDLED) and not text.startswith("hub:")


def _is_recipe(text: str, path: Path) -> bool:
    return text not in bundled_recipes()


class QuantizeStep(Section):
    """A run of `lowbit quantize`: a recipe by bundled name or file, and `KEY=VALUE` as its --set."""

    recipe: Annotated[str, document_path(_is_recipe)]
    set: tuple[str, ...] = ()

    def read(self) -> Recipe:
        """The recipe; RecipeError where there is none or it is wrong."""
        return load_recipe(self.recipe, self.set)


class DistillStep(Section):
    """A run of `lowbit distill`: its text, and its flags by their names with `_` for `-`."""

    data: tuple[Annotated[str, document_path(_is_file)], ...] = Field(min_length=1)
    train: Literal["scales", "weights"] = "scales"
    settings: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _flags(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        names = {one.name for one in fields(Settings)} - {"train"}
        own = {key: value for key, value in data.items() if key not in names}
        return {**own, "settings": {key: value for key, value in data.items() if key in names}}

    def read(self) -> Settings:
        """The settings; ConfigError where one is not allowed."""
        given: dict[str, Any] = {"learning_rate": LEARNING_RATES[self.train], **self.settings}
        kinds = {one.name: type(one.default) for one in fields(Settings) if one.name != "train"}
        for name, value in given.items():
            wanted = (int, float) if kinds[name] is float else (kinds[name],)
            if type(value) not in wanted:
                raise ConfigError(
                    f"{name}: {value!r} is given, allowed is a value like {kinds[name].__name__}"
                )
        return Settings(self.train, **given)


class Step(Section):
    """One step: `quantize: {…}` or `distill: {…}`."""

    quantize: QuantizeStep | None = None
    distill: DistillStep | None = None

    @model_validator(mode="after")
    def _one(self) -> "Step":
        if (self.quantize is None) == (self.distill is None):
            raise ValueError(f"a step is one of {', '.join(KINDS)}, with its keys")
        return self

    @property
    def kind(self) -> str:
        return "quantize" if self.quantize else "distill"


class Steps(Section):
    """All steps; the first makes a checkpoint of the model, each other one of the checkpoint before it."""

    description: str = ""
    steps: tuple[Step, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _first_quantizes(self) -> "Steps":
        if self.steps[0].quantize is None:
            raise ValueError("the first step is quantize: what is distilled is a checkpoint")
        return self


def load_steps(path: Path) -> Steps:
    """Read the file, and every recipe and setting that it names; raises RecipeError or ConfigError."""
    steps = load_document("steps", path, Steps, bundled={}, error=RecipeError)
    judged = {}
    for place, step in enumerate(steps.steps, 1):
        if step.quantize is not None:
            judged[place] = step.quantize.read().quality
        elif step.distill is not None:
            try:
                step.distill.read()
            except ConfigError as error:
                raise ConfigError(f"step {place}, distill: {error}") from error
    texts = {
        place: (one.dataset, one.num_samples, one.max_seq_length, one.seed, one.token_ids)
        for place, one in judged.items()
    }
    first = next(iter(texts.values()))
    if other := next((place for place, text in texts.items() if text != first), None):
        raise RecipeError(
            f"step {other} is judged on another held-out text than step 1 (quality of its recipe); steps are compared "
            "on one text: set quality.dataset, num_samples, max_seq_length and seed alike"
        )
    return steps
