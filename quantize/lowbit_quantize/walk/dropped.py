"""Layers that the compressed model does not have: the base model's text goes through them on its way."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from lowbit_quantize.model.decoder import Decoder
from lowbit_quantize.walk.visit import Traveller, experts_of, visit


def pass_through(decoder: Decoder, number: int, streams: Sequence[Tensor]) -> None:
    """Replace each of some streams by what a layer gives for it, in the stream's type; the layer is read once."""
    if not streams:
        return
    layer = decoder.load_frame(number)
    wide: nn.Module | None = None
    travellers = []
    for hidden in streams:
        if hidden.dtype == torch.float32 and decoder.dtype != torch.float32:
            wide = wide or decoder.load_frame(number).float()
            travellers.append(Traveller(hidden, wide))
        else:
            travellers.append(Traveller(hidden, layer))
    if decoder.architecture.kinds[number].experts:
        visit(decoder, number, travellers, experts_of(layer).only([]), lambda _: None, lambda _: None)
        return
    for one in travellers:
        decoder.advance(one.layer, number, one.hidden)


class DroppedLayers:
    """The layers of the base that are not `kept`, by where they stood."""

    def __init__(self, base: Decoder, kept: Sequence[int]) -> None:
        """`base` has all layers, `kept` are the numbers there of those that walk."""
        self._base = base
        ends = [-1, *kept, base.depth]
        self._before = [list(range(last + 1, here)) for last, here in pairwise(ends)]

    def take(self, place: int, streams: Sequence[Tensor]) -> None:
        """Take the base's streams through what stood before layer `place` of those that walk, or behind the last."""
        for number in self._before[place]:
            pass_through(self._base, number, streams)
