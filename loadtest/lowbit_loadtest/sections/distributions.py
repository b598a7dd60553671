"""Numbers that a scenario leaves to chance: lengths in tokens and times in seconds. And the names of recordings."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from lowbit_core.documents import Section

PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
TraceFormat = Literal["azure", "bailian", "burstgpt", "mooncake", "sharegpt", "openai", "lowbit"]


class Distribution(Section):
    """`fixed` takes `mean`; `uniform` takes `min` and `max`; `normal` and `lognormal` take `mean` and `sd`, both of
    the values themselves (not of their logarithms), before they are clipped to `min`..`max`.
    """

    kind: Literal["fixed", "uniform", "normal", "lognormal"] = "fixed"
    mean: PositiveFloat | None = None
    sd: PositiveFloat | None = None

    @property
    def bounds(self) -> tuple[float, float]:
        """The least and the greatest value."""
        raise NotImplementedError

    @model_validator(mode="after")
    def _complete(self) -> "Distribution":
        needs = {"fixed": {"mean"}, "uniform": set(), "normal": {"mean", "sd"}}.get(self.kind, {"mean", "sd"})
        given = {name for name in ("mean", "sd") if getattr(self, name) is not None}
        if given != needs:
            raise ValueError(f"{self.kind} takes {', '.join(sorted(needs)) or 'only min and max'}")
        if self.kind == "uniform" and not {"min", "max"} <= self.model_fields_set:
            raise ValueError("uniform takes min and max")
        if self.kind == "lognormal" and not self.mean:
            raise ValueError("lognormal takes a mean above 0")
        low, high = self.bounds
        if low > high:
            raise ValueError(f"min {low:g} is above max {high:g}")
        return self


class Lengths(Distribution):
    """Whole numbers of tokens or turns, at least 1; a bare number means that number always."""

    min: int = Field(default=1, ge=1)
    max: int = Field(default=1_000_000, ge=1)

    @property
    def bounds(self) -> tuple[float, float]:
        return self.min, self.max


class Seconds(Distribution):
    """Times; a bare number means that time always, 0 too."""

    mean: NonNegativeFloat | None = None
    min: NonNegativeFloat = 0.0
    max: NonNegativeFloat = 86_400.0

    @property
    def bounds(self) -> tuple[float, float]:
        return self.min, self.max


def _number_means_fixed(value: Any) -> Any:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return {"kind": "fixed", "mean": value} if number else value


LengthsOrNumber = Annotated[Lengths, BeforeValidator(_number_means_fixed)]
SecondsOrNumber = Annotated[Seconds, BeforeValidator(_number_means_fixed)]
