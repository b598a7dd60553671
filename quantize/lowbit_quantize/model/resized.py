"""A model whose configuration says other sizes or fewer layers than its base's, built and found as any other.

What is cut out of a base must be what its family's own code makes of the changed configuration: that is read by
transformers and by engines, which know nothing of what was done.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from lowbit_core.errors import RecipeError
from lowbit_quantize.model.architecture import Architecture
from lowbit_quantize.model.discovery.found import find_architecture
from lowbit_quantize.model.skeleton import build_skeleton, change


@dataclass(frozen=True)
class OpenModel:
    """A configuration, what is known of its model, and that model without weights."""

    config: Any
    architecture: Architecture
    skeleton: nn.Module

    @property
    def layers(self) -> nn.ModuleList:
        """The decoder layers."""
        found = self.skeleton.get_submodule(self.architecture.layers)
        assert isinstance(found, nn.ModuleList)
        return found


def resized(model: OpenModel, changed: Mapping[str, Any], who: str) -> OpenModel:
    """The model with other keys of the decoder's configuration; raises RecipeError where there is none."""
    config = model.config
    data = copy.deepcopy(config.to_dict())
    change(data, changed, config)
    said = ", ".join(f"{key} = {value}" for key, value in changed.items() if isinstance(value, int))
    try:
        other = type(config).from_dict(data)
        skeleton = build_skeleton(other)
        return OpenModel(other, find_architecture(other, skeleton), skeleton)
    except Exception as error:  # whatever a changed configuration makes of transformers' code
        reason = " ".join(str(error).split())[:200]
        raise RecipeError(
            f"{who}: no {config.model_type} model can be built with {said} ({reason}); leave the pass out"
        ) from error
