"""What `lowbit sensitivity` writes: one JSON document. Its readers need neither torch nor transformers."""

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lowbit_core.durable import move
from lowbit_core.errors import ConfigError
from lowbit_core.manifest import RunRecord, TextRecord
from lowbit_quantize.recipe import MethodStep

VERSION = 1
HEAD, CACHE = "head", "kv_cache"  # kinds of decisions
FP8_CACHE = "fp8"  # the choice of a cache


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Candidate(_Record):
    """A scheme that a decision may take, as a rule of a recipe says it; `none` leaves weights as they are."""

    name: str
    scheme: str
    group_size: Literal["channel"] | int | None = None
    methods: tuple[MethodStep, ...] | None = None


class Choice(_Record):
    """What a candidate is for one decision.

    `bytes` of its linears in the checkpoint, or of one token in its layer's cache; `bits` of a code; `kl` in nats a
    token, predicted for this change alone, with the standard error over sequences.
    """

    bytes: int
    bits: float
    kl: float
    kl_stderr: float


class DecisionRecord(_Record):
    """Linears that share a scheme, by their published names, and every choice by the name of its candidate."""

    name: str
    layer: int | None
    kind: str
    modules: tuple[str, ...]
    weights: int
    choices: dict[str, Choice]


class ModelRecord(_Record):
    """The base model; `other_bytes` are those of its tensors that no decision is about."""

    name: str
    sha256: dict[str, str]
    other_bytes: int


class Sensitivity(_Record):
    """The document. Candidates were made on the text `calibration`, and what they err was felt on the text `scored`.

    `fp8_layers` are those whose keys and values the recipe keeps in FP8.
    """

    lowbit_sensitivity: int = VERSION
    base: ModelRecord
    recipe: dict[str, Any]
    candidates: tuple[Candidate, ...]
    calibration: TextRecord
    scored: TextRecord
    seed: int
    fp8_layers: tuple[int, ...] = ()
    decisions: tuple[DecisionRecord, ...]
    run: RunRecord = Field(description="what it took")


def write_sensitivity(path: Path, found: Sensitivity) -> None:
    """Write the document."""
    write_whole(path, found.model_dump_json(indent=1) + "\n")


def write_whole(path: Path, text: str) -> None:
    """Write a file that is whole or not there."""
    beside = path.with_name(f".{path.name}.part")
    beside.write_text(text, encoding="utf-8")
    move(beside, path)


def read_sensitivity(path: Path) -> Sensitivity:
    """Read the document; raises ConfigError."""
    wanted = "give the file that `lowbit sensitivity MODEL --out FILE` wrote"
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not JSON"
        raise ConfigError(f"{path}: {reason}; {wanted}") from None
    version = data.get("lowbit_sensitivity") if isinstance(data, dict) else None
    if version != VERSION:
        said = "holds no sensitivities" if version is None else f"is of version {version}, not {VERSION}"
        raise ConfigError(f"{path} {said}; {wanted}")
    try:
        return Sensitivity.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise ConfigError(f"{path}: {place}: {first['msg']}; {wanted}") from None
