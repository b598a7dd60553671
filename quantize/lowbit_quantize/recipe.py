"""A recipe: what to do to a model, in strict YAML. Unknown keys are refused with their path.

Knows nothing of tensors and of what schemes, methods and passes there are; whether a recipe fits a model is checked in
`plan.py`, which turns its rules into one table.
"""

from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_serializer, model_validator

from lowbit_core.documents import Section, document_path, load_document, parse_document
from lowbit_core.errors import RecipeError

BUNDLED = "default"  # the texts that ship with this package
NONE = "none"  # the scheme of what stays as it is
QUANTIZE = "quantize"  # the pass that everything else in a recipe is about
RENAMED = {
    "weights": "modules",
    "weights.method": "modules.*.methods",
    "weights.bits": "modules.*.scheme",
    "weights.symmetric": "modules.*.scheme",
    "weights.group_size": "modules.*.group_size",
    "weights.ignore": "modules.*.match",
    "experts": "passes",
    "experts.prune": "passes.*.prune_experts.prune_ratio' or 'passes.*.prune_experts.keep_experts",
    "experts.criterion": "passes.*.prune_experts.criterion",
    "experts.seed": "passes.*.prune_experts.seed",
    "experts.expert_parallel": "passes.*.prune_experts.expert_parallel",
    "experts.router_distillation": "passes.*.distill_router",
    "format": "lowbit export --to",
    **{
        f"{section}.{old}": f"{section}.{new}"
        for section in ("calibration", "quality")
        for old, new in (
            ("source", "dataset"), ("sequences", "num_samples"), ("sequence_tokens", "max_seq_length")
        )
    },
}  # fmt: skip


def _is_file(text: str, path: Path) -> bool:
    """Whether a dataset is a file rather than a name."""
    return text not in ("", BUNDLED) and not text.startswith("hub:")


class Step(Section):
    """Something by name with its options, written `name` or `name: {option: value}`."""

    name: str
    options: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _one_key(cls, data: Any) -> Any:
        if isinstance(data, str):
            return {"name": str(data)}
        if isinstance(data, dict) and len(data) == 1:
            name, options = next(iter(data.items()))
            return {"name": str(name), "options": {} if options is None else options}
        raise ValueError(f"{cls._noun()} is its name, or `name: {{option: value}}`")

    @classmethod
    def _noun(cls) -> str:
        return "a step"

    @model_serializer
    def _as_written(self) -> str | dict[str, Any]:
        return {self.name: self.options} if self.options else self.name


class MethodStep(Step):
    """A method of a rule."""

    @classmethod
    def _noun(cls) -> str:
        return "a method"


class Rule(Section):
    """How the linears that `match` names are stored, and how their numbers are chosen.

    `match` is a full name, a pattern with `*`, or `re:` and a regular expression; or a list of these. `scheme` is a
    name of the table (catalog.py) or `none`; `group_size` inputs share parameters, `channel` means all of a
    row. `methods` in order: the last one quantizes. With `none` a method may set weights to zero, and the others keep
    their numbers' type.
    """

    match: tuple[str, ...] = Field(min_length=1)
    scheme: str
    group_size: Literal["channel"] | int | None = None
    methods: tuple[MethodStep, ...] | None = None

    @field_validator("group_size", mode="plain")
    @classmethod
    def _known_size(cls, size: Any) -> Any:
        if size is None or size == "channel" or (type(size) is int and size >= 32 and size % 32 == 0):
            return size
        raise ValueError("allowed are channel and the multiples of 32")

    @model_validator(mode="after")
    def _none_has_nothing(self) -> "Rule":
        if self.scheme == NONE and self.group_size is not None:
            raise ValueError("scheme none has no groups; group_size goes with another scheme")
        return self


class Base(Section):
    """How the base model is read: in which type it computes (its configuration's, unless said), and patterns of tensors
    in its files that are left out where its model does not use them.
    """

    dtype: Literal["auto", "bfloat16", "float16"] = "auto"
    leave_out: tuple[str, ...] = ()


