"""Several small unsigned integers in one int32, as AutoAWQ's and AutoGPTQ's formats hold them."""

import torch
from torch import Tensor

WORD_BITS = 32


def pack_last(values: Tensor, bits: int, order: tuple[int, ...] | None = None) -> Tensor:
    """Pack (…, n) unsigned values of `bits` bits into (…, n · bits / 32) int32, lowest bits first.

    With `order`, the i-th lowest field of a word holds the word's `order[i]`-th value.
    """
    words: Tensor = values.long().unflatten(-1, (-1, WORD_BITS // bits))  # (…, words, values)
    if order is not None:
        words = words[..., list(order)]
    shifts = torch.arange(0, WORD_BITS, bits, device=values.device)
    return (words << shifts).sum(-1).to(torch.int32)  # the fields do not overlap: a sum is an or
