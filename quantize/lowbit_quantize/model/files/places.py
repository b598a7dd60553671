"""Where a tensor of a model comes from in files: one of theirs, a part of one, or what conversions make of some."""

from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from transformers.core_model_loading import WeightConverter

from lowbit_quantize.model.experts.linears import Slice
from lowbit_quantize.model.files.published_floats import Stored
from lowbit_quantize.model.files.published_names import Shaped


@dataclass(frozen=True)
class Place:
    """A name in the files, or numbers and scales; of a stack its entry, of that a part (`slice`)."""

    name: str
    stored: Stored | None = None
    entry: int | None = None
    part: Slice | None = None

    @property
    def places(self) -> tuple["Place", ...]:
        return (self,)

    @property
    def names(self) -> tuple[str, ...]:
        return (self.stored.values, self.stored.scales) if self.stored else (self.name,)

    def made(self, fetch: "Fetch") -> Tensor:
        """The tensor; `fetch` gives what the files have here, of a stack the entry."""
        tensor = fetch(self)
        if self.part is None:
            return tensor
        packed = (
            self.stored is not None and self.stored.packed
        )  # groups lie along the inputs, rows are outputs
        turned = self.part.turned and not (packed and tensor.dim() == 2)
        part = Slice(self.part.stack, self.part.entry, self.part.rows, turned)
        return part.of(tensor).contiguous()


Fetch = Callable[[Place], Tensor]


@dataclass(frozen=True)
class Converted:
    """What one of transformers' conversions makes of several tensors, or of one; of a stack the part of one expert.

    `sources` are by the conversion's patterns. Of stacks only the entry is converted, as a stack of one.
    """

    converter: WeightConverter = field(compare=False)
    sources: Mapping[str, tuple[Place, ...]]
    target: str
    shape: tuple[int, ...]  # of what comes out
    config: Any = field(compare=False)
    part: Slice | None = None

    @property
    def places(self) -> tuple[Place, ...]:
        return tuple(place for places in self.sources.values() for place in places)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(name for place in self.places for name in place.names)

    def made(self, fetch: Fetch) -> Tensor:
        """As of `Place`."""
        tensors: Any = {
            pattern: [fetch(place) if place.entry is None else fetch(place).unsqueeze(0) for place in places]
            for pattern, places in self.sources.items()
        }
        shape = self.shape if self.part is None else (1, *self.shape[1:])
        converter = deepcopy(self.converter)
        for operation in converter.operations:
            tensors = operation.convert(
                tensors,
                source_patterns=converter.source_patterns,
                target_patterns=converter.target_patterns,
                full_layer_name=self.target,
                model=Shaped(shape),
                config=self.config,
                missing_keys=None,
            )
        found = next(value for pattern, value in tensors.items() if pattern in self.target)
        tensor: Tensor = found[0] if isinstance(found, list) else found
        return (self.part.of(tensor[0]) if self.part else tensor).contiguous()


Source = Place | Converted
