"""The model's own code around its decoder layers, with its weights, in one type; the layers are stood in for.

Most families embed tokens, multiply by a factor, and read the last layer's output with a norm. Where there is more
(positions that are added, copies of hidden states, inputs of each layer for each token) that code is run as it is.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lowbit_core.errors import ModelError
from lowbit_quantize.model.streams.stand_in import Arguments, StandIn

Read = Callable[[str], Tensor]


class _Read(nn.Module):
    """Stands where the final norm was and keeps what it would read."""

    def __init__(self) -> None:
        super().__init__()
        self.last: Tensor | None = None

    def forward(self, hidden: Tensor) -> Tensor:
        self.last = hidden
        return hidden


class Surroundings:
    """What is around the decoder layers of a model."""

    def __init__(
        self,
        skeleton: nn.Module,
        layers: str,
        final_norm: str,
        outputs: list[int],
        read: Read,
        dtype: torch.dtype,
    ) -> None:
        """`outputs` are the lengths of the tuples that layers give (0: no tuple); `read` gives weights by name.

        Embeddings are looked up in the type that they are read in; all else is in `dtype`.
        """
        parent, _, leaf = layers.rpartition(".")
        self._model = _without(skeleton, parent, leaf)
        stand_ins = nn.ModuleList(
            StandIn(layer, length)
            for layer, length in zip(_listed(skeleton.get_submodule(layers)), outputs, strict=True)
        )
        self._stand_ins: list[Any] = list(stand_ins)
        setattr(self._model, leaf, stand_ins)
        self._norm = _Read()
        self._final_norm = final_norm
        self._model.set_submodule(final_norm.removeprefix(f"{parent}."), self._norm)
        state = {name: read(f"{parent}.{name}" if parent else name) for name in self._model.state_dict()}
        self._model.load_state_dict(state, assign=True)
        self._model.eval().requires_grad_(False)
        self._cast(next(iter(state.values())).device, dtype)

    def calls(self, ids: Tensor) -> tuple[Tensor, list[Arguments]]:
        """What the first layer is given as hidden states, and what each is called with beside them, on these tokens."""
        self._run(ids)
        return self._stand_ins[0].hidden, [one.called for one in self._stand_ins]

    def finished(self, ids: Tensor, hidden: Tensor) -> Tensor:
        """What the final norm reads, (sequences, tokens, hidden), where the last layer gives `hidden`."""
        last = self._stand_ins[-1]
        last.gives = hidden
        try:
            self._run(ids)
        finally:
            last.gives = None
        if self._norm.last is None:
            raise ModelError(f"{self._final_norm} is not called by the model around its decoder layers")
        return self._norm.last

    def _run(self, ids: Tensor) -> None:
        with torch.no_grad():
            self._model(input_ids=ids, use_cache=False)

    def _cast(self, device: torch.device, dtype: torch.dtype) -> None:
        def cast(_: nn.Module, __: Any, output: Tensor) -> Tensor:
            return output.to(dtype)

        for module in self._model.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = buffer.to(device)
            if isinstance(module, nn.Embedding):
                module.register_forward_hook(cast)
            else:
                for name, weight in module._parameters.items():
                    if weight is not None and dtype == torch.float32:
                        module._parameters[name] = nn.Parameter(weight.float(), requires_grad=False)


def _listed(layers: Any) -> list[nn.Module]:
    return list(layers)


def _without(skeleton: nn.Module, parent: str, leaf: str) -> Any:
    """A copy of a module of the skeleton without its decoder layers."""
    module = skeleton.get_submodule(parent)
    layers = getattr(module, leaf)
    return copy.deepcopy(module, {id(layers): nn.ModuleList()})
