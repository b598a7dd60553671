"""A base's tensors by the names that the model has for them, however this base's files hold them.

Published names become the model's by transformers' own table (published_names.py). Beside those, names without
`model.`, wrappers' parts (`_orig_mod.`, `module.`), a tied matrix under either name, experts stacked as transformers 5
writes them or single where it does not, and weights in FP8 or MXFP4: each becomes the one form that the walk reads.
What no module of the decoder claims is carried over untouched, or named as left out (leftovers.py).
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lowbit_core.errors import ModelError
from lowbit_quantize.model.architecture import Architecture
from lowbit_quantize.model.files.places import Converted, Place, Source
from lowbit_quantize.model.files.published_floats import PublishedFloats, beside, stored
from lowbit_quantize.model.files.published_names import Claim, PublishedNames, joins_whole_experts
from lowbit_quantize.model.skeleton import is_tied, text_tensors
from lowbit_quantize.model.weights import WeightFiles

WRAPPERS = re.compile(
    r"^module\.|(?<![^.])(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|base_layer)\."
)
Claimed = tuple[Claim, Place]


@dataclass(frozen=True)
class Wanted:
    """The tensors of the model: what they are called in published files, and which of them the walk reads (`text`).

    `anchor` is a tensor that every base has, the final norm's; `tied` a head and the embedding that it may be.
    """

    names: PublishedNames
    text: frozenset[str]
    anchor: str
    tied: tuple[str, str] | None


def wanted_of(skeleton: nn.Module, architecture: Architecture) -> Wanted:
    """What a model asks of its files."""
    head, embedding = f"{architecture.head}.weight", f"{architecture.embedding}.weight"
    return Wanted(
        PublishedNames(skeleton),
        text_tensors(skeleton, architecture),
        f"{architecture.final_norm}.weight",
        (head, embedding) if is_tied(skeleton, architecture) else None,
    )


class BaseWeights:
    """The tensors that a model wants, by its names for them."""

    def __init__(self, files: WeightFiles, wanted: Wanted, floats: PublishedFloats | None) -> None:
        self.files, self.floats, self.wanted = files, floats, wanted
        names = wanted.names
        self._names = _Names(files, (names.published(wanted.anchor), wanted.anchor))
        self._weights = tuple(self._all_weights())
        self._stored = dict(self._weights)
        self._claimed: dict[str, list[Claimed]] = {}
        for published, place in self._weights:
            # Packed numbers may be those of a tensor that is no module's weight.
            short = published.removesuffix(".weight") if place.stored else published
            for claim in names.claims(published) or names.claims(short):
                self._claimed.setdefault(claim.target, []).append((claim, place))
        places = {inner: self._place(inner) for inner in sorted(names.inner)}
        self._places: dict[str, Source] = {
            inner: place for inner, place in places.items() if place is not None
        }

    def __contains__(self, inner: str) -> bool:
        return inner in self._places

    @property
    def read_files(self) -> set[str]:
        return self.files.read_files

    def shape(self, inner: str) -> tuple[int, ...]:
        return tuple(self._places[inner].made(self._empty).shape)

    def dtype(self, inner: str) -> str:
        """As safetensors calls what is stored."""
        place = self._places[inner].places[0]
        return "MXFP4" if place.stored and place.stored.packed else self.files.dtype(place.names[0])

    @property
    def dequantized(self) -> bool:
        """Whether anything is."""
        return any(place.stored for place in self._read_places)

    def dequantizes(self, inner: str) -> bool:
        return any(place.stored is not None for place in self._places[inner].places)

    @property
    def dtypes(self) -> str:
        """Every type that the model's tensors are stored in: "BF16+F32"."""
        return "+".join(sorted({self.dtype(inner) for inner in self._places if inner in self.wanted.text}))

    @cached_property
    def bytes(self) -> int:
        """Bytes of all tensors that the model reads, as they are stored."""
        return sum(self.files.bytes(name) for name in self._read_names)

    @cached_property
    def _read_places(self) -> tuple[Place, ...]:
        sources = (source for inner, source in self._places.items() if inner in self.wanted.text)
        return tuple(place for source in sources for place in source.places)

    @cached_property
    def _read_names(self) -> frozenset[str]:
        return frozenset(name for place in self._read_places for name in place.names)

    def read(self, inner: str) -> Tensor:
        """One tensor, in the type that it is stored in, float32 where it is dequantized."""
        if inner not in self._places:
            published = self.wanted.names.published(inner)
            raise ModelError(f"{self.files.directory} lacks the tensor {published}; the model is incomplete")
        return self._places[inner].made(self.read_place)

    def read_place(self, place: Place) -> Tensor:
        """One tensor of the files, or an entry of one."""
        if place.stored is None:
            return self.files.read(place.name, place.entry)
        assert self.floats is not None
        return place.stored.read(self.files, self.floats, place.entry)

    def _empty(self, place: Place) -> Tensor:
        """What would be read, without its numbers."""
        shape = place.stored.shape if place.stored else self.files.shape(place.name)
        return torch.empty(shape if place.entry is None else shape[1:], device="meta")

    def is_same(self, one: str, other: str) -> bool:
        """Whether two tensors are one in the files."""
        return self._places.get(one) == self._places.get(other)

    def unclaimed(self) -> list[tuple[str, Place]]:
        """What the walk does not read: published names, and where these tensors are.

        Scales of what is dequantized, which have no meaning any more, are not among them (`scales_gone`).
        """
        rest = [(name, place) for name, place in self._weights if self._read_names.isdisjoint(place.names)]
        scales = {extra for _, place in rest for extra in self._beside(place)} | self.scales_gone
        return [(name, place) for name, place in rest if place.name not in scales]

    @cached_property
    def scales_gone(self) -> frozenset[str]:
        """Scales in the files beside weights that are dequantized."""
        return frozenset(name for place in self._read_places for name in self._beside(place))

    def _beside(self, place: Place) -> list[str]:
        if place.stored is None:
            return []
        module = _weight_name(place.stored.values).removesuffix(".weight")
        return [place.stored.scales, *beside(self._names.stored, f"{module}.weight")]

    def example(self, missing: str) -> str:
        """The name in the files that ends most like a missing one, for an error's line."""
        names = sorted(self._names.stored)
        return max(names, key=lambda name: _common_end(name, missing), default="none at all")

    def _all_weights(self) -> Iterable[tuple[str, Place]]:
        """Every tensor of the files by its published name, of packed numbers that of the weight."""
        for name in self.files:
            weight = _weight_name(name)
            numbers = stored(self.files, weight) if self.floats else None
            if weight == name or numbers is None:
                yield self._names.published(name), Place(name, numbers if weight == name else None)
            else:
                yield self._names.published(weight), Place(name, numbers)

    def _place(self, inner: str) -> Source | None:
        names = self.wanted.names
        part = names.slices.get(inner)
        claimed = self._claimed.get(part.stack if part else inner, [])
        found: Source | None = (
            self._whole(inner, claimed) if part is None else self._of_expert(inner, claimed)
        )
        if found is None and part is not None:
            found = self._stored.get(inner) or self._stored.get(names.published(inner))  # single all the same
        if found is None and self.wanted.tied and inner == self.wanted.tied[1]:
            return self._place(self.wanted.tied[0])
        return found

    def _whole(self, inner: str, claimed: list[Claimed]) -> Source | None:
        for claim, place in claimed:
            if claim.converter is None:
                return place
        names = self.wanted.names
        return _converted(claimed, names.shapes[inner], names.config, inner) if claimed else None

    def _of_expert(self, inner: str, claimed: list[Claimed]) -> Source | None:
        """The part of a stack, or of what would be stacked: of that only this expert's is looked at."""
        names, part = self.wanted.names, self.wanted.names.slices[inner]
        for claim, place in claimed:
            if claim.converter is None:
                return Place(place.name, place.stored, part.entry, part)
        mine = [
            (claim, Place(place.name, place.stored, part.entry) if claim.number is None else place)
            for claim, place in claimed
            if claim.number in (None, part.entry)
        ]
        if not mine:
            return None
        converter = mine[0][0].converter
        assert converter is not None
        if not joins_whole_experts(converter) or part.turned:
            return _converted(mine, names.shapes[part.stack], names.config, part.stack, part)
        patterns = converter.source_patterns
        pattern = patterns[1 if len(patterns) > 1 and part.rows is not None and part.rows.start else 0]
        return next((place for claim, place in mine if claim.pattern == pattern), None)


