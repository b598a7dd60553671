"""A base's tensors by the names that published files of its family have, however this base's files hold them.

Names without `model.`, wrappers' parts (`_orig_mod.`, `module.`), a tied matrix under either name, experts stacked as
transformers 5 writes them, and weights in FP8 or MXFP4: each becomes the one form that the walk reads. What no module
of the model claims is carried over untouched, or named as left out (leftovers.py).
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import takewhile
from pathlib import Path
from typing import Any

from torch import Tensor

from lowbit_core.errors import ModelError
from lowbit_quantize.model.published_floats import PublishedFloats, Stored, beside, stored
from lowbit_quantize.model.weights import WeightFiles

WRAPPERS = re.compile(
    r"^module\.|(?<![^.])(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|base_layer)\."
)
EXPERT = re.compile(
    r"(?P<experts>.*\.experts)\.(?P<number>\d+)\.(?P<linear>gate_proj|up_proj|down_proj)\.weight"
)


@dataclass(frozen=True)
class Wanted:
    """The tensors of the model: shapes by their names in transformers, and what those are called in published files.

    `anchor` is a name that every base has, the final norm's; `tied` a head and the embedding that it may be.
    """

    shapes: Mapping[str, tuple[int, ...]]
    published: Callable[[str], str]
    anchor: str
    tied: tuple[str, str] | None


@dataclass(frozen=True)
class Place:
    """Where a tensor comes from: a name in the files, or numbers and scales; of a stack, its entry and its rows."""

    name: str
    stored: Stored | None = None
    entry: int | None = None
    rows: slice | None = None

    @property
    def names(self) -> tuple[str, ...]:
        return (self.stored.values, self.stored.scales) if self.stored else (self.name,)


class BaseWeights:
    """The tensors that a model wants, by their published names."""

    def __init__(self, files: WeightFiles, wanted: Wanted, floats: PublishedFloats | None) -> None:
        self.files, self.floats, self._wanted = files, floats, wanted
        self._names = _Names(files, wanted.anchor)
        self._places: dict[str, Place] = {}
        for inner in wanted.shapes:
            place = self._place(inner)
            if place is not None:
                self._places[wanted.published(inner)] = place

    def __contains__(self, name: str) -> bool:
        return name in self._places

    @property
    def read_files(self) -> set[str]:
        return self.files.read_files

    def shape(self, name: str) -> tuple[int, ...]:
        place = self._places[name]
        shape = place.stored.shape if place.stored else self.files.shape(place.name)
        if place.entry is not None:
            shape = shape[1:]
        return (len(range(*place.rows.indices(shape[0]))), *shape[1:]) if place.rows else shape

    def dtype(self, name: str) -> str:
        """As safetensors calls what is stored."""
        place = self._places[name]
        return "MXFP4" if place.stored and place.stored.packed else self.files.dtype(place.names[0])

    @property
    def dequantized(self) -> bool:
        """Whether anything is."""
        return any(place.stored for place in self._places.values())

    def dequantizes(self, name: str) -> bool:
        return self._places[name].stored is not None

    @property
    def dtypes(self) -> str:
        """Every type that the model's tensors are stored in: "BF16+F32"."""
        return "+".join(sorted({self.dtype(name) for name in self._places}))

    @cached_property
    def bytes(self) -> int:
        """Bytes of all tensors that the model reads, as they are stored."""
        return sum(self.files.bytes(name) for name in self._read_names)

    @cached_property
    def _read_names(self) -> frozenset[str]:
        return frozenset(name for place in self._places.values() for name in place.names)

    def read(self, name: str) -> Tensor:
        """One tensor, in the type that it is stored in, float32 where it is dequantized."""
        if name not in self._places:
            raise ModelError(f"{self.files.directory} lacks the tensor {name}; the model is incomplete")
        return self.read_place(self._places[name])

    def read_place(self, place: Place) -> Tensor:
        """One tensor of the model, or one that no module claims."""
        if place.stored is None:
            tensor = self.files.read(place.name, place.entry)
        else:
            assert self.floats is not None
            tensor = place.stored.read(self.files, self.floats, place.entry)
        return tensor[place.rows].contiguous() if place.rows else tensor

    def is_same(self, one: str, other: str) -> bool:
        """Whether two names are one tensor in the files."""
        return self._places.get(one) == self._places.get(other)

    def unclaimed(self) -> list[tuple[str, Place]]:
        """What no module of the model reads: published names, and where these tensors are.

        Scales of what is dequantized, which have no meaning any more, are not among them (`scales_gone`).
        """
        rest = [name for name in self.files if name not in self._read_names]
        places = {name: self._plain(name) for name in rest}
        places |= {name: Place(name, found) for name in rest if (found := self._packed(name)) is not None}
        scales = {extra for place in places.values() for extra in self._beside(place)} | self.scales_gone
        return [
            (self._names.published(_weight_name(name)), place)
            for name, place in places.items()
            if name not in scales
        ]

    @cached_property
    def scales_gone(self) -> frozenset[str]:
        """Scales in the files beside weights that are dequantized."""
        return frozenset(name for place in self._places.values() for name in self._beside(place))

    def _beside(self, place: Place) -> list[str]:
        if place.stored is None:
            return []
        module = _weight_name(place.stored.values).removesuffix(".weight")
        return [place.stored.scales, *beside(self._names.stored, f"{module}.weight")]

    def _packed(self, name: str) -> Stored | None:
        weight = _weight_name(name)
        return stored(self.files, weight) if self.floats and weight != name else None

    def example(self, missing: str) -> str:
        """The name in the files that ends most like a missing one, for an error's line."""
        names = sorted(self._names.stored)
        return max(names, key=lambda name: _common_end(name, missing), default="none at all")

    def _place(self, inner: str) -> Place | None:
        wanted = self._wanted
        candidates = [wanted.published(inner), inner]
        if wanted.tied and inner == wanted.tied[1]:
            candidates.append(wanted.published(wanted.tied[0]))
        for name in candidates:
            found = self._names.find(name)
            if found is not None:
                return self._plain(found)
            if (numbers := self._stored(name)) is not None:
                return Place(name, numbers)
        return self._stacked(inner)

    def _plain(self, name: str) -> Place:
        numbers = stored(self.files, name) if self.floats else None
        return Place(name, numbers)

    def _stored(self, name: str) -> Stored | None:
        """Numbers that have another name than the weight; where there is a naming of its own, by that."""
        return stored(self.files, self._names.in_files(name)) if self.floats else None

    def _stacked(self, inner: str) -> Place | None:
        found = EXPERT.fullmatch(inner)
        if found is None:
            return None
        down = found["linear"] == "down_proj"
        stack = f"{found['experts']}.{'down_proj' if down else 'gate_up_proj'}"
        name = self._names.find(stack)
        numbers = stored(self.files, self._names.in_files(stack)) if self.floats else None
        if name is None and numbers is None:
            return None
        if down:
            rows = None
        else:
            middle = self._wanted.shapes[inner][0]
            rows = slice(0, middle) if found["linear"] == "gate_proj" else slice(middle, None)
        return Place(name or stack, numbers, int(found["number"]), rows)


