"""What a file of a pass offers: a name, options, and a pass made of them for a model."""

from collections.abc import Mapping
from typing import Any, Protocol

from lowbit_core.documents import Section
from lowbit_quantize.model.architecture import Architecture
from lowbit_quantize.model.resized import OpenModel
from lowbit_quantize.walk.layer import Pass
from lowbit_quantize.walk.module_plan import Modules


class PassKind(Protocol):
    """A kind of pass; usually the class of the pass itself, or an object beside it."""

    @property
    def name(self) -> str: ...
    @property
    def options(self) -> type[Section]: ...
    @property
    def after(self) -> tuple[str, ...]: ...  # passes that must stand before it

    def make(self, options: Any, config: Any, architecture: Architecture, model: str) -> Pass:
        """The pass for a model of this configuration; raises RecipeError or ModelError where it does not fit."""
        ...


class PlainPass:
    """A pass that changes no shapes and no configuration; others override what differs."""

    on_trial = False
    before_quantize = True
    resizes = False
    bytes_a_weight = 0

    @property
    def needs_base_stream(self) -> bool:
        return False

    def fitted(self, walked: OpenModel, served: OpenModel) -> Any:
        return self

    def check(self, modules: Modules) -> None:
        return None

    def shape(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...] | None:
        return shape

    def configuration(self) -> Mapping[str, Any]:
        return {}


class NoOptions(Section):
    """The options of a pass that has none."""
