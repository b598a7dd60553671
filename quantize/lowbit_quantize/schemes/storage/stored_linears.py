"""Linears of a checkpoint that plain transformers does not open, unpacked one by one by another reader.

Three kinds (transformers 5.19, compressed-tensors 0.17): routed experts in numbers that transformers does not stack
(int8, floats in blocks under scales of their own), which are ordinary linears to compressed-tensors' own codec;
integers of 3, 5, 6 or 7 bits, which that release packs otherwise than engines read them (`packed_words.py`); and FP8 in
blocks of rows and columns, whose size the library guesses from the shapes: it takes a short last block for a sign that
all are shorter, and one block of columns for channels. The latter two are unpacked here, integers bit by bit and not by
the code that packed them. Readers know the format from `config.json` and the files, and nothing of what wrote them.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lowbit_quantize.device.memory import without_compiler
from lowbit_quantize.schemes.block_fp8 import BLOCK, BlockFP8
from lowbit_quantize.schemes.scheme import Scheme
from lowbit_quantize.schemes.storage.packed_words import AT_ONCE, WORD_BITS, words_of

with without_compiler():  # the library compiles a function for 4-bit floats, which is not called here
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme

CODEC, OURS = "compressed-tensors", "Lowbit's own unpacker"
PACKED = "pack-quantized"
OPENED_EXPERTS = (PACKED, "float-quantized", "naive-quantized")  # formats of experts that transformers stacks
BYTE_BITS = 8


def reader_of(scheme: Scheme, shape: Sequence[int], *, expert: bool) -> str | None:
    """Who opens a linear in a scheme, (out, in), where plain transformers does not; None where it does."""
    if scheme.format == PACKED and _straddles(scheme.bits):
        return OURS
    if isinstance(scheme, BlockFP8):
        return OURS if expert or not _guessed(shape) else None
    return CODEC if expert and not scheme.experts.opened else None


def is_ours(scheme: QuantizationScheme, words: int, inputs: int) -> bool:
    """Whether a stored linear of so many words a row is packed without gaps, in a group that the codec reads with."""
    weights = scheme.weights
    packed = str(scheme.format) == PACKED and weights is not None
    return packed and _straddles(weights.num_bits) and words == words_of(inputs, weights.num_bits)


def opens_experts(scheme: QuantizationScheme) -> bool:
    """Whether plain transformers opens experts in a group of this format."""
    if scheme.weights is not None and scheme.weights.block_structure is not None:
        return False
    return scheme.format is None or str(scheme.format) in OPENED_EXPERTS


def parts_of(scheme: QuantizationScheme) -> set[str]:
    """The last parts of the names of what a linear is stored as.

    MXFP4's codec is NVFP4's and names a global scale, which only NVFP4 has.
    """
    names = set(_codec(scheme).compression_param_names(scheme))
    two_levels = scheme.weights is not None and scheme.weights.strategy == "tensor_group"
    return names if two_levels else names - {"weight_global_scale"}


def stored_codes(scheme: QuantizationScheme) -> tuple[str, torch.dtype]:
    """The part that holds a linear's codes, and its type: words of integers, bytes of two floats, or numbers."""
    assert scheme.weights is not None, "a group of linears has weights"
    if "weight_packed" not in parts_of(scheme):
        return "weight", scheme.weights.pytorch_dtype()
    return "weight_packed", torch.int32 if scheme.weights.type == "int" else torch.uint8


def unpacked(parts: Mapping[str, Tensor], scheme: QuantizationScheme) -> Tensor:
    """The weight (out, in) of a linear; raises ValueError where its parts do not fit each other."""
    if str(scheme.format) == PACKED:
        outputs, inputs = parts["weight_shape"].tolist()
        if is_ours(scheme, parts["weight_packed"].shape[1], inputs):
            return _unpacked(parts, scheme, outputs, inputs)
    if scheme.weights is not None and scheme.weights.block_structure is not None:
        return _of_blocks(parts["weight"], parts["weight_scale"], *scheme.weights.block_structure)
    weight: Tensor = _codec(scheme).decompress(dict(parts), scheme)["weight"]
    return weight


def _codec(scheme: QuantizationScheme) -> Any:
    return BaseCompressor.get_value_from_registry(str(scheme.format))


def _guessed(shape: Sequence[int]) -> bool:
    """Whether the library finds the size of blocks of a weight (out, in) from the number of its scales."""
    outputs, inputs = shape
    return inputs % BLOCK == 0 and (outputs <= BLOCK or (outputs % BLOCK == 0 and inputs > BLOCK))


def _of_blocks(codes: Tensor, scale: Tensor, rows: int, columns: int) -> Tensor:
    wide = scale.float().repeat_interleave(rows, 0).repeat_interleave(columns, 1)
    return codes.float() * wide[: codes.shape[0], : codes.shape[1]]


def _straddles(bits: float) -> bool:
    """Whether codes of so many bits lie across words."""
    return WORD_BITS % bits != 0


def _unpacked(parts: Mapping[str, Tensor], scheme: QuantizationScheme, outputs: int, inputs: int) -> Tensor:
    bits, scale = scheme.weights.num_bits, parts["weight_scale"].float()
    steps = torch.empty((outputs, inputs), dtype=torch.float32)
    rows = max(1, AT_ONCE // max(1, inputs * bits))
    for found, words in zip(steps.split(rows), parts["weight_packed"].split(rows), strict=True):
        found.copy_(_values(words, bits, inputs) - (1 << (bits - 1)))
    groups = steps.view(outputs, scale.shape[1], -1)
    if "weight_zero_point" in parts:
        zeros = _values(parts["weight_zero_point"].T.contiguous(), bits, outputs).T - (1 << (bits - 1))
        groups -= zeros.unsqueeze(-1)
    groups *= scale.unsqueeze(-1)
    return steps


def _values(words: Tensor, bits: int, count: int) -> Tensor:
    """Unsigned codes (rows, count) of words (rows, words): each bit by itself, with its weight."""
    stored = words.contiguous().cpu().view(torch.uint8)  # (rows, bytes), the lowest of a word first
    single = (stored.unsqueeze(-1) >> torch.arange(BYTE_BITS, dtype=torch.uint8)) & 1  # (rows, bytes, 8)
    codes = single.flatten(1)[:, : count * bits].view(len(words), count, bits)
    weights = 1 << torch.arange(bits, dtype=torch.int32)
    return (codes * weights).sum(-1, dtype=torch.int32)
