"""What a base's files hold beside the model: carried over untouched, left out by name, or a reason to refuse the base.

A parameter inside of the model that its configuration does not ask for means that one of the two is wrong, and the
model that transformers opens is not the one that was meant. What lies outside (draft layers, picture towers, heads
for rewards) is no business of the walk and stays what it was, whether or not transformers knows it.
"""

import fnmatch
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from lowbit_core.errors import ModelError
from lowbit_quantize.model.architecture import Architecture
from lowbit_quantize.model.files.base_weights import BaseWeights
from lowbit_quantize.model.files.places import Place
from lowbit_quantize.model.files.published_names import PublishedNames
from lowbit_quantize.model.skeleton import text_config, text_modules

BUFFERS = re.compile(
    r".*\.(rotary_emb\.(inv_freq|cos_cached|sin_cached)|masked_bias|attn\.bias|position_ids)"
)
DRAFT_COUNTS = ("num_nextn_predict_layers", "num_mtp_layers", "mtp_num_hidden_layers", "num_mtp_modules")
BUFFER, ASKED, SCALE = (
    "a buffer that is computed",
    "asked by base.leave_out",
    "a scale of numbers that are dequantized",
)


@dataclass(frozen=True)
class Leftovers:
    """`carried`: published names, with their places. `left_out`: names in the files, with the reason.

    `changed` are keys of the configuration that hold no more: numbers of draft layers that are left out.
    """

    carried: dict[str, Place] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    changed: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class _Model:
    name: str
    architecture: Architecture
    config: Any  # of the decoder
    names: PublishedNames
    ignored: tuple[str, ...]  # patterns of names that transformers' class knows and does not read
    modules: frozenset[str]  # of the decoder

    @property
    def depth(self) -> int:
        return int(self.config.num_hidden_layers)

    def layer_of(self, published: str) -> int | None:
        layers = re.escape(self.architecture.layers)
        found = re.match(rf"{layers}\.(\d+)\.", self.names.inner_name(published))
        return int(found[1]) if found else None

    def is_inside(self, published: str) -> bool:
        """Whether a tensor lies in a module of the decoder, which does not ask for it."""
        if self.names.claims(published):
            return False  # a tower's, or a second copy
        return self.names.inner_name(published).rpartition(".")[0] in self.modules

    def is_draft(self, published: str, layer: int) -> bool:
        """Whether a layer beyond the last one is a draft layer that this model is known to publish."""
        counts = [getattr(self.config, key, None) for key in DRAFT_COUNTS]
        known = sum(count for count in counts if isinstance(count, int))
        return layer < self.depth + known or any(re.search(pattern, published) for pattern in self.ignored)


def leftovers(
    weights: BaseWeights, skeleton: nn.Module, architecture: Architecture, leave_out: Sequence[str], name: str
) -> Leftovers:
    """Tell apart what no module claims; `leave_out` are patterns of names that the user leaves out.

    Raises ModelError where a tensor lies inside of the model and is not asked for, and on a pattern that names nothing.
    """
    model = _Model(
        name,
        architecture,
        text_config(getattr(skeleton, "config")),  # noqa: B009 (nn.Module's getattr is typed as Module)
        weights.wanted.names,
        tuple(getattr(skeleton, "_keys_to_ignore_on_load_unexpected", None) or ()),
        text_modules(skeleton, architecture),
    )
    found, used = Leftovers(left_out=dict.fromkeys(sorted(weights.scales_gone), SCALE)), set()
    for published, place in weights.unclaimed():
        stored = place.name
        pattern = next((one for one in leave_out if _names(one, stored, published)), None)
        if pattern is not None:
            used.add(pattern)
            found.left_out[stored] = ASKED
            if (model.layer_of(published) or 0) >= model.depth:
                found.changed.update({key: 0 for key in DRAFT_COUNTS if getattr(model.config, key, None)})
        elif BUFFERS.fullmatch(published):
            found.left_out[stored] = BUFFER
        else:
            _refuse_inside(model, stored, published)
            found.carried[published] = place
    unused = next((pattern for pattern in leave_out if pattern not in used), None)
    if unused is not None:
        raise ModelError(
            f"base.leave_out: {unused!r} matches no tensor of {name} that its model leaves unused; take it out"
        )
    return found


def _names(pattern: str, stored: str, published: str) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for name in (stored, published))


def _refuse_inside(model: _Model, stored: str, published: str) -> None:
    layer = model.layer_of(published)
    if layer is not None and layer >= model.depth:
        if model.is_draft(published, layer):
            return
        raise ModelError(
            f"{model.name} holds {stored}, and its configuration has {model.depth} layers and no draft layer; set "
            f"num_hidden_layers right, or leave the rest out: --leave-out '{model.architecture.layers}.{layer}.*'"
        )
    everywhere = re.sub(r"\.\d+\.", ".*.", stored)
    if layer is not None or model.is_inside(published):
        raise ModelError(
            f"{model.name} holds {stored}, which its configuration does not ask for, so that another model would come "
            f"out; set its config.json right (attention_bias, say), or leave it out: --leave-out '{everywhere}'"
        )


def draft_linears(carried: Iterable[str]) -> Iterator[str]:
    """Modules that are carried over with a matrix: what a checkpoint says is not quantized."""
    for name in carried:
        module, _, leaf = name.rpartition(".")
        if leaf == "weight" and module:
            yield module