def _common_end(one: str, other: str) -> int:
    """Characters that two names end alike."""
    alike = takewhile(lambda pair: pair[0] == pair[1], zip(reversed(one), reversed(other), strict=False))
    return sum(1 for _ in alike)


def _weight_name(stored: str) -> str:
    """The name of a weight whose numbers are packed under another one."""
    if stored.endswith("_blocks"):
        return f"{stored.removesuffix('_blocks').removesuffix('.weight')}.weight"
    return stored.removesuffix("_packed")


class _Names:
    """How the names in some files differ from published ones: parts that wrappers put in, and a prefix too many or few.

    `stored` maps what a name would be without wrappers to the name in the files.
    """

    def __init__(self, files: WeightFiles, anchor: str) -> None:
        self.stored: dict[str, str] = {}
        for name in files:
            bare = WRAPPERS.sub("", name)
            if bare in self.stored:
                raise ModelError(
                    f"{files.directory} holds {self.stored[bare]} and {name}, two candidates for one tensor; remove one"
                )
            self.stored[bare] = name
        self.added, self.missing = _prefixes(self.stored, anchor, files.directory)

    def find(self, published: str) -> str | None:
        """The name in the files."""
        return self.stored.get(self._bare(published))

    def in_files(self, published: str) -> str:
        """The name that the files would have, for names beside it; of packed numbers, the name of their weight."""
        bare = self._bare(published)
        module = bare.removesuffix(".weight")
        names = (bare, f"{module}.weight_packed", f"{bare}_blocks", f"{module}_blocks")
        found = next((self.stored[name] for name in names if name in self.stored), bare)
        return found if self.stored.get(bare) == found else _weight_name(found)

    def published(self, name: str) -> str:
        """The published name of one in the files."""
        bare = WRAPPERS.sub("", name).removeprefix(self.added)
        inside = self.missing and any(bare.startswith(part) for part in ("layers.", "embed_tokens.", "norm."))
        return f"{self.missing}{bare}" if inside else bare

    def _bare(self, published: str) -> str:
        if published.startswith(self.missing):
            published = published.removeprefix(self.missing)
        return f"{self.added}{published}"


def _prefixes(names: Mapping[str, Any], anchor: str, directory: Path) -> tuple[str, str]:
    """What stands before every published name in the files, and what lacks there."""
    if anchor in names:
        return "", ""
    added = sorted(name.removesuffix(anchor) for name in names if name.endswith(f".{anchor}"))
    if len(added) > 1:
        raise ModelError(
            f"{directory} holds {len(added)} models, whose tensors begin with {', '.join(added)}; keep one of them"
        )
    if added:
        return added[0], ""
    part = anchor
    while "." in part:
        part = part.partition(".")[2]
        if part in names and "." in part:
            return "", anchor.removesuffix(part)
    return "", ""
