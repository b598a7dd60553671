"""Streams of families whose layers are called with more than hidden states: rows are taken apart and put together.

What a layer is told of the tokens is computed again for each layer by the model's own code around the layers, and kept
while that layer is walked: a few channels for each token of the text, and not those of all layers.
"""

from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from lowbit_core.errors import ModelError
from lowbit_quantize.model.streams.form import LeftTensor, Rows, StreamForm
from lowbit_quantize.model.streams.stand_in import Arguments
from lowbit_quantize.model.streams.surroundings import Surroundings

Call = tuple[
    Tensor, tuple[Any, ...], dict[str, Any]
]  # of a layer: hidden states, positional arguments, keywords


class Carried:
    """The rows of one model's streams, and the code around its layers."""

    def __init__(
        self,
        form: StreamForm,
        hidden_size: int,
        surroundings: Callable[[torch.dtype], Surroundings],
        left: Callable[[], list[LeftTensor]],
    ) -> None:
        """`surroundings` makes the code around layers, in a type; `left` finds what layers leave for others."""
        self._form, self._hidden_size = form, hidden_size
        self._make, self._find_left = surroundings, left
        self._surroundings: dict[torch.dtype, Surroundings] = {}
        self._told: dict[Any, list[Any]] = {}  # of layer `_told_at`
        self._told_at = -1

    @cached_property
    def rows(self) -> Rows:
        return Rows(self._form, self._hidden_size, self._find_left() if self._form.left else [])

    def around(self, dtype: torch.dtype) -> Surroundings:
        """The code around the layers, in a type."""
        if dtype not in self._surroundings:
            self._surroundings[dtype] = self._make(dtype)
        return self._surroundings[dtype]

    def first(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """Rows before the first layer; raises ModelError where hidden states are of another form than in the twin."""
        hidden, _ = self.around(dtype).calls(ids)
        rows = self.rows.first(hidden, ids)
        if rows.shape[-1] != self.rows.width:
            raise ModelError(
                f"the first layer is given hidden states of the shape {tuple(hidden.shape)}, where {self._form} was "
                "found; please report it with the model's config.json"
            )
        return rows

    def call(self, index: int, rows: Tensor, arguments: Arguments) -> Call:
        """What a layer is called with; `arguments` are those of any text of this length."""
        args, kwargs = list(arguments[0]), dict(arguments[1])
        for place, value in zip(self._form.told, self._told_of(index, rows), strict=True):
            if isinstance(place, int):
                args[place] = value
            else:
                kwargs[place] = value
        if self._form.left:
            kwargs[self._form.left] = type(kwargs[self._form.left])(self.rows.left_in(rows))
        return self.rows.hidden(rows), tuple(args), kwargs

    def after(self, rows: Tensor, hidden: Tensor, kwargs: Mapping[str, Any]) -> Tensor:
        """The same rows behind a layer that gave `hidden` and was called with these keywords."""
        return self.rows.after(rows, hidden, kwargs.get(self._form.left))

    def finished(self, rows: Tensor) -> Tensor:
        """What the final norm reads, (sequences, tokens, hidden), of rows behind the last layer."""
        return self.around(rows.dtype).finished(self.rows.ids(rows), self.rows.hidden(rows))

    def _told_of(self, index: int, rows: Tensor) -> list[Any]:
        if not self._form.told:
            return []
        if index != self._told_at:
            self._told, self._told_at = {}, index
        ids = self.rows.ids(rows)
        key = rows.dtype, ids.shape, ids.cpu().numpy().tobytes()
        if key not in self._told:
            args, kwargs = self.around(rows.dtype).calls(ids)[1][index]
            values = [args[place] if isinstance(place, int) else kwargs[place] for place in self._form.told]
            self._told[key] = [one.clone() if isinstance(one, Tensor) else one for one in values]
        return self._told[key]
