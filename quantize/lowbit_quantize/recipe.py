"""A recipe: what to do to a model, in strict YAML. Unknown keys are refused with their path.

Knows nothing of tensors; whether a recipe fits a model is checked in `plan.py`.
"""

from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from lowbit_core.errors import RecipeError
from lowbit_core.strict_yaml import strict_load

BUNDLED = "default"  # the texts that ship with this package


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Weights(_Section):
    """How decoder linears are stored; `ignore` holds names or `re:` patterns of linears left alone.

    `group_size` inputs share a scale; `channel` means all inputs of an output channel.
    """

    method: Literal["awq", "gptq", "awq+gptq", "rtn", "none"] = "awq"
    bits: Literal[4, 8] = 4
    group_size: Literal["channel"] | int = 128
    symmetric: bool = True
    ignore: tuple[str, ...] = ("lm_head",)

    @field_validator("group_size", mode="plain")
    @classmethod
    def _known_size(cls, size: Any) -> Any:
        if size == "channel" or (type(size) is int and size >= 32 and size % 32 == 0):
            return size
        raise ValueError("allowed are channel and the multiples of 32")

    @property
    def inputs_per_scale(self) -> int | None:
        """The group size as a number; None where a scale spans all inputs."""
        return None if self.group_size == "channel" else self.group_size


class KVCache(_Section):
    """`fp8` stores one calibrated scale for keys and one for values in each layer."""

    dtype: Literal["fp8", "none"] = "fp8"


class Experts(_Section):
    """Which routed experts stay; `prune` is the fraction that goes (0.25), or the whole count that stays (96).

    `expert_parallel` must divide what stays; `seed` is for the criterion `random`.
    """

    prune: Annotated[int, Field(ge=0)] | Annotated[float, Field(ge=0, lt=1)] = 0
    criterion: Literal["reap", "gated-norm", "man", "ean", "frequency", "random"] = "reap"
    seed: int = 0
    expert_parallel: int = Field(default=1, ge=1)
    router_distillation: bool = False


class Text(_Section):
    """Where token sequences come from: `default`, FILE.jsonl, FILE.txt, hub:DATASET[@REVISION], or exact ids."""

    source: str = BUNDLED
    sequences: int = Field(default=64, ge=1)
    sequence_tokens: int = Field(default=512, ge=16)
    seed: int = 0
    token_ids: str | None = None  # JSON {"input_ids": [[int, …], …], "domains": […]}; replaces the other four


class Quality(Text):
    """Held-out text and the gate: a result past a limit is marked rejected and the exit status is 3.

    `isolate`: measure the noise floor and the FP8 cache by itself too (`baselines.py`).
    """

    sequences: int = Field(default=16, ge=2)
    isolate: bool = True
    max_mean_kld: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    min_top1_agreement: float | None = Field(default=None, gt=0, le=1)
    max_perplexity_ratio: float | None = Field(default=None, gt=0, allow_inf_nan=False)


class Recipe(_Section):
    """The whole recipe; `format` is how the checkpoint stores its linears (`formats.py`)."""

    description: str = ""
    format: Literal["compressed-tensors", "autoawq", "autogptq"] = "compressed-tensors"
    weights: Weights = Weights()
    experts: Experts = Experts()
    kv_cache: KVCache = KVCache()
    calibration: Text = Text()
    quality: Quality = Quality()


def bundled_recipes() -> dict[str, Path]:
    """Recipes that ship with Lowbit, by name."""
    package = Path(str(files("lowbit_quantize")))
    folder = next(path for path in (package / "recipes", package.parent / "recipes") if path.is_dir())
    return {path.stem: path for path in sorted(folder.glob("*.yaml"), key=lambda path: path.stem)}


def load_recipe(name_or_path: str, overrides: tuple[str, ...] = ()) -> Recipe:
    """Read a recipe by bundled name or path and apply `key.path=value` overrides; raises RecipeError."""
    bundled = bundled_recipes()
    path = Path(name_or_path)
    if path.suffix not in (".yaml", ".yml"):
        if name_or_path not in bundled:
            raise RecipeError(
                f"recipe {name_or_path!r} is neither a .yaml file nor one of: {', '.join(bundled)}; "
                "write the file or pick one of these"
            )
        path = bundled[name_or_path]
    if not path.is_file():
        raise RecipeError(f"recipe file {path} does not exist; bundled recipes are: {', '.join(bundled)}")
    try:
        data = strict_load(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"recipe {path} is not YAML: {error}") from error
    if not isinstance(data, dict):
        raise RecipeError(f"recipe {path} must be a mapping with the keys {', '.join(Recipe.model_fields)}")
    for override in overrides:
        _override(data, override)
    return parse_recipe(data, str(path))


def parse_recipe(data: dict[str, Any], origin: str) -> Recipe:
    """Validate recipe data; raises RecipeError naming the first wrong key and what is allowed."""
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            allowed = ", ".join(_section_at(first["loc"][:-1]).model_fields)
            raise RecipeError(f"recipe {origin}: unknown key {key!r}; allowed here: {allowed}") from None
        raise RecipeError(f"recipe {origin}: {key} = {first['input']!r}: {first['msg']}") from None


def _section_at(location: tuple[int | str, ...]) -> type[BaseModel]:
    section: Any = Recipe
    for part in location:
        section = section.model_fields[str(part)].annotation
    found: type[BaseModel] = section
    return found


def _override(data: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise RecipeError(f"--set {override!r} is not key=value; example: --set weights.group_size=64")
    *parents, leaf = key.split(".")
    section = data
    for parent in parents:
        section = section.setdefault(parent, {})
        if not isinstance(section, dict):
            raise RecipeError(f"--set {override!r}: {parent} is a value, not a section")
    try:
        section[leaf] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"--set {override!r}: the value is not YAML: {error}") from error