def _converted(
    claimed: list[Claimed], shape: tuple[int, ...], config: Any, target: str, part: Any = None
) -> Source | None:
    """What a conversion makes of these; nothing where one of its patterns has none."""
    converter = claimed[0][0].converter
    assert converter is not None
    found: dict[str, tuple[Place, ...]] = {}
    for pattern in converter.source_patterns:
        mine = sorted(
            ((claim.number or 0, place.name, place) for claim, place in claimed if claim.pattern == pattern),
            key=lambda one: one[:2],
        )
        if not mine:
            return None
        found[pattern] = tuple(place for *_, place in mine)
    return Converted(converter, found, target, shape, config, part)


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

    def __init__(self, files: WeightFiles, anchors: tuple[str, ...]) -> None:
        self.stored: dict[str, str] = {}
        for name in files:
            bare = WRAPPERS.sub("", name)
            if bare in self.stored:
                raise ModelError(
                    f"{files.directory} holds {self.stored[bare]} and {name}, two candidates for one tensor; remove one"
                )
            self.stored[bare] = name
        self.added, self.missing = ("", "")
        if not any(anchor in self.stored for anchor in anchors):
            self.added, self.missing = _prefixes(self.stored, anchors[0], files.directory)

    def published(self, name: str) -> str:
        """The published name of one in the files."""
        bare = WRAPPERS.sub("", name).removeprefix(self.added)
        inside = self.missing and any(bare.startswith(part) for part in ("layers.", "embed_tokens.", "norm."))
        return f"{self.missing}{bare}" if inside else bare


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
