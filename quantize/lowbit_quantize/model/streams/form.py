"""What walks down a model for each token: hidden states, and what layers read beside them.

A row of a stream has, in this order: the token's hidden states, of which some families keep several copies side by
side; what earlier layers have left for later ones (keys and values that others share); and, where layers are told
something of the tokens themselves, the token's number in three digits, which every type of hidden states holds exactly.
So a stream stays one tensor, (sequences, tokens, width), however a layer is called.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

BASE, DIGITS = 256, 3  # of a token's number


@dataclass(frozen=True)
class StreamForm:
    """What a family's layers are called with, as its twin shows.

    `copies` of hidden states stand before sequences and tokens (`copies_first`) or behind. `around`: the model's own
    code makes more of the embedding, or of what the last layer gives, than a factor. `told` are the arguments, by place
    or keyword, that depend on the tokens; `left` is the keyword of the mapping in which layers leave tensors for
    others.
    """

    copies: int = 1
    copies_first: bool = False
    around: bool = False
    told: tuple[int | str, ...] = ()
    left: str = ""

    @property
    def plain(self) -> bool:
        """Whether rows are hidden states and nothing else."""
        return self == PLAIN_STREAM


PLAIN_STREAM = StreamForm()


@dataclass(frozen=True)
class LeftTensor:
    """A tensor that a layer leaves under a key, at a place in a tuple; sequences are its first dimension.

    `sizes` are those of the dimensions but sequences and tokens, which are at `tokens_at`.
    """

    key: Any
    place: int
    tokens_at: int
    sizes: tuple[int, ...]

    @property
    def width(self) -> int:
        return torch.Size(self.sizes).numel()


class Rows:
    """Where what is in a row, of so many channels and these left tensors."""

    def __init__(self, form: StreamForm, hidden_size: int, left: Sequence[LeftTensor]) -> None:
        self.form, self.hidden_size, self.left = form, hidden_size, tuple(left)
        self._hidden = form.copies * hidden_size
        self.width = self._hidden + sum(one.width for one in self.left) + (0 if form.plain else DIGITS)

    def hidden(self, rows: Tensor) -> Tensor:
        """Hidden states as a layer is given them."""
        if self.form.copies == 1:
            return rows[..., : self._hidden].contiguous()
        hidden: Tensor = rows[..., : self._hidden].unflatten(-1, (self.form.copies, self.hidden_size))
        return (hidden.movedim(2, 0) if self.form.copies_first else hidden).contiguous()

    def ids(self, rows: Tensor) -> Tensor:
        """Which tokens rows are of, (sequences, tokens)."""
        digits = rows[..., -DIGITS:].to(torch.int64)
        ids: Tensor = (digits * BASE ** torch.arange(DIGITS, device=rows.device)).sum(-1)
        return ids

    def left_in(self, rows: Tensor) -> dict[Any, tuple[Tensor, ...]]:
        """What earlier layers have left, by its keys."""
        found: dict[Any, tuple[Tensor, ...]] = {}
        for one, columns in zip(self.left, self._columns(rows), strict=True):
            tensor = columns.contiguous().unflatten(-1, one.sizes).movedim(1, one.tokens_at)
            found[one.key] = (*found.get(one.key, ()), tensor)
        return found

    def first(self, hidden: Tensor, ids: Tensor) -> Tensor:
        """Rows before the first layer; nothing is left in them yet."""
        digits = (
            ids.to(hidden.device).unsqueeze(-1) // BASE ** torch.arange(DIGITS, device=hidden.device)
        ) % BASE
        left = hidden.new_zeros(*ids.shape, sum(one.width for one in self.left))
        return torch.cat((self._flat(hidden), left, digits.to(hidden.dtype)), -1)

    def after(self, rows: Tensor, hidden: Tensor, left: Any) -> Tensor:
        """Rows behind a layer that gives `hidden`; `left` has what layers have left until then."""
        tensors = [left[one.key][one.place].movedim(one.tokens_at, 1).flatten(2) for one in self.left]
        return torch.cat((self._flat(hidden), *tensors, rows[..., -DIGITS:].to(hidden)), -1)

    def _flat(self, hidden: Tensor) -> Tensor:
        if self.form.copies == 1:
            return hidden
        return (hidden.movedim(0, 2) if self.form.copies_first else hidden).flatten(2)

    def _columns(self, rows: Tensor) -> tuple[Tensor, ...]:
        sizes = [self._hidden, *(one.width for one in self.left), DIGITS]
        _, *left, _ = torch.split(rows, sizes, -1)
        return tuple(left)


def left_tensors(key: Any, short: Sequence[Tensor], long: Sequence[Tensor]) -> list[LeftTensor]:
    """What a layer leaves under a key, seen on two texts of unlike lengths, of one sequence each."""
    found = []
    for place, (one, other) in enumerate(zip(short, long, strict=True)):
        tokens_at = next(at for at, (a, b) in enumerate(zip(one.shape, other.shape, strict=True)) if a != b)
        sizes = tuple(size for at, size in enumerate(one.shape) if at not in (0, tokens_at))
        found.append(LeftTensor(key, place, tokens_at, sizes))
    return found