class KVCache(Section):
    """`fp8` stores one calibrated scale for keys and one for values in each layer. Written `fp8` or `{dtype: fp8}`.

    With the strategy `attn_head` each key and value head has its own. `skip_layers` keep theirs in the model's type:
    numbers of layers, or `sliding_window` for all that have one.
    """

    dtype: Literal["fp8", "none"] = "fp8"
    strategy: Literal["tensor", "attn_head"] = "tensor"
    skip_layers: tuple[Annotated[int, Field(ge=0, strict=True)] | Literal["sliding_window"], ...] = ()

    @model_validator(mode="before")
    @classmethod
    def _dtype_alone(cls, data: Any) -> Any:
        return {"dtype": str(data)} if isinstance(data, str) else data

    @model_validator(mode="after")
    def _something_to_skip(self) -> "KVCache":
        if self.dtype == NONE and self.skip_layers:
            raise ValueError("skip_layers go with dtype fp8; without it no layer has an FP8 cache")
        if self.dtype == NONE and self.strategy != "tensor":
            raise ValueError(f"strategy {self.strategy} goes with dtype fp8; without it there are no scales")
        return self


class PassStep(Step):
    """A pass."""

    @classmethod
    def _noun(cls) -> str:
        return "a pass"


class Text(Section):
    """Where token sequences come from: `default`, a file, a folder, `hub:NAME[:CONFIG][:SPLIT][@REVISION]`; or ids."""

    dataset: Annotated[str, document_path(_is_file)] = BUNDLED
    num_samples: int = Field(default=64, ge=1)
    max_seq_length: int = Field(default=512, ge=16)
    seed: int = 0
    # JSON {"input_ids": [[int, …], …], "domains": […]}; replaces the other four
    token_ids: Annotated[str, document_path()] | None = None


class Calibration(Text):
    """What a model is calibrated on; `set_aside` more sequences of the same source only judge, as many as it has.

    What is lost on them and not on those that calibrate is fitted to the text. Of `token_ids` none are set aside.
    """

    set_aside: int = Field(default=4, ge=0)


class Quality(Text):
    """Held-out text and the gate: a result past a limit is marked rejected and the exit status is 3.

    `isolate`: measure the noise floor and the FP8 cache by itself too (`walk/baselines.py`).
    """

    num_samples: int = Field(default=16, ge=2)
    isolate: bool = True
    max_mean_kld: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    min_top1_agreement: float | None = Field(default=None, gt=0, le=1)
    max_perplexity_ratio: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    max_overfitting: float | None = Field(default=None, gt=0, allow_inf_nan=False)


class Recipe(Section):
    """The whole recipe. Of the rules in `modules` the last that matches a linear wins; what none matches stays."""

    description: str = ""
    base: Base = Base()
    modules: tuple[Rule, ...] = ()
    kv_cache: KVCache = KVCache()
    passes: tuple[PassStep, ...] = (PassStep.model_validate(QUANTIZE),)
    calibration: Calibration = Calibration()
    quality: Quality = Quality()


def bundled_recipes() -> dict[str, Path]:
    """Recipes that ship with Lowbit, by name."""
    package = Path(str(files("lowbit_quantize")))
    folder = next(path for path in (package / "recipes", package.parent / "recipes") if path.is_dir())
    return {path.stem: path for path in sorted(folder.glob("*.yaml"), key=lambda path: path.stem)}


def load_recipe(name_or_path: str, overrides: tuple[str, ...] = ()) -> Recipe:
    """Read a recipe by bundled name or path and apply `key.path=value` overrides; raises RecipeError."""
    return load_document(
        "recipe", name_or_path, Recipe, bundled=bundled_recipes(), overrides=overrides, renamed=RENAMED,
        error=RecipeError,
    )  # fmt: skip


def parse_recipe(data: Mapping[str, Any], origin: str) -> Recipe:
    """Validate recipe data, whose paths are relative to the working directory; raises RecipeError."""
    return parse_document("recipe", data, origin, Recipe, renamed=RENAMED, error=RecipeError)
