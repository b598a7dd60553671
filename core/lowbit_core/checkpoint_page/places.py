"""Where a linear stands, read from its name: the layer, the part of the layer, and its role there.

`model.layers.3.mlp.experts.17.up_proj` is the `up_proj` of `mlp.experts.*` in layer 3; `lm_head` is in no layer. A page
has as many rows whatever the model has, so everything is counted by place, and layers are taken together where there
are many.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TypeVar

MOST_LAYERS = 100  # that a chart tells apart
MOST_LETTERS = 100  # of a name
DIGITS = 6  # of a number in a name
ANY = "*"

Value = TypeVar("Value")


@dataclass(frozen=True)
class Place:
    """The layer's number, or None outside of layers; the part that holds a linear, "" for none; its role."""

    layer: int | None
    part: str
    role: str

    @property
    def name(self) -> str:
        """The same in every layer."""
        return short(f"{self.part}.{self.role}" if self.part else self.role)


def place_of(name: str) -> Place:
    """The first number in a name is the layer's; others are those of experts."""
    words = name.split(".")
    layer_at = next((at for at, word in enumerate(words[:-1]) if _is_number(word)), None)
    inside = words if layer_at is None else words[layer_at + 1 :]
    path = [ANY if _is_number(word) else word for word in inside]
    return Place(None if layer_at is None else int(words[layer_at]), ".".join(path[:-1]), path[-1])


def patterns(names: Iterable[str]) -> Counter[str]:
    """Names without their numbers, and how many there are of each."""
    return Counter(".".join(ANY if _is_number(word) else word for word in name.split(".")) for name in names)


def short(text: str, letters: int = MOST_LETTERS) -> str:
    """A text of the manifest as far as a page has room for it."""
    return text if len(text) <= letters else f"{text[: letters - 1]}…"


def few_layers(by_layer: Mapping[int, list[Value]]) -> dict[int, list[Value]]:
    """The same values under at most `MOST_LAYERS` layers, each of which stands for those up to the next."""
    layers = sorted(by_layer)
    together = layers_together(len(layers))
    found: dict[int, list[Value]] = {}
    for at, layer in enumerate(layers):
        found.setdefault(layers[at - at % together], []).extend(by_layer[layer])
    return found


def layers_together(layers: int) -> int:
    """How many layers one point of a chart stands for."""
    return max(1, -(-layers // MOST_LAYERS))


def layers_note(layers: int) -> str:
    """What has to be said of that, if anything."""
    together = layers_together(layers)
    return f"each point is {together} layers, named by the first" if together > 1 else ""


def _is_number(word: str) -> bool:
    return word.isascii() and word.isdecimal() and len(word) <= DIGITS
