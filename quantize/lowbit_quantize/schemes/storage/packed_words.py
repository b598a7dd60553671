"""Codes of 2 to 8 bits in words of 32, without a gap: one code may lie in two words (`pack-quantized`, dense).

Codes lie one after the other from the lowest bit of the first word on, so that 32 of them fill as many words as they
have bits. That is what vLLM 0.32 reads, whose loader asks for ceil(n · bits / 32) words, and compressed-tensors from
0.20 on; compressed-tensors 0.17 leaves the bits of a word that hold no whole code empty. For 2, 4 and 8 bits it is all
the same. Codes are signed and are stored with 2^(bits−1) added.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

WORD_BITS = 32
AT_ONCE = 1 << 22  # numbers, of four bytes each while they are moved


def words_of(count: int, bits: int) -> int:
    """Words that so many codes take."""
    return -(-count * bits // WORD_BITS)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes (rows, n), int8 in [−2^(bits−1), 2^(bits−1)), as words (rows, ceil(n · bits / 32)), int32."""
    rows, count = codes.shape
    words = torch.empty((rows, words_of(count, bits)), dtype=torch.int32, device=codes.device)
    step = max(1, AT_ONCE // max(1, count))
    for found, some in zip(words.split(step), codes.split(step), strict=True):
        found.copy_(_packed(some, bits))
    return words


def unpack(words: Tensor, bits: int, count: int) -> Tensor:
    """The inverse of `pack`: codes (rows, count), int8. Raises ValueError where the words are not so many."""
    if words.shape[1] != words_of(count, bits):
        raise ValueError(
            f"{count} codes of {bits} bits are {words_of(count, bits)} words, not {words.shape[1]}"
        )
    codes = torch.empty((len(words), count), dtype=torch.int8, device=words.device)
    step = max(1, AT_ONCE // max(1, count))
    for found, some in zip(codes.split(step), words.split(step), strict=True):
        found.copy_(_unpacked(some, bits, count))
    return codes


def _packed(codes: Tensor, bits: int) -> Tensor:
    count = codes.shape[1]
    periods = -(-count // WORD_BITS)
    values = codes.int() + (1 << (bits - 1))
    values = pad(values, (0, periods * WORD_BITS - count)).view(-1, periods, WORD_BITS)
    words = torch.zeros((len(codes), periods, bits), dtype=torch.int32, device=codes.device)
    for place in range(WORD_BITS):
        word, shift = divmod(place * bits, WORD_BITS)
        words[..., word] |= values[..., place] << shift
        if shift + bits > WORD_BITS:
            words[..., word + 1] |= values[..., place] >> (WORD_BITS - shift)
    return words.flatten(1)[:, : words_of(count, bits)]


def _unpacked(words: Tensor, bits: int, count: int) -> Tensor:
    periods = -(-count // WORD_BITS)
    parts = pad(words, (0, periods * bits - words.shape[1])).view(-1, periods, bits)
    values = torch.empty((len(words), periods, WORD_BITS), dtype=torch.int32, device=words.device)
    for place in range(WORD_BITS):
        word, shift = divmod(place * bits, WORD_BITS)
        over = shift + bits - WORD_BITS  # bits in the next word
        low = (parts[..., word] >> shift) & ((1 << (bits - max(0, over))) - 1)
        if over > 0:
            low |= (parts[..., word + 1] & ((1 << over) - 1)) << (bits - over)
        values[..., place] = low
    return values.flatten(1)[:, :count] - (1 << (bits - 1))
