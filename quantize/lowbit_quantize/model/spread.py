"""How channels of a producer feed the columns of what reads them: in blocks, perhaps repeated, from some channel on.

Column (h · repeats + r) · width + e is fed by channel start + h · stride + e. Separate, fused and interleaved value
projections, grouped queries, latent values and norms shared by heads are all of this form.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Spread:
    """`heads` blocks of `width` channels, the n-th at start + n · stride, each feeding `repeats` blocks of columns.

    `from_end`: whether the last of them is the producer's last channel, at any width.
    """

    start: int
    stride: int
    heads: int
    repeats: int
    width: int
    rows: int  # of the producer that it was found on

    @property
    def columns(self) -> int:
        return self.heads * self.repeats * self.width

    @property
    def fits(self) -> bool:
        """Whether the producer has the channels."""
        return self.start >= 0 and self.start + (self.heads - 1) * self.stride + self.width <= self.rows

    def channels(self) -> Tensor:
        """The producer's channels that feed anything, (heads · width,), in the order of the columns."""
        first = self.start + self.stride * torch.arange(self.heads)
        return (first.unsqueeze(1) + torch.arange(self.width)).flatten()

    def by_column(self, values: Tensor) -> Tensor:
        """Values by column, (columns,), of values by channel of the producer, (rows,)."""
        used = values[self.channels().to(values.device)]
        return used.view(self.heads, 1, self.width).expand(-1, self.repeats, -1).flatten()

    def at(self, rows: int, columns: int) -> Iterator["Spread"]:
        """What it can be at other widths, the likeliest first: of a producer of `rows`, read in `columns`."""
        if (self.heads, self.repeats) == (1, 1):
            shape = replace(self, width=columns)
        elif self.heads == 1:
            shape = replace(self, repeats=columns // self.width)
        else:
            shape = replace(self, heads=columns // (self.width * self.repeats))
        used = (shape.heads - 1) * shape.stride + shape.width
        ends = self.start + (self.heads - 1) * self.stride + self.width == self.rows
        starts = [rows - used] if ends else []
        inside = self.heads > 1 and self.start < self.stride  # of a head, whose size stays
        grown = self.start * rows // self.rows
        starts += [self.start, grown] if inside else [grown, self.start]
        for start in dict.fromkeys(starts):
            found = replace(shape, start=start, rows=rows)
            if found.fits and found.columns == columns:
                yield found


def spread_of(channels: Tensor, rows: int) -> Spread | None:
    """The form of a map from columns to channels, (columns,); None where it has none."""
    columns, index = len(channels), channels.tolist()
    for width in (size for size in range(columns, 0, -1) if columns % size == 0):
        blocks = columns // width
        for repeats in (count for count in range(1, blocks + 1) if blocks % count == 0):
            heads = blocks // repeats
            stride = index[width * repeats] - index[0] if heads > 1 else 0
            if heads > 1 and stride == 0:
                continue  # the same channels again: repeats
            found = Spread(index[0], stride, heads, repeats, width, rows)
            if found.channels().view(heads, 1, width).expand(-1, repeats, -1).flatten().tolist() == index:
                return found
    return None
