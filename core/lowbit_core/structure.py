"""What a checkpoint's manifest says of layers, channels and heads that were taken out of its base."""

from pydantic import BaseModel, ConfigDict


class StructureRecord(BaseModel):
    """What was taken out of the base: of its `layers` those `kept_layers` stay, by their numbers there; `sizes` are
    keys of the configuration with what they were and are. Where layers were measured, `layer_scores` has what the model
    would lose by each. Criteria are null where nothing was chosen by one.
    """

    model_config = ConfigDict(extra="ignore", frozen=True, ser_json_inf_nan="strings")

    layers: int
    kept_layers: list[int]
    sizes: dict[str, tuple[int, int]] = {}
    layer_criterion: str | None = None
    width_criterion: str | None = None
    layer_scores: dict[int, float] = {}

    def __str__(self) -> str:
        words = [f"{key} {before} to {after}" for key, (before, after) in self.sizes.items()]
        by = f" by {self.width_criterion}" if words and self.width_criterion else ""
        parts = [", ".join(words) + by] if words else []
        gone = sorted(set(range(self.layers)) - set(self.kept_layers))
        if gone:
            numbers = " ".join(map(str, gone))
            criterion = f" by {self.layer_criterion}" if self.layer_criterion else ""
            parts.insert(0, f"{len(self.kept_layers)} of {self.layers} layers{criterion}, without {numbers}")
        return "; ".join(parts)
