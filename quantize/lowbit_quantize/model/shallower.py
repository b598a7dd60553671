"""A model of some of its base's layers: what its configuration says of them, and where their tensors are.

Configurations speak of layers in four ways: how many there are, lists with an entry for each, lists of numbers, and how
many at the beginning are of a kind. A pattern that counts layers by itself ("every fourth") can say nothing of a model
that lost some: then layers would be made otherwise than they were, and that is looked at layer by layer.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from lowbit_core.errors import RecipeError
from lowbit_quantize.model.architecture import Architecture
from lowbit_quantize.model.files.base_weights import BaseWeights
from lowbit_quantize.model.resized import OpenModel, resized
from lowbit_quantize.model.skeleton import text_config

COUNT = "num_hidden_layers"
NUMBERS = ("mlp_only_layers", "attn_layer_indices", "full_attn_idxs")  # lists of numbers of layers
LEADING = ("first_k_dense_replace", "num_dense_layers", "max_window_layers")  # how many at the beginning
NOT_LAYERS = re.compile(r".*(token_ids?|architectures)$")  # lists of other things
PLAIN = (bool, int, float, str, type(None))


def layer_keys(config: Any, kept: Sequence[int]) -> dict[str, Any]:
    """The keys of the decoder's configuration that speak of layers, for those `kept`, by their numbers, rising."""
    text = text_config(config)
    depth, changed = int(text.num_hidden_layers), {COUNT: len(kept)}
    place = {number: here for here, number in enumerate(kept)}
    found: dict[str, Any] = {}
    for key, value in text.to_dict().items():
        if key in NUMBERS and isinstance(value, list | tuple):
            found[key] = [place[number] for number in value if number in place]
        elif key in LEADING and isinstance(value, int):
            found[key] = sum(number < value for number in kept)
        elif isinstance(value, list | tuple) and len(value) == depth and not NOT_LAYERS.match(key):
            found[key] = [value[number] for number in kept]
        elif isinstance(value, str) and key.endswith("pattern") and len(value) == depth:
            found[key] = "".join(value[number] for number in kept)
    return found | changed


def shallower(base: OpenModel, kept: Sequence[int], who: str) -> OpenModel:
    """The model of the layers `kept`; raises RecipeError where the configuration cannot say which these are."""
    kinds = base.architecture.kinds
    if any(kind.attention for kind in kinds) and not any(kinds[number].attention for number in kept):
        raise RecipeError(
            f"{who}: no layer with attention would be left, and transformers runs no {base.architecture.model_type} "
            f"without; keep one of {', '.join(str(n) for n, kind in enumerate(kinds) if kind.attention)}"
        )
    found = resized(base, layer_keys(base.config, kept), who)
    gone = [number for number in range(len(base.layers)) if number not in set(kept)]
    words = f"{who}: without layers {', '.join(map(str, gone))} the configuration of {base.architecture.model_type}"
    if len(found.layers) != len(kept):
        raise RecipeError(f"{words} still means {len(found.layers)} layers; leave the pass out")
    for here, number in enumerate(kept):
        was, now = kinds[number], found.architecture.kinds[here]
        reason = _difference(base.layers[number], found.layers[here], number, here)
        if reason is None and was != now:
            reason = "does other things"
        if reason is not None:
            raise RecipeError(
                f"{words} would make of layer {number} another one, as layer {here} ({reason}); only such layers can "
                "go as leave the pattern of the others, by drop_layers.layers"
            )
    return found


def _difference(one: nn.Module, other: nn.Module, number: int, here: int) -> str | None:
    """In what two layers differ beside their numbers and weights, if in anything."""
    theirs = dict(other.named_modules())
    if dict(one.named_modules()).keys() != theirs.keys():
        return "of other parts"
    for name, module in one.named_modules():
        twin = theirs[name]
        if type(module) is not type(twin):
            return f"{name} is a {type(twin).__name__}"
        for key, value in vars(module).items():
            new = vars(twin).get(key)
            if isinstance(value, PLAIN) and value != new and (value, new) != (number, here):
                return f"{name or 'its'} {key} = {new}, was {value}".replace("  ", " ")
    before, after = one.state_dict(), other.state_dict()
    shape = next((key for key, value in before.items() if value.shape != after[key].shape), None)
    return None if shape is None else f"{shape} has the shape {tuple(after[shape].shape)}"


def may_go(architecture: Architecture) -> list[int]:
    """Numbers of the layers of which each by itself may go: all but an only one with attention."""
    attending = [number for number, kind in enumerate(architecture.kinds) if kind.attention]
    return [number for number in range(len(architecture.kinds)) if attending != [number]]


class KeptLayers:
    """The tensors of a base by the names that they have in a model of some of its layers."""

    def __init__(self, weights: BaseWeights, layers: str, kept: Sequence[int]) -> None:
        """`layers` is what the decoder's layers are called."""
        self._weights, self._kept = weights, kept
        self._name = re.compile(rf"^{re.escape(layers)}\.(\d+)\.")
        self._prefix = layers

    @property
    def read_files(self) -> set[str]:
        """Names of the files that were read so far."""
        return self._weights.read_files

    def read(self, name: str) -> Tensor:
        """One tensor, as it is stored or dequantized."""
        return self._weights.read(
            self._name.sub(lambda found: f"{self._prefix}.{self._kept[int(found[1])]}.", name)
        )


def layer_sizes(model: OpenModel) -> Mapping[int, int]:
    """Numbers in each layer."""
    return {
        number: sum(one.numel() for one in layer.parameters()) for number, layer in enumerate(model.layers)
    }
