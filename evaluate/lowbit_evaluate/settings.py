"""What an evaluation is given, without torch: the command line reads it before torch is loaded."""

from dataclasses import dataclass

from lowbit_core.access import DIRECT, Access
from lowbit_core.evals.items import Item

FROM_MANIFEST = ""  # the held-out text that MODEL's manifest names


@dataclass(frozen=True)
class Settings:
    """How models are run in process. dtype "auto" is the one that is served; without `fp8_cache` keys and values are
    not rounded. With `trust_remote_code` a tokenizer may be code of the model's own."""

    device: str = "auto"
    dtype: str = "auto"
    fp8_cache: bool = True
    trust_remote_code: bool = False


@dataclass(frozen=True)
class Evaluation:
    """What is asked of which models. `base` is a model or a result file; `text` is a source, or FROM_MANIFEST;
    `access` is how the target is reached."""

    model: str
    base: str | None
    target: str | None
    items: tuple[Item, ...]
    text: str | None
    settings: Settings
    access: Access = DIRECT
