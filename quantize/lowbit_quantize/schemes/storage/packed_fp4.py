"""Two 4-bit floats (e2m1) in a byte: the first in its low bits, the sign on top of each half."""

import torch
from torch import Tensor

MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
SIGN = 8
PACKED_AT_ONCE = 1 << 22  # numbers


def packed_fp4(codes: Tensor) -> Tensor:
    """Codes (out, in), numbers of the grid, as uint8 (out, in / 2)."""
    magnitudes = torch.tensor(MAGNITUDES, device=codes.device)
    packed = []
    for rows in codes.split(max(1, PACKED_AT_ONCE // codes.shape[1])):
        wide = rows.float()
        halves = torch.bucketize(wide.abs(), magnitudes).to(torch.uint8) | (wide < 0).to(torch.uint8) * SIGN
        packed.append(halves[:, ::2] | halves[:, 1::2] << 4)
    return torch.cat(packed)


def unpacked_fp4(packed: Tensor, dtype: torch.dtype) -> Tensor:
    """The inverse: uint8 (out, in / 2) as numbers (out, in)."""
    numbers = torch.tensor([*MAGNITUDES, *(-one for one in MAGNITUDES)], dtype=dtype, device=packed.device)
    halves = torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)
    return numbers[halves.int()]
