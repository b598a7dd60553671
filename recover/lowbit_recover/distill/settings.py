"""What a distillation is told: which numbers train, by which loss, on how much text and for how long."""

from dataclasses import asdict, dataclass
from typing import Any, Literal

from lowbit_core.errors import ConfigError

Train = Literal["scales", "weights"]
TRAINS: tuple[Train, ...] = ("scales", "weights")
LEARNING_RATES: dict[Train, float] = {"scales": 3e-4, "weights": 1e-3}


@dataclass(frozen=True)
class Settings:
    """All that decides what a distillation computes.

    `train`: `scales` (scales of codes that stay, and norms) or `weights` (all of them, under the checkpoint's own
    rounding). The loss of a token is (1 − alpha) · T² · KL(teacher ‖ student) at temperature T + alpha · the loss on
    the text itself (Hinton et al. 2015, arXiv 1503.02531) + `hidden` · the squared error of the last hidden state, as a
    share of its own size. `learning_rate` is a step's size as a share of a tensor's root mean square. A step takes
    `batch` rows of `row_tokens` tokens, `micro_batch` at a time; after each `evaluate_every` steps the set-aside rows
    are judged, and training ends early after `patience` such evaluations without a better one.
    """

    train: Train
    tokens: int = 262_144
    row_tokens: int = 512
    batch: int = 8
    micro_batch: int = 2
    epochs: int = 1
    temperature: float = 1.0
    alpha: float = 0.0
    hidden: float = 0.0
    top_k: int = 64
    learning_rate: float = 3e-4
    warmup: float = 0.1
    evaluate_every: int = 8
    patience: int = 6
    set_aside: int = 16
    precision: Literal["bf16", "float32"] = "bf16"
    checkpointing: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (
            ("tokens", 1), ("row_tokens", 16), ("batch", 1), ("micro_batch", 1), ("epochs", 1), ("top_k", 1),
            ("evaluate_every", 1), ("patience", 1), ("set_aside", 2),
        ):  # fmt: skip
            if getattr(self, name) < least:
                raise ConfigError(
                    f"{_flag(name)} {getattr(self, name)}: allowed is {least} or more, in whole numbers"
                )
        for name, value, fits, allowed in (
            ("temperature", self.temperature, 0 < self.temperature < 1e3, "above 0 and below 1000"),
            ("alpha", self.alpha, 0 <= self.alpha <= 1, "0 (the base alone) to 1 (the text alone)"),
            ("hidden", self.hidden, 0 <= self.hidden < 1e6, "0 or more"),
            ("learning_rate", self.learning_rate, 0 < self.learning_rate <= 1, "above 0, at most 1"),
        ):
            if not fits:
                raise ConfigError(f"{_flag(name)} {value:g}: allowed is {allowed}")
        if self.batch % self.micro_batch:
            raise ConfigError(
                f"--batch {self.batch} is no multiple of --micro-batch {self.micro_batch}; give one that is"
            )

    def as_record(self) -> dict[str, Any]:
        """Every setting by name, for the manifest and to tell two runs apart."""
        return asdict(self)


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"
