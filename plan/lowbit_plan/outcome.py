"""One thing that a plan predicts and its run measures."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Outcome:
    """One thing that was predicted and measured; `limit` is the target's, where there is one."""

    name: str
    unit: str
    predicted: float | None
    measured: float
    limit: float | None = None

    @property
    def off(self) -> float | None:
        """How far the prediction is from what was measured, of it."""
        return self.predicted / self.measured - 1 if self.predicted is not None and self.measured else None

    @property
    def met(self) -> bool | None:
        return None if self.limit is None else self.measured <= self.limit

    def __str__(self) -> str:
        predicted = (
            "not predicted" if self.predicted is None else f"predicted {self.predicted:,.6g} {self.unit}"
        )
        off = "" if self.off is None else f" ({self.off:+.1%})"
        met = "" if self.limit is None else f"; {'meets' if self.met else 'misses'} {self.amount(self.limit)}"
        return f"{self.name}: {predicted}, measured {self.amount(self.measured)}{off}{met}"

    def amount(self, value: float) -> str:
        """A number of this thing, with its unit."""
        if self.unit == "s":
            return f"{1e3 * value:,.1f} ms"
        return f"{value:,.4g} {self.unit}" if self.unit == "nats" else f"{value:,.0f} {self.unit}"
