"""Whether a family's own code runs in half precision beside the tensors that it keeps in float32.

transformers (5.19) says of some families which tensors stay float32, and has linears in bfloat16 read what these make.
"""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lowbit_core.errors import ModelError
from lowbit_quantize.model.discovery.probe import ProbedLayer
from lowbit_quantize.model.files.kept_types import KeptTypes
from lowbit_quantize.model.files.published_names import PublishedNames


def check_half(layers: Mapping[int, ProbedLayer], skeleton: nn.Module, name: str, dtype: torch.dtype) -> None:
    """Raise ModelError where a layer of a twin does not run in a type; `layers` are by their numbers in `name`."""
    model: Any = skeleton
    if not model._get_dtype_plan(dtype):
        return
    kept = KeptTypes(skeleton, PublishedNames(skeleton))
    for number, layer in layers.items():
        module = copy.deepcopy(layer.module)
        tensors = module.state_dict().items()
        types = {key: kept.dtype(f"{name}.{number}.{key}", dtype) for key, _ in tensors}
        module.load_state_dict({key: _as(tensor, types[key]) for key, tensor in tensors}, assign=True)
        try:
            with torch.no_grad():
                layer.call(module, dtype)
        except Exception as error:  # whatever it is: it is the family's own code
            words = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            raise ModelError(
                f"transformers' own code of {model.config.model_type} does not run in {dtype} beside the tensors that "
                f"it keeps in float32 ({words}), so that nothing can be measured; give a model of another kind"
            ) from error


def _as(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor
